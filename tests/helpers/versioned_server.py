"""A server with a registry of versions, and checkpoints that differ from the bundled model."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from tiny_calibration import tiny_calibration

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.lifecycle.version import Source
from deliberate.serving.app import Server
from deliberate.serving.command import build_versioned_server
from deliberate.serving.settings import ServerSettings


def versioned(folder: Path, **settings) -> Server:
    """A server of `tiny` (or of what the registry in `folder` says is live)."""
    made = ServerSettings(**{"registry": folder, "max_running": 4} | settings)
    return build_versioned_server(Source("tiny"), "tiny", made)


def other_weights(scale: float = 0.5) -> AdaptiveModel:
    """The bundled model with a disturbed head, at full depth."""
    model = AdaptiveModel.from_pretrained("tiny", fidelity="dense")
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head = model.base.get_output_embeddings().weight
        head.add_(scale * head.std() * torch.randn(head.shape, generator=noise))
    return model


def save_other_weights(folder: Path, scale: float = 0.5) -> Path:
    """The same as a folder."""
    other_weights(scale).save_pretrained(folder, merge=True)
    checkpoint.load_tokenizer("tiny").save_pretrained(folder)
    return folder


@functools.cache
def calibration():
    """Of the bundled model, made up."""
    return tiny_calibration(AdaptiveModel.from_pretrained("tiny"))


def random_prompt(number: int) -> list[int]:
    """Random tokens: what follows them differs from version to version."""
    return torch.randint(5, 1000, (12,), generator=torch.Generator().manual_seed(number)).tolist()
