"""What runs the fused executor's layers: C++ kernels, torch.compile, or torch's own operators."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from deliberate.executors.fused.native import unavailable
from deliberate.executors.fused.programs import missing_compiler
from deliberate.executors.quantization import WeightPlan
from deliberate.utils.errors import DeliberateError


class LayerEngine(StrEnum):
    """Ways to run the same layers, the fastest first."""

    NATIVE = "native"  # the C++ kernels: float32 on a CPU
    INDUCTOR = "inductor"  # torch.compile: other dtypes on a CPU
    EAGER = "eager"


def as_engine(name: LayerEngine | str) -> LayerEngine:
    """The engine of this name.

    Raises:
        DeliberateError: there is none.
    """
    try:
        return LayerEngine(name)
    except ValueError:
        choices = ", ".join(LayerEngine)
        raise DeliberateError(f"engine {name!r} is unknown; it is one of {choices}") from None


def choose_engine(
    like: Tensor, wanted: LayerEngine | None = None, plan: WeightPlan | None = None
) -> tuple[LayerEngine, str | None]:
    """The engine for weights of this dtype and device.

    Args:
        wanted: the only one that will do; None for the fastest that can be had.
        plan: how weights are stored; blocks are read by the C++ kernels alone.

    Returns:
        It, and why nothing is compiled by torch, or None where that is what runs.

    Raises:
        DeliberateError: the one wanted cannot be had.
    """
    if plan is not None and plan.in_blocks:
        reason = _missing(LayerEngine.NATIVE, like)
        if reason is None and wanted not in (None, LayerEngine.NATIVE):
            reason = f"engine={str(wanted)!r} was asked for"
        if reason is not None:
            raise DeliberateError(
                f"weights {plan.described} are read by the C++ kernels alone: {reason}"
            )
    if wanted is not None:
        reason = _missing(wanted, like)
        if reason is not None:
            raise DeliberateError(f"engine {str(wanted)!r} cannot be had here: {reason}")
        return wanted, None if wanted is LayerEngine.INDUCTOR else f"engine={wanted} was asked for"
    if _missing(LayerEngine.NATIVE, like) is None:
        return LayerEngine.NATIVE, "the C++ kernels run its layers"
    reason = _missing(LayerEngine.INDUCTOR, like)
    return (LayerEngine.INDUCTOR, None) if reason is None else (LayerEngine.EAGER, reason)


def _missing(engine: LayerEngine, like: Tensor) -> str | None:
    """Why an engine cannot be had, or None."""
    if engine is LayerEngine.NATIVE:
        return unavailable(like)
    if engine is LayerEngine.INDUCTOR:
        return missing_inductor(like.device)
    return None


def missing_inductor(device: torch.device) -> str | None:
    """Why nothing is compiled by torch on this device, or None."""
    if device.type != "cpu":
        return f"compiled layers have been tried on CPUs only, not on {device.type}"
    return missing_compiler()
