"""Hashes that say which weights, exits and settings a calibration or a certificate belongs to."""

from __future__ import annotations

from typing import Any

from torch import nn

from deliberate.modeling.model_view import ModelView
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hashing import json_sha256, tensors_sha256
from deliberate.utils.weight_watch import WeightWatch, tensors_of

# What of an exit configuration changes an exit's token or score; thresholds and max_pending only
# decide which exit is taken.
_EXIT_SETTINGS = ("layers", "measure", "translator", "rank")


def base_sha256(model: ModelView) -> str:
    """Hash of the base model's weights and buffers, in the dtype they are loaded in."""
    return tensors_sha256(model.base.state_dict())


def exits_sha256(model: ModelView) -> str:
    """Hash of the exits: their weights, layers, measure and translator, not their thresholds.

    A deliberation gate is part of it, with its rule: it changes what exits are to agree with.
    """
    settings = model.exit_config.to_dict()
    kept: dict[str, Any] = {name: settings[name] for name in _EXIT_SETTINGS}
    hashed = {"settings": kept, "weights": tensors_sha256(model.exits.state_dict())}
    if model.gate is not None:
        hashed["gate"] = {
            "settings": model.gate.config.to_dict(),
            "weights": tensors_sha256(model.gate.state_dict()),
        }
    return json_sha256(hashed)


class Fingerprints:
    """The hashes of one model, computed anew when a weight changed.

    Args:
        base: the wrapped model, as it is when it is wrapped.
    """

    def __init__(self, base: nn.Module) -> None:
        self._kinds = tensors_of(base)[1]
        self._held: tuple[WeightWatch, tuple[str, str]] | None = None

    def of(self, model: ModelView) -> tuple[str, str]:
        """SHA-256 of the base weights and of the exits, as they are now.

        Every call compares a part of the weights with those that were hashed (`WeightWatch`), since
        a write through ``.data`` leaves no other trace.

        Raises:
            DeliberateError: a module of the base model is of another class than when it was
                wrapped: its weights alone do not say what it computes.
        """
        tensors, kinds = tensors_of(model.base)
        if kinds != self._kinds:
            changed = sorted({kind.__name__ for kind in set(kinds) ^ set(self._kinds)})
            raise DeliberateError(
                "modules of the base model have changed since it was wrapped "
                f"({', '.join(changed) or 'another number of them'}), so no calibration is known "
                "to fit: merge or remove adapters, or wrap the model anew and calibrate it"
            )
        tensors += tensors_of(model.exits)[0]
        if model.gate is not None:
            tensors += tensors_of(model.gate)[0]
        settings = (model.exit_config, None if model.gate is None else model.gate.config)
        if self._held is None or self._held[0].changed(tensors, settings):
            hashes = base_sha256(model), exits_sha256(model)
            self._held = WeightWatch(tensors, settings), hashes
        return self._held[1]
