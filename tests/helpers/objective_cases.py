"""A toy model and batches for tests of training objectives."""

from __future__ import annotations

import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.config import IGNORE_INDEX

LAYERS, EXITS = 4, (1, 3)


def adaptive(arch="llama", *, seed=0, scale=0.2):
    """A toy model whose translators and gates are away from their neutral start."""
    model = AdaptiveModel(tiny_model(arch, layers=LAYERS, dtype=torch.float32, seed=seed), EXITS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.exits.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def batch_of(*sizes, seed=0):
    """Right-padded rows; the first 3 tokens of each are its prompt."""
    longest = max(sizes)
    ids = torch.zeros(len(sizes), longest, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, size in enumerate(sizes):
        ids[row, :size] = random_ids(size, seed=100 * seed + row)[0]
        labels[row, 3:size] = ids[row, 3:size]
    return {"input_ids": ids, "labels": labels}
