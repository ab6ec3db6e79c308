"""States of a pass whose rows have different numbers of tokens, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def newest(hidden: Tensor, counts: Sequence[int]) -> Tensor:
    """The last real state ``[R, d]`` of each row of ``[R, M, d]``."""
    if len(set(counts)) == 1:
        return hidden[:, counts[0] - 1]
    rows = torch.arange(len(counts), device=hidden.device)
    return hidden[rows, torch.tensor(counts, device=hidden.device) - 1]


def flat(hidden: Tensor, counts: Sequence[int]) -> Tensor:
    """All real states ``[sum(counts), d]``, row after row."""
    if len(set(counts)) == 1:
        return hidden[:, : counts[0]].reshape(-1, hidden.shape[-1])
    return torch.cat([hidden[row, :count] for row, count in enumerate(counts)])
