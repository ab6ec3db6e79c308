"""A draft layer several drafts deep on its own outputs (the training-time test of EAGLE-3).

Step 0 reads the model's states. Step s reads, in their place, the outputs of step s - 1 one entry
before. Its queries look at the keys of step 0 up to s entries before their own, and at the keys
that the earlier steps of the same chain wrote for the entries between: what a draft sees while
decoding, for all starting points at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deliberate.modeling.draft_layer import DraftLayer


def unrolled(
    layer: DraftLayer,
    embedded: Tensor,
    normed: Tensor,
    norm: Callable[[Tensor], Tensor],
    *,
    depth: int,
    first: int = 0,
) -> list[Tensor]:
    """Outputs ``[T - first - s, d]`` of each step s < depth, of the entries first + s..T - 1.

    Args:
        layer: the draft layer.
        embedded: ``[T, d]``, of the token after each entry's position.
        normed: ``[T, d]``, the model's states after its final norm.
        norm: the model's final norm.
        depth: drafts of a chain.
        first: entry of the first output; those before it only give keys and values.
    """
    several = unrolled_batch(
        layer, embedded[None], normed[None], norm, depth=depth, first=first
    )  # fmt: skip
    return [one[0] for one in several]


def unrolled_batch(
    layer: DraftLayer,
    embedded: Tensor,
    normed: Tensor,
    norm: Callable[[Tensor], Tensor],
    *,
    depth: int,
    first: int = 0,
) -> list[Tensor]:
    """The same for texts ``[B, T, d]`` padded at their ends: outputs ``[B, T - first - s, d]``.

    An entry sees none behind it, so the padding changes only outputs that belong to it.
    """
    config = layer.config
    count = embedded.shape[1]
    places = torch.arange(count, device=embedded.device)
    joined = layer.join(embedded, normed)
    keys, values = layer.keys_values(joined, places)
    group = config.heads // config.kv_heads
    wide_keys = keys.repeat_interleave(group, dim=1)
    wide_values = values.repeat_interleave(group, dim=1)
    chain: list[tuple[Tensor, Tensor]] = []  # keys and values by step, of all its entries
    outputs: list[Tensor] = []
    for step in range(depth):
        begin = first + step
        own = joined[:, first:]
        if step:
            states = norm(outputs[-1][:, : count - begin])
            own = layer.join(embedded[:, begin:], states)
            own_keys, own_values = layer.keys_values(own, places[begin:])
            chain.append(
                (
                    own_keys.repeat_interleave(group, dim=1),
                    own_values.repeat_interleave(group, dim=1),
                )
            )
        queries = layer.queries(own, places[begin:])
        scores = queries @ wide_keys.transpose(-1, -2)
        # Entry t of step s sees the model's states up to entry t - s.
        later = places[None, :] > places[begin:, None] - step
        scores = scores.masked_fill(later, -torch.inf)
        length = count - begin
        # Keys of step j + 1 at entry t - s + j + 1: they end s - j - 1 entries before the last one.
        parts = [
            (part_keys[:, :, :length], part_values[:, :, :length])
            for part_keys, part_values in chain
        ]
        single = [(queries * part).sum(dim=-1, keepdim=True) for part, _ in parts]
        weights = torch.cat([scores, *single], dim=-1) * config.head_dim**-0.5
        weights = weights.softmax(dim=-1)
        attended = weights[..., :count] @ wide_values
        for index, (_, part) in enumerate(parts):
            attended = attended + weights[..., count + index, None] * part
        outputs.append(layer.after_attention(own, attended.transpose(1, 2).flatten(2)))
    return outputs
