"""Keys and values to and from transformers' own caches, so that a generation can be continued.

transformers pads a batch on the left and counts slots from there; this package counts a row's slots
from its own first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache

from deliberate.backbone import Backbone
from deliberate.cache import SegmentCache
from deliberate.decoding import DecodeLoop
from deliberate.errors import DeliberateError


def from_transformers(
    cache: Cache, backbone: Backbone, prompt_lengths: Sequence[int], max_new_tokens: int
) -> SegmentCache | None:
    """What a caller's cache holds of the beginning of each prompt, or None where it is empty.

    Sliding-window layers of transformers hold the last tokens only; those are all that is read.

    Raises:
        DeliberateError: the cache covers the whole prompt, so that nothing is left to run.
    """
    held = int(cache.get_seq_length())
    if held == 0:
        return None
    longest = max(prompt_lengths)
    if held >= longest:
        raise DeliberateError(
            f"past_key_values holds {held} tokens and the prompt has {longest}: the prompt must "
            "contain what the cache holds and at least one token more"
        )
    ours = backbone.new_cache(longest + min(max_new_tokens, 512), len(prompt_lengths))
    for layer in range(backbone.num_layers):
        source: Any = cache.layers[layer]
        keys, values = source.keys, source.values
        assert keys is not None and values is not None
        kept = min(held, keys.shape[2])
        if not getattr(source, "is_sliding", False):
            keys, values = keys[:, :, :held], values[:, :, :held]
        for row, length in enumerate(prompt_lengths):
            padding = longest - length
            own = min(kept, held - padding)
            if own < 1:
                raise DeliberateError(
                    f"past_key_values holds nothing of prompt {row}: it is shorter than the padding"
                )
            ours.adopt(layer, row, held - padding - own, keys[row, :, -own:], values[row, :, -own:])
    return ours


def to_transformers(loop: DecodeLoop, cache: Cache, prompt_width: int) -> None:
    """Gives the caller's cache the keys and values of every token but the last.

    Rows are aligned as transformers would have left them: padding before the prompt and behind a
    finished row holds zeros, which nobody attends to.
    """
    loop.catch_up()
    held = int(cache.get_seq_length())
    made = max(len(sequence.records) for sequence in loop.sequences)
    total = prompt_width + made - 1
    for layer in range(loop.backbone.num_layers):
        keys, values = loop.cache.states(layer)
        shape = (len(loop.sequences), keys.shape[1], total, keys.shape[3])
        padded = keys.new_zeros(shape), values.new_zeros((*shape[:3], values.shape[3]))
        for sequence in loop.sequences:
            offset = prompt_width - sequence.prompt_tokens
            # The last token of the output was never fed; a stop may have dropped more.
            fed = sequence.prompt_tokens + len(sequence.records) - 1
            own = min(fed, loop.cache.length(layer, sequence.row))
            for target, source in zip(padded, (keys, values), strict=True):
                target[sequence.index, :, offset : offset + own] = source[sequence.row, :, :own]
        with torch.inference_mode(False), torch.no_grad():
            fresh_keys, fresh_values = (part[:, :, held:].clone() for part in padded)
            cache.update(fresh_keys, fresh_values, layer)
