"""The draft vocabulary: the rows of the head that drafts are chosen from (FR-Spec, 2502.14856)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deliberate.modeling.draft_layer import DraftLayer


def frequent_tokens(tokens: Tensor, size: int, vocabulary: int) -> Tensor:
    """Ids of the most frequent tokens, rising, int64 ``[size]``.

    Tokens that never occur follow in the order of their ids: byte-level BPE gives low ids to
    frequent merges.

    Args:
        tokens: int64, of the model's own text.
        size: at most `vocabulary`.
        vocabulary: rows of the model's head.
    """
    counts = torch.bincount(tokens[tokens < vocabulary], minlength=vocabulary)
    order = counts.argsort(descending=True, stable=True)
    return order[: min(size, vocabulary)].sort().values


def coverage(tokens: Tensor, ids: Tensor) -> float:
    """Share of the tokens that are among these ids."""
    return float(torch.isin(tokens, ids).float().mean()) if len(tokens) else 0.0


@dataclass(frozen=True)
class SizeCost:
    """What a draft vocabulary of one size costs and gives.

    Attributes:
        size: rows.
        draft_seconds: of one draft.
        survives: share of chains whose first 1, 2, ... drafts are all accepted.
        drafts: per pass, the number with the fewest seconds per token.
        seconds_per_token: with so many.
    """

    size: int
    draft_seconds: float
    survives: tuple[float, ...]
    drafts: int
    seconds_per_token: float


def cost_of_size(
    size: int, survives: Sequence[float], draft_seconds: float, single: float, more: float
) -> SizeCost:
    """Seconds per accepted token with the best number of drafts.

    Args:
        single: seconds of a full-depth pass over one token.
        more: seconds of one more token in it.
    """
    best = (single, 0)
    for drafts in range(1, len(survives) + 1):
        tokens = 1.0 + sum(survives[:drafts])
        best = min(best, ((single + drafts * (draft_seconds + more)) / tokens, drafts))
    return SizeCost(size, draft_seconds, tuple(survives), best[1], best[0])


def resized(layer: DraftLayer, ids: Tensor) -> DraftLayer:
    """The same layer over another draft vocabulary, rising ids."""
    config = type(layer.config)(**layer.config.to_dict() | {"vocabulary": len(ids)})
    other = DraftLayer(config)
    state = layer.state_dict() | {"vocabulary": ids}
    other.load_state_dict(state)
    return other
