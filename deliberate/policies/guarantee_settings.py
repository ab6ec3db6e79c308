"""Settings that contradict a guarantee are refused by name, never ignored.

A certificate was tested with one way of decoding: greedy, with deferred layers, with the
certificate's own thresholds, with weights as they were hashed. A budget's costs are those of
deferred layers, and its controller sets the thresholds.
"""

from __future__ import annotations

from typing import Any

from deliberate.config import Fidelity, KVMode, as_kv_mode
from deliberate.engine.sampler import TokenChooser
from deliberate.utils.errors import DeliberateError

_CONTROLLED = ("thresholds", "lambda_", "exit_policy", "decide")


def check_guarantee_settings(
    decoding: Any, fidelity: Fidelity, chooser: TokenChooser | None
) -> None:
    """Raises where a setting cannot be obeyed together with the fidelity's guarantee.

    Args:
        decoding: the settings of a generation, `deliberate.api.generation.AdaptiveDecoding`.
        chooser: how logits become tokens; None for plain greedy decoding.

    Raises:
        DeliberateError: names the setting and what can be used instead.
    """
    if fidelity is not Fidelity.CERTIFIED:
        for name in ("epsilon", "delta"):
            value = getattr(decoding, name)
            if value is not None:
                raise DeliberateError(
                    f"{name}={value!r} with fidelity {str(fidelity)!r}: it needs 'certified'"
                )
    if fidelity not in (Fidelity.CERTIFIED, Fidelity.BUDGET):
        return
    for name in _CONTROLLED:
        if getattr(decoding, name) is not None:
            raise _refused(decoding, name, fidelity, "its calibration decides which tokens exit")
    kv_mode = as_kv_mode(decoding.kv_mode)
    if kv_mode is not KVMode.DEFER:
        raise _refused(decoding, "kv_mode", fidelity, "its calibration is of kv_mode 'defer'")
    if decoding.model.gate is not None and not decoding.gate:
        reason = "its calibration is of the model with its deliberation gate"
        raise _refused(decoding, "gate", fidelity, reason)
    if fidelity is Fidelity.CERTIFIED:
        _check_certified(decoding, chooser)


def certified_conditions(decoding: Any) -> dict[str, Any]:
    """What is known of a generation, by the names of a certificate's conditions."""
    return {
        "kv_mode": str(as_kv_mode(decoding.kv_mode)),
        "max_pending": decoding.model.exit_config.max_pending,
    }


def _check_certified(decoding: Any, chooser: TokenChooser | None) -> None:
    if decoding.monitor is not None:
        reason = "the certificate's own drift monitor takes its place"
        raise _refused(decoding, "monitor", Fidelity.CERTIFIED, reason)
    if chooser is not None and not chooser.plain:
        raise DeliberateError(
            f"{chooser.describe()} with fidelity 'certified': certificates are of greedy decoding "
            "without logits processors; pass do_sample=False and none of those, or use 'exact'"
        )
    plan = getattr(decoding.model.backbone, "plan", None)
    if plan is not None and not plan.native:
        stored = sorted({str(one) for one in (*plan.layers, plan.head)} - {"native"})
        raise DeliberateError(
            f"{' and '.join(stored)} weights with fidelity 'certified': certificates are of the "
            "weights as they were loaded; load the model without weights=, or use 'exact'"
        )


def _refused(decoding: Any, name: str, fidelity: Fidelity, reason: str) -> DeliberateError:
    value = getattr(decoding, name)
    shown = repr(value if isinstance(value, str | bool | int | float) else type(value).__name__)
    if isinstance(value, list | tuple):
        shown = repr(list(value))
    return DeliberateError(
        f"{name}={shown} with fidelity {str(fidelity)!r}: {reason}; leave {name} out, or use "
        "fidelity 'threshold'"
    )
