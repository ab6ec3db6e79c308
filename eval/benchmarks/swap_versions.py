"""What `deliberate bench swaps` swaps between: versions of one model that differ in every kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deliberate.api import checkpoint
from deliberate.api.adapters import ADAPTER, attach, save_adapter
from deliberate.api.model import AdaptiveModel
from deliberate.utils.errors import DeliberateError

# Thresholds of the versions that exit early: low, so that many tokens do.
_LOW, _MIDDLE = 0.1, 0.4


@dataclass(frozen=True)
class Variant:
    """One version.

    Attributes:
        kind: what it differs in from the first one: policy, exits, adapter or weights.
        changes: all fields of `Source` that versions here set.
    """

    kind: str
    changes: dict[str, Any]


def make_variants(name: str, folder: Path, seed: int, noise: float) -> list[Variant]:
    """The model itself at full depth, and a version of each kind, written under a folder.

    Args:
        name: bundled model, folder or hub name.
        folder: for what is made.
        seed: of the noise.
        noise: standard deviation of what is added to weights, over theirs.

    Raises:
        DeliberateError: a model without exits, or the package `peft` is missing.
    """
    model = AdaptiveModel.from_pretrained(name, executor="generic").eval()
    exits = len(model.exit_config.layers)
    if not exits:
        raise DeliberateError(f"model={name} has no exits to swap: name one that has some")
    draw = torch.Generator().manual_seed(seed)
    dense = {"fidelity": "dense", "thresholds": None, "calibration": None}
    early = {"fidelity": "threshold", "thresholds": [_LOW] * exits, "calibration": None}
    middle = {"fidelity": "threshold", "thresholds": [_MIDDLE] * exits, "calibration": None}
    made = [Variant("weights", {"model": name, **dense})]
    made.append(Variant("policy", {"model": name, **early}))
    _disturb(list(model.exits.parameters()), noise, draw)
    _save(model, folder / "exits", name, merge=False)
    made.append(Variant("exits", {"model": str(folder / "exits"), **middle}))
    _save_adapter(name, folder / "adapter", draw, noise)
    made.append(Variant("adapter", {"model": str(folder / "adapter"), **dense}))
    other = AdaptiveModel.from_pretrained(name, executor="generic").eval()
    _disturb([other.base.get_output_embeddings().weight], noise, draw)
    _save(other, folder / "weights", name, merge=True)
    made.append(Variant("weights", {"model": str(folder / "weights"), **dense}))
    return made


def _disturb(tensors: list[Any], noise: float, draw: torch.Generator) -> None:
    with torch.no_grad():
        for one in tensors:
            size = one.std().nan_to_num(0.0) if one.numel() > 1 else one.abs().mean()
            one.add_(noise * size * torch.randn(one.shape, generator=draw))


def _save(model: AdaptiveModel, folder: Path, name: str, *, merge: bool) -> None:
    checkpoint.save(model, folder, merge=merge)
    if merge:
        checkpoint.load_tokenizer(name).save_pretrained(folder)


def _save_adapter(name: str, folder: Path, draw: torch.Generator, noise: float) -> None:
    model = AdaptiveModel.from_pretrained(name, executor="generic").eval()
    tuner = attach(model, rank=4, alpha=8, dropout=0.0, targets="all-linear")
    state = model.state_dict()
    for key, value in state.items():
        if ".lora_B." in key:  # zeros: an adapter that changes nothing
            value.copy_(0.1 * noise * torch.randn(value.shape, generator=draw))
    save_adapter(folder, state, tuner.peft_config[ADAPTER], model.exit_config)
