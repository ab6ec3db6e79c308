"""How likely an answer along the chain is the one that the whole chain gives.

Recorded chains tell, for every probe, whether its answer is the whole chain's. Isotonic regression
on the probe's confidence, one curve for each number of equal answers in a row, turns that into a
probability. A rule that stops from a probability on is indexed by this one number, which
`deliberate.reasoning.chain_certificates` certifies.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deliberate.calibration.calibrator import Calibrator, fit_isotonic
from deliberate.calibration.certificate import Certificate
from deliberate.reasoning.chain_walks import LookPlaces, Walk
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text
from deliberate.utils.hashing import json_sha256
from deliberate.utils.json_files import read_json

FILE_NAME = "chain_calibration.json"
STREAKS = 3
"""Curves: one answer, two equal ones in a row, three and more."""


@dataclass(frozen=True)
class ChainCalibration:
    """Curves for one model's chains, and certificates of stopping by them.

    Attributes:
        places: where chains were looked at.
        curves: isotonic, confidence -> probability, by the number of equal answers in a row; the
            last one holds for more.
        chains: that they were fitted on.
        certificates: their `lambda_` is the certified probability to stop from.
    """

    places: LookPlaces
    curves: tuple[Calibrator, ...]
    chains: int
    certificates: tuple[Certificate, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.curves:
            raise DeliberateError("a chain calibration needs at least one curve")

    def probability(self, confidence: float, streak: int) -> float:
        """That an answer is the whole chain's; 0 for an empty one (streak 0)."""
        if streak < 1:
            return 0.0
        curve = self.curves[min(streak, len(self.curves)) - 1]
        return float(curve(confidence))

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of places and curves: what a certificate is for."""
        return json_sha256(
            {"places": asdict(self.places), "curves": [one.to_dict() for one in self.curves]}
        )

    def certificate(self, epsilon: float | None, delta: float | None) -> Certificate:
        """The certificate that stops earliest among those that meet epsilon and delta.

        Raises:
            DeliberateError: there is none.
        """
        fitting = [
            one
            for one in self.certificates
            if (epsilon is None or one.epsilon <= epsilon) and (delta is None or one.delta <= delta)
        ]
        if not fitting:
            known = ", ".join(f"({one.epsilon:g}, {one.delta:g})" for one in self.certificates)
            raise DeliberateError(
                f"no certificate of chains for epsilon={epsilon}, delta={delta}: there are "
                f"{known or 'none'}; calibrate with these"
            )
        return min(fitting, key=lambda one: one.lambda_)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        return {
            "places": asdict(self.places),
            "curves": [one.to_dict() for one in self.curves],
            "chains": self.chains,
            "certificates": [one.to_dict() for one in self.certificates],
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ChainCalibration:
        """Reads `to_dict`'s form.

        Raises:
            DeliberateError: a missing or unknown key, or a certificate of other curves.
        """
        known = {"places", "curves", "chains", "certificates"}
        if not isinstance(raw, Mapping) or set(raw) != known:
            raise DeliberateError(f"a chain calibration has the keys {', '.join(sorted(known))}")
        made = cls(
            LookPlaces(**raw["places"]),
            tuple(Calibrator.from_dict(one) for one in raw["curves"]),
            int(raw["chains"]),
            tuple(Certificate.from_dict(one) for one in raw["certificates"]),
        )
        for one in made.certificates:
            one.check(policy=made.sha256)
            one.check_numbers()
        return made

    def save(self, folder: str | Path) -> Path:
        """Writes `FILE_NAME` into a folder."""
        path = Path(folder) / FILE_NAME
        write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> ChainCalibration:
        """Reads a file, or `FILE_NAME` of a folder.

        Raises:
            DeliberateError: a missing, damaged or foreign file.
        """
        path = Path(path).expanduser()
        path = path / FILE_NAME if path.is_dir() else path
        try:
            return cls.from_dict(read_json(path))
        except (TypeError, KeyError, ValueError) as error:
            raise DeliberateError(f"{path}: no chain calibration ({error})") from None
        except DeliberateError as error:
            raise DeliberateError(f"{path}: {error}") from None


def fit_curves(walks: Sequence[Walk], places: LookPlaces) -> ChainCalibration:
    """Fits the curves; a number of equal answers that never occurs takes the curve before it.

    Raises:
        DeliberateError: no probe gave an answer.
    """
    curves: list[Calibrator] = []
    looks = [look for one in walks for look in one.looks]
    for streak in range(1, STREAKS + 1):
        found = [k for k in looks if min(k.streak, STREAKS) == streak]
        if found:
            scores = np.asarray([look.confidence for look in found], dtype=np.float64)
            same = np.asarray([look.same for look in found], dtype=bool)
            curves.append(fit_isotonic(scores, same))
        elif curves:
            curves.append(curves[-1])
    if not curves:
        raise DeliberateError(
            "no probe of these chains gave an answer at the places of the rule: take a smaller "
            "chunk, other boundaries, or chains that were recorded with probes there"
        )
    return ChainCalibration(places, tuple(curves), len(walks))
