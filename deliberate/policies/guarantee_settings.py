"""Settings that contradict a guarantee are refused by name, never ignored.

A certificate was tested with one way of decoding: greedy, with deferred layers, with the
certificate's own thresholds, with weights as they were hashed. A budget's costs are those of
deferred layers, and its controller sets the thresholds.
"""

from __future__ import annotations

from typing import Any

from deliberate.config import Fidelity
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.spec import DecodingSpec, refused
from deliberate.modeling.model_view import ModelView
from deliberate.utils.errors import DeliberateError


def check_guarantee_settings(
    model: ModelView, spec: DecodingSpec, hooks: Any, chooser: TokenChooser | None
) -> None:
    """Raises where a setting cannot be obeyed together with the fidelity's guarantee.

    `DecodingSpec` has refused what contradicts its fidelity; here is what depends on the model and
    on what is beside the spec.

    Args:
        spec: with its fidelity.
        hooks: of the caller, `deliberate.api.loop_builder.Hooks`.
        chooser: how logits become tokens; None for plain greedy decoding.

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
    if fidelity is Fidelity.CERTIFIED:
        _check_certified(model, hooks, chooser)


def certified_conditions(model: ModelView, spec: DecodingSpec) -> dict[str, Any]:
    """What is known of a generation, by the names of a certificate's conditions."""
    pending = spec.max_pending
    return {
        "kv_mode": str(spec.kv_mode),
        "max_pending": model.exit_config.max_pending if pending is None else pending,
    }


def _check_certified(model: ModelView, hooks: Any, chooser: TokenChooser | None) -> None:
    if hooks.monitor is not None:
        reason = "the certificate's own drift monitor takes its place"
        raise refused("monitor", hooks.monitor, Fidelity.CERTIFIED, reason)
    if chooser is not None and not chooser.plain:
        raise DeliberateError(
            f"{chooser.describe()} with fidelity 'certified': certificates are of greedy decoding "
            "without logits processors; pass do_sample=False and none of those, or use 'exact'"
        )
    plan = getattr(model.backbone, "plan", None)
    if plan is not None and not plan.native:
        stored = sorted({str(one) for one in (*plan.layers, plan.head)} - {"native"})
        raise DeliberateError(
            f"{' and '.join(stored)} weights with fidelity 'certified': certificates are of the "
            "weights as they were loaded; load the model without weights=, or use 'exact'"
        )
