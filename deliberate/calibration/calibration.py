"""Everything that a calibration run leaves behind, in one file beside the model.

`calibration.json` holds a calibrator per exit and measure, the policy table, the certificates, what
was found on held-out problems, and the hashes of what it all belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deliberate.calibration.calibrator import Calibrator, fit_calibrator
from deliberate.calibration.certificate import Certificate, Risk
from deliberate.calibration.exit_traces import Recording
from deliberate.calibration.gate_threshold import GateRounds
from deliberate.calibration.reliability import Reliability, reliability
from deliberate.calibration.stopping_policy import PolicyTable, StepCosts, fit_policy
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hashing import json_sha256
from deliberate.utils.json_files import build_from, read_json

CALIBRATION_NAME = "calibration.json"
FORMAT_VERSION = 1
# A group with fewer tokens says nothing of an error of a percent.
_LEAST_GROUP = 200


@dataclass(frozen=True)
class Calibration:
    """A model's calibrators, policy and certificates.

    Attributes:
        layers, num_layers, measure: of the exits.
        calibrators: one per exit, for `measure`.
        policy: thresholds by lambda.
        weights, exits: SHA-256 of the base weights and of the exits
        (`deliberate.calibration.fingerprint`).
        data: SHA-256 of the problems.
        others: calibrators of further measures that could be fitted, by name.
        certificates: what is guaranteed of which lambda.
        meta: task, counts, date, versions; what held-out problems showed. JSON-ready.
    """

    layers: tuple[int, ...]
    num_layers: int
    measure: str
    calibrators: tuple[Calibrator, ...]
    policy: PolicyTable
    weights: str
    exits: str
    data: str
    others: Mapping[str, tuple[Calibrator, ...]] = field(default_factory=dict)
    certificates: tuple[Certificate, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        exits = len(self.layers)
        for name, found in (
            ("calibrators", len(self.calibrators)),
            ("policy thresholds", len(self.policy.rows[0])),
            *((f"calibrators of {name}", len(each)) for name, each in self.others.items()),
            *(("thresholds of a certificate", len(c.thresholds)) for c in self.certificates),
        ):
            if found != exits:
                raise DeliberateError(f"calibration: {found} {name} for {exits} exits: one each")

    def probability(self, exit_index: int, scores: ArrayLike) -> NDArray[np.float64]:
        """P(the token equals the full-depth token) at an exit, for raw scores of any shape."""
        return self.calibrators[exit_index](scores)

    def thresholds(self, lambda_: float) -> tuple[float, ...]:
        """Least raw scores to exit with, ``[K]``, at a lambda per expected disagreement."""
        return self.policy.thresholds(lambda_)

    def gate_threshold(self, lambda_: float) -> float | None:
        """The deliberation gate's `think_below` at a lambda; None: it keeps its own."""
        return self.policy.gate_threshold(lambda_)

    def check(self, *, weights: str | None = None, exits: str | None = None) -> None:
        """Raises unless the calibration belongs to these weights and exits.

        Raises:
            DeliberateError: names what differs.
        """
        for name, stated, found in (
            ("weights", self.weights, weights),
            ("exits", self.exits, exits),
        ):
            if found is not None and found != stated:
                raise DeliberateError(
                    f"the calibration is for other {name} ({stated[:12]}... stated, "
                    f"{found[:12]}... loaded): load what it was made with (weights= too), or run "
                    "`deliberate calibrate` on this model"
                )

    def check_certificate(self, certificate: Certificate) -> None:
        """Raises unless a certificate is one of this calibration, and says what was tested.

        A file that was edited afterwards can keep its hashes and carry other thresholds or another
        epsilon; what follows from the rest of the file is therefore computed again.

        Raises:
            DeliberateError: names the first thing that differs.
        """
        certificate.check(weights=self.weights, exits=self.exits, data=self.data)
        certificate.check(policy=self.policy.sha256)
        thresholds = self.policy.thresholds(certificate.lambda_)
        if certificate.thresholds != thresholds:
            raise DeliberateError(
                f"the certificate has thresholds {_listed(certificate.thresholds)}, but its policy "
                f"has {_listed(thresholds)} at lambda {certificate.lambda_:.6g}: the file was "
                "edited; calibrate again"
            )
        gate_thresholds = {self.policy.gate_threshold(certificate.lambda_)}
        if certificate.risk is Risk.TOKEN:
            gate_thresholds = {None}  # agreement was recorded with the gate's own
        if certificate.gate_threshold not in gate_thresholds:
            raise DeliberateError(
                f"the certificate has gate threshold {certificate.gate_threshold}, but its "
                f"policy has {self.policy.gate_threshold(certificate.lambda_)} at lambda "
                f"{certificate.lambda_:.6g}: the file was edited; calibrate again"
            )
        certificate.check_numbers()

    def certificate(
        self, risk: Risk | str, *, epsilon: float | None = None, delta: float | None = None
    ) -> Certificate:
        """The certificate of this risk: at most `epsilon` and `delta` where given, the cheapest.

        Raises:
            DeliberateError: there is none; the message lists those that exist.
        """
        kept = [
            certificate
            for certificate in self.certificates
            if certificate.risk == risk
            and (epsilon is None or certificate.epsilon <= epsilon)
            and (delta is None or certificate.delta <= delta)
        ]
        if kept:
            return min(kept, key=lambda certificate: certificate.lambda_)
        wanted = f"risk {risk}"
        wanted += f", epsilon <= {epsilon:g}" if epsilon is not None else ""
        wanted += f", delta <= {delta:g}" if delta is not None else ""
        there = "; ".join(
            f"{c.risk} (epsilon {c.epsilon:g}, delta {c.delta:g})" for c in self.certificates
        )
        raise DeliberateError(
            f"no certificate for {wanted}; there is {there or 'none'}: "
            f"{'ask for that, or ' if there else ''}run `deliberate calibrate`"
        )

    def with_certificates(self, *certificates: Certificate) -> Calibration:
        """The same calibration with these certificates instead of its own."""
        return replace(self, certificates=tuple(certificates))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form with a hash of itself; `from_dict` reads it back."""
        whole = self._contents()
        return whole | {"sha256": _digest(whole)}

    def _contents(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "layers": list(self.layers),
            "num_layers": self.num_layers,
            "measure": str(self.measure),
            "weights": self.weights,
            "exits": self.exits,
            "data": self.data,
            "calibrators": [calibrator.to_dict() for calibrator in self.calibrators],
            "others": {
                name: [calibrator.to_dict() for calibrator in each]
                for name, each in self.others.items()
            },
            "policy": self.policy.to_dict(),
            "certificates": [certificate.to_dict() for certificate in self.certificates],
            "meta": dict(self.meta),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Calibration:
        """Reads `to_dict`'s form.

        Raises:
            DeliberateError: another format, a missing key or a value that cannot be.
        """
        if not isinstance(raw, Mapping) or "format_version" not in raw:
            raise DeliberateError("not a calibration: it has no format_version")
        if raw["format_version"] != FORMAT_VERSION:
            raise DeliberateError(
                f"calibration has format_version {raw['format_version']}; this release reads "
                f"{FORMAT_VERSION}"
            )
        given = {k: v for k, v in raw.items() if k not in ("format_version", "sha256")}
        made = build_from(cls, given, "calibration")
        # Files of earlier releases have no hash of their contents.
        if "sha256" in raw and raw["sha256"] != _digest(raw):
            raise DeliberateError(
                "calibration differs from its own sha256: it was edited or damaged after it was "
                "written; calibrate again"
            )
        return made

    def save(self, path: str | Path) -> None:
        """Writes JSON that appears whole or not at all."""
        from deliberate.utils.files import write_text

        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        write_text(Path(path), text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote: the file, or the folder that holds it.

        Raises:
            DeliberateError: a missing, damaged or foreign file.
        """
        source = Path(path)
        if source.is_dir():
            source = source / CALIBRATION_NAME
        if not source.is_file():
            raise DeliberateError(f"{source} is missing: write it with `deliberate calibrate`")
        raw = read_json(source)
        try:
            return cls.from_dict(raw)
        except DeliberateError as error:
            raise DeliberateError(f"{source}: {error}") from None


def _digest(contents: Mapping[str, Any]) -> str:
    """Hash of what a file holds but for the hash itself, as it reads after a way through JSON."""
    kept = {name: value for name, value in contents.items() if name != "sha256"}
    return json_sha256(json.loads(json.dumps(kept)))


def _listed(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values) + "]"


def fit_calibrators(recording: Recording, *, seed: int = 0) -> tuple[Calibrator, ...]:
    """One calibrator per exit for the recording's measure.

    Raises:
        DeliberateError: too little data at an exit, named.
    """
    return tuple(
        fit_calibrator(
            recording.scores[:, k],
            recording.agrees[:, k],
            recording.sequence,
            name=f"exit after layer {layer}",
            seed=seed,
        )
        for k, layer in enumerate(recording.layers)
    )


def fit_calibration(
    recording: Recording,
    steps: StepCosts,
    *,
    weights: str = "",
    exits: str = "",
    data: str = "",
    meta: Mapping[str, Any] | None = None,
    gate_rounds: GateRounds | None = None,
    pays: Callable[[Sequence[float]], Sequence[bool]] | None = None,
    seed: int = 0,
) -> Calibration:
    """Calibrators for every recorded measure, and the policy for the recording's own.

    Args:
        recording: problems that certify nothing: a certificate needs others.
        steps: costs of going on.
        weights, exits, data, meta: see `Calibration`.
        gate_rounds, pays: what the deliberation gate did to reference texts, and which exits pay;
            see `fit_policy`.
        seed: of the folds that choose between isotonic and logistic.

    Raises:
        DeliberateError: too little data at an exit, named.
    """
    calibrators = fit_calibrators(recording, seed=seed)
    others = {
        name: fit_calibrators(recording.with_measure(name), seed=seed)
        for name in sorted(recording.others)
    }
    return Calibration(
        layers=recording.layers,
        num_layers=recording.num_layers,
        measure=recording.measure,
        calibrators=calibrators,
        policy=fit_policy(recording, calibrators, steps, gate_rounds=gate_rounds, pays=pays),
        weights=weights,
        exits=exits,
        data=data,
        others=others,
        meta=dict(meta or {}),
    )


def assess(
    calibration: Calibration, recording: Recording
) -> list[tuple[Reliability, dict[str, Reliability]]]:
    """Reliability of every exit on a recording: overall, and by group where groups are large."""
    groups = recording.token_groups
    found = []
    for k in range(recording.num_exits):
        p, agrees = calibration.probability(k, recording.scores[:, k]), recording.agrees[:, k]
        by_group = {
            str(name): reliability(p[groups == name], agrees[groups == name])
            for name in np.unique(groups)
            if name and int((groups == name).sum()) >= _LEAST_GROUP
        }
        found.append((reliability(p, agrees), by_group))
    return found
