"""Which executor runs a model: the fused one where it can, transformers' own modules elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import torch
from transformers import PreTrainedModel

from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.executors.fused.implementation import LayerEngine
from deliberate.executors.fused.weights import plan_for, unsupported
from deliberate.executors.quantization import WeightPlan
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.probe import check_architecture
from deliberate.utils.errors import DeliberateError


class Executor(StrEnum):
    """Which implementation runs the layers."""

    AUTO = "auto"
    GENERIC = "generic"
    FUSED = "fused"


def choose_executor(
    model: PreTrainedModel,
    executor: Executor | str = Executor.AUTO,
    *,
    boundaries: Sequence[int] = (),
    weights: str | Mapping[str, Sequence[int]] | WeightPlan | None = None,
    head: str | None = None,
    share: bool = True,
    engine: LayerEngine | str | None = None,
) -> tuple[Backbone, str]:
    """The executor for a model, and one line that says which it is and why.

    Args:
        model: the transformers model.
        executor: ``auto`` (fused on a CPU or one CUDA device where it can run the model, else
            generic), ``generic`` or ``fused``.
        boundaries, weights, head, share, engine: as for `FusedBackbone`.

    Raises:
        DeliberateError: an unknown name; an architecture that does not pass the probe; ``fused``,
            or smaller weights, for a model that only the generic executor can run; an engine for a
            model that is to be run by it.
    """
    try:
        wanted = Executor(executor)
    except ValueError:
        choices = ", ".join(Executor)
        raise DeliberateError(f"executor {executor!r} is unknown; it is one of {choices}") from None
    generic = Backbone(model)
    check_architecture(generic)
    plan = plan_for(model, generic.num_layers, weights, head)
    reason = "asked for" if wanted is Executor.GENERIC else unsupported(generic)
    default = wanted is Executor.AUTO and engine is None and plan.native
    if reason is None and default and _double(generic):
        # Nobody decodes in double precision for speed, and the C++ kernels are in single.
        reason = "its weights are float64, which the fused executor runs only if asked for"
    if reason is not None:
        if engine is not None:
            raise DeliberateError(f"engine={str(engine)!r} needs the fused executor: {reason}")
        if not plan.native:
            raise DeliberateError(f"weights {plan.described} need the fused executor: {reason}")
        if wanted is Executor.FUSED:
            raise DeliberateError(f"the fused executor cannot run this model: {reason}")
        return generic, f"generic: {reason}"
    settings: dict[str, Any] = {
        "boundaries": boundaries,
        "weights": plan,
        "share": share,
        "engine": engine,
    }
    if on_cuda(generic) or (wanted is Executor.FUSED and torch.cuda.is_available()):
        from deliberate.executors.fused.cuda.backbone import (
            CudaFusedBackbone,  # built on what is below
        )

        # On a CPU it is a `FusedBackbone`: the model may be moved later.
        ours = CudaFusedBackbone(model, **settings)
        return ours, f"fused: {generic.architecture}, {ours.how}"
    fused = FusedBackbone(model, **settings)
    reason = (
        f"eager, {fused.programs.reason}" if fused.engine is LayerEngine.EAGER else fused.engine
    )
    return fused, f"fused: {generic.architecture}, {reason}"


def on_cuda(backbone: Backbone) -> bool:
    """Whether a model is on a CUDA device, where fused layers are Triton kernels in graphs."""
    return backbone.device.type == "cuda"


def _double(backbone: Backbone) -> bool:
    return any(weight.dtype is torch.float64 for weight in backbone.layers.parameters())
