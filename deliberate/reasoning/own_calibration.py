"""Stop policies completed by what a model brings: its calibration of chains, and its conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deliberate.reasoning.calibrated_bands import load_calibration
from deliberate.reasoning.chain_calibration import FILE_NAME
from deliberate.utils.errors import DeliberateError

Policies = Mapping[str, Mapping[str, Any] | None]


def own_calibration(folder: str | Path, weights: str, exits: str) -> Path | None:
    """The calibration of chains in a model's folder; None: there is none.

    Args:
        folder: empty: the model has none.
        weights, exits: hashes of the model's.

    Raises:
        DeliberateError: the file's certificates are of other weights or exits.
    """
    path = Path(folder) / FILE_NAME
    if not str(folder) or not path.is_file():
        return None
    for one in load_calibration(path).certificates:
        one.check(weights=weights, exits=exits)
    return path


def completed(
    policies: Policies,
    folder: str | Path,
    fingerprints: Callable[[], tuple[str, str]],
    conditions: Mapping[str, Any],
) -> Policies:
    """The policies; bands that name no calibration or conditions have those of the model.

    Args:
        policies: settings by name.
        folder: of the model.
        fingerprints: hashes of its weights and exits.
        conditions: of the request.

    Raises:
        DeliberateError: bands without a calibration, and the model has none.
    """
    if "bands" not in policies:
        return policies
    given, (weights, exits) = dict(policies["bands"] or {}), fingerprints()
    if given.get("calibration") is None:
        given["calibration"] = own_calibration(folder, weights, exits)
        if given["calibration"] is None:
            raise DeliberateError(
                "bands need calibration=: this model has none of its own; give the folder that "
                "`deliberate bench chains ... out=FOLDER` wrote for it"
            )
    if given.get("epsilon") is not None and given.get("conditions") is None:
        given["conditions"] = dict(conditions) | {"weights": weights, "exits": exits}
    return {**policies, "bands": given}
