"""Whether a model that is run layer by layer gives the logits of its own ``forward``.

`Backbone` runs decoders that are not in `ARCHITECTURES` by the conventions they share. Whether that
is right for one of them is measured, not assumed: on random tokens, whole and in steps, with tokens
pending at half depth, in ragged rows, and past a sliding window that is short enough.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deliberate.modeling.architectures import ARCHITECTURES
from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError

TOKENS = 12
# A window up to this many tokens is run past; behind a longer one the layer types are believed.
LONGEST_WINDOW = 512
# Largest difference of a logit, as a share of the standard deviation of the model's own logits.
# Parts that compute in float32 whatever the dtype (softmax, routers) show in float64.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.5}

_passed: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass(frozen=True)
class Probe:
    """What the probe measured.

    Attributes:
        differences: by the way of running, the largest difference of a logit from the model's own,
            in standard deviations of those.
        past_window: whether it ran past the model's sliding window; None without one.
    """

    differences: dict[str, float]
    past_window: bool | None


def check_architecture(backbone: Backbone) -> None:
    """Probes a model once, unless its architecture is an entry of `ARCHITECTURES`.

    Raises:
        DeliberateError: its logits differ, or a pass fails; the line says in what.
    """
    if backbone.architecture in ARCHITECTURES or backbone.model in _passed:
        return
    limit = TOLERANCE.get(backbone.dtype, TOLERANCE[torch.bfloat16])
    for way, difference in probe(backbone).differences.items():
        if not difference <= limit:
            raise DeliberateError(
                f"architecture {backbone.architecture!r} is not supported: run layer by layer "
                f"({way}), its logits differ from the model's own by up to {difference:.2g} "
                "standard deviations; `deliberate architectures` lists those that run"
            )
    _passed.add(backbone.model)


@torch.no_grad()
def probe(backbone: Backbone) -> Probe:
    """Runs a model's own ``forward`` and the layers one by one on the same random tokens.

    Raises:
        DeliberateError: a layer cannot be called by the conventions.
    """
    model = backbone.model
    was_training = model.training
    model.eval()
    try:
        return _probe(backbone)
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DeliberateError(
            f"architecture {backbone.architecture!r} is not supported: its layers cannot be run by "
            f"the conventions of transformers' decoders ({type(error).__name__}: {reason})"
        ) from error
    finally:
        model.train(was_training)


def _probe(backbone: Backbone) -> Probe:
    window = backbone.window
    past = window is not None and window <= LONGEST_WINDOW
    n = window + 6 if past and window is not None else TOKENS
    generator = torch.Generator().manual_seed(0)
    embedding: Any = backbone.model.get_input_embeddings()
    rows = min(backbone.vocab_size, int(embedding.weight.shape[0]))
    ids = torch.randint(0, rows, (2, n), generator=generator).to(backbone.device)
    own = backbone.model(ids, use_cache=False).logits.double()
    spread = float(own.std()) or 1.0
    short = n - 5  # of the second row

    def difference(ours: Tensor, wanted: Tensor) -> float:
        worst = float((ours.double() - wanted).abs().max()) / spread
        return worst if worst == worst else float("inf")

    found = {
        "the whole text": difference(_whole(backbone, ids[:1]), own[:1]),
        "in steps with tokens pending at half depth": difference(
            _deferred(backbone, ids[:1], n - 3), own[:1, n - 3 :]
        ),
    }
    ragged = _ragged(backbone, ids, (n, short))
    found["rows of different lengths"] = max(
        difference(ragged[0][None], own[:1, -1:]),
        difference(ragged[1][None], own[1:, short - 1 : short]),
    )
    return Probe(found, None if window is None else past)


def _whole(backbone: Backbone, ids: Tensor) -> Tensor:
    """Logits ``[1, n, V]`` of one pass."""
    cache = backbone.new_cache(ids.shape[1])
    ctx = backbone.context(0, ids.shape[1], device=backbone.device)
    hidden = backbone.embed(ids, ctx)
    return backbone.logits(backbone.run_layers(hidden, 0, backbone.num_layers, ctx, cache))


def _deferred(backbone: Backbone, ids: Tensor, prompt: int) -> Tensor:
    """Logits ``[1, n - prompt, V]`` of tokens that run singly to half depth, then on together."""
    depth, half = backbone.num_layers, max(1, backbone.num_layers // 2)
    cache = backbone.new_cache(ids.shape[1])
    ctx = backbone.context(0, prompt, device=backbone.device)
    backbone.run_layers(backbone.embed(ids[:, :prompt], ctx), 0, depth, ctx, cache)
    pending = []
    for place in range(prompt, ids.shape[1]):
        ctx = backbone.context(place, 1, device=backbone.device)
        hidden = backbone.embed(ids[:, place : place + 1], ctx)
        pending.append(backbone.run_layers(hidden, 0, half, ctx, cache))
    ctx = backbone.context(prompt, len(pending), device=backbone.device)
    return backbone.logits(backbone.run_layers(torch.cat(pending, 1), half, depth, ctx, cache))


def _ragged(backbone: Backbone, ids: Tensor, ends: tuple[int, int]) -> list[Tensor]:
    """Last logits ``[1, V]`` of two rows that end at different lengths, run in two passes."""
    depth = backbone.num_layers
    cache = backbone.new_cache(ids.shape[1], batch=2)
    firsts = [end - 2 for end in ends]
    hidden = None
    for starts, counts in (([0, 0], firsts), (firsts, [2, 2])):
        ctx = backbone.pass_context((0, 1), starts, counts, batch=2)
        parts = [ids[row, s : s + max(counts)] for row, s in enumerate(starts)]
        longest = max(map(len, parts))
        padded = torch.stack([torch.nn.functional.pad(p, (0, longest - len(p))) for p in parts])
        hidden = backbone.run_layers(backbone.embed(padded, ctx), 0, depth, ctx, cache)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            cache.crop(start + count, row)
    assert hidden is not None
    return [backbone.logits(hidden[row : row + 1, 1]) for row in (0, 1)]
