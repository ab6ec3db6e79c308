"""A ragged batch, left-padded, and the model that the tests of `generate` decode it with."""

from __future__ import annotations

import torch
from tiny_models import random_ids, tiny_model
from torch import Tensor

from deliberate.api.model import AdaptiveModel

LENGTHS = [3, 9, 5, 7]
# Thresholds at which some tokens of the random model exit, and every exit is evaluated.
OWN = {"thresholds": 0.013, "online": False}


def ragged_model() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=6), [1, 2, 4])


def ragged_batch() -> dict[str, Tensor]:
    """Prompts of `LENGTHS` tokens, by the names of `generate`'s arguments."""
    ids = random_ids(max(LENGTHS), batch=len(LENGTHS), seed=1)
    mask = torch.ones_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, : ids.shape[1] - length] = 0
        mask[row, : ids.shape[1] - length] = 0
    return {"inputs": ids, "attention_mask": mask}
