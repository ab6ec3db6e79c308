"""The same model under another calibration, without a second copy of its weights."""

from __future__ import annotations

from pathlib import Path

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibration import Calibration
from deliberate.policies.guarantees import Guarantees

# Where torch keeps what a module holds: shared by a plain copy, so that a change would be, too.
_HELD = ("_modules", "_parameters", "_buffers")


def with_calibration(
    model: AdaptiveModel, calibration: Calibration | str | Path | None
) -> AdaptiveModel:
    """A second model of the same weights, exits and executors, with another calibration.

    What is learnt while decoding under guarantees (drift, lengths, speeds) begins anew; `fidelity`
    may be set for each of the two. Weights that are changed in place change for both.

    Args:
        calibration: what `deliberate calibrate` wrote, or its folder; None for none.

    Raises:
        DeliberateError: the calibration belongs to other weights or exits.
    """
    twin = object.__new__(type(model))
    twin.__dict__.update(model.__dict__)
    for name in _HELD:
        twin.__dict__[name] = dict(model.__dict__[name])
    twin.guarantees = Guarantees()
    twin._calibration = None
    twin.set_calibration(calibration)
    return twin
