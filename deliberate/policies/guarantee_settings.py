"""Settings that contradict a guarantee are refused by name, never ignored.

A certificate was tested with one way of decoding, which its conditions state: greedy, with deferred
layers, up to a number of tokens, by one executor, and so on. A budget's costs are those of deferred
layers, and its controller sets the thresholds.
"""

from __future__ import annotations

from typing import Any

from deliberate.config import Fidelity
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.spec import DecodingSpec, refused
from deliberate.modeling.model_view import ModelView


def check_guarantee_settings(model: ModelView, spec: DecodingSpec, hooks: Any) -> None:
    """Raises where a setting cannot be obeyed together with the fidelity's guarantee.

    `DecodingSpec` has refused what contradicts its fidelity; here is what depends on the model and
    on what is beside the spec.

    Args:
        spec: with its fidelity.
        hooks: of the caller, `deliberate.api.loop_builder.Hooks`.

    Raises:
        DeliberateError: names the setting and what can be used instead.
    """
    fidelity = spec.fidelity
    if fidelity not in (Fidelity.CERTIFIED, Fidelity.BUDGET):
        return
    for name in ("exit_policy", "decide"):
        if getattr(hooks, name) is not None:
            reason = "its calibration decides which tokens exit"
            raise refused(name, getattr(hooks, name), fidelity, reason)
    if model.gate is not None and not spec.gate:
        reason = "its calibration is of the model with its deliberation gate"
        raise refused("gate", spec.gate, fidelity, reason)
    if fidelity is Fidelity.CERTIFIED and hooks.monitor is not None:
        reason = "the certificate's own drift monitor takes its place"
        raise refused("monitor", hooks.monitor, fidelity, reason)


def decoding_conditions(
    model: ModelView,
    spec: DecodingSpec,
    *,
    max_new_tokens: int,
    chooser: TokenChooser | None = None,
    constraint: object = None,
) -> dict[str, Any]:
    """The conditions of a request by the names of `deliberate.calibration.conditions`.

    Calibration records them in its certificates; every certified request is compared with them.

    Args:
        spec: of the request.
        max_new_tokens: of every sequence.
        chooser: how logits become tokens; None for plain greedy decoding.
        constraint: on the tokens, or None.
    """
    pending = spec.max_pending
    return {
        "sampling": "greedy" if chooser is None or chooser.plain else chooser.describe(),
        "constraint": "none" if constraint is None else type(constraint).__name__,
        "max_new_tokens": max_new_tokens,
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "storage": storage_of(model),
        "executor": _executor(model),
        "kv_mode": str(spec.kv_mode),
        "kv_storage": str(spec.kv_storage),
        "max_pending": model.exit_config.max_pending if pending is None else pending,
        "schedule": _schedule(spec),
        "gate": model.gate is not None and spec.gate,
    }


def _schedule(spec: DecodingSpec) -> dict[str, Any]:
    """What of the schedule of deep passes differs from the default, JSON-ready."""
    default = DecodingSpec()
    if spec.schedule == default.schedule:
        return {}
    usual = default.to_dict()["schedule"]
    given = spec.to_dict()["schedule"]
    return {name: value for name, value in given.items() if value != usual[name]}


def storage_of(model: ModelView) -> str | list[str]:
    """How the executor keeps the weights: one word, or one for each layer and the head."""
    plan = getattr(model.backbone, "plan", None)
    if plan is None:
        return "native"
    every = [str(one) for one in (*plan.layers, plan.head)]
    return every[0] if len(set(every)) == 1 else every


def _executor(model: ModelView) -> str:
    """Which implementation runs the layers: ``generic``, or ``fused`` and by what."""
    engine = getattr(model.backbone, "engine", None)
    if engine is None:
        return "generic"
    return "fused kernels" if getattr(model.backbone, "by_ops", False) else f"fused {engine}"
