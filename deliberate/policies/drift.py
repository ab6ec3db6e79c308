"""An alarm for the day when a certificate no longer describes the traffic.

Tokens that exited early are deferred, and a later pass shows whether full depth agrees with them.
Each answer's share of disagreeing tokens is a bounded observation; the monitor bets that its mean
exceeds the limit. With a Shiryaev-Roberts sum of these bets (an e-detector: Shin, Ramdas and
Rinaldo, 2022) the traffic may change at any time: after a long good past the alarm is as quick as
on the first day.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deliberate.calibration.certificate import Certificate
from deliberate.utils.errors import DeliberateError

RUN_LENGTH = 10_000
_BETS = 10
# Bets range from small excesses over the limit to half of the most that may be bet.
_LEAST_BET, _MOST_SHARE = 0.25, 0.5


@dataclass(frozen=True)
class DriftState:
    """What the monitor has seen: answers, tokens, disagreements, evidence, and the alarm."""

    answers: int
    tokens: int
    disagreements: int
    evidence: float
    alarm: bool


@dataclass
class DriftMonitor:
    """Watches whether answers still disagree with full depth as rarely as certified.

    While the expected share of disagreeing tokens in the next answer, given all before, is at most
    `limit`, the mean number of answers to a false alarm is at least `run_length`.

    Attributes:
        limit: share of disagreeing tokens per answer, in (0, 1).
        run_length: answers between false alarms on average, at least.
    """

    limit: float
    run_length: float = RUN_LENGTH
    answers: int = field(default=0, init=False)
    tokens: int = field(default=0, init=False)
    disagreements: int = field(default=0, init=False)
    alarm: bool = field(default=False, init=False)
    _sums: NDArray[np.float64] = field(init=False, repr=False)
    _bets: NDArray[np.float64] = field(init=False, repr=False)
    _lock: threading.Lock = field(
        default_factory=threading.Lock, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not 0.0 < self.limit < 1.0:
            raise DeliberateError(f"limit {self.limit} must lie in (0, 1)")
        if not 1.0 < self.run_length < float("inf"):
            raise DeliberateError(f"run_length {self.run_length} must be finite and above 1")
        most = max(_MOST_SHARE / self.limit, 2 * _LEAST_BET)
        self._bets = np.minimum(np.geomspace(_LEAST_BET, most, _BETS), 1.0 / self.limit)
        self._sums = np.zeros(_BETS)

    @classmethod
    def for_certificate(
        cls, certificate: Certificate, run_length: float = RUN_LENGTH
    ) -> DriftMonitor:
        """The monitor of a certificate's traffic."""
        return cls(certificate.disagreement, run_length)

    def update(self, disagreements: int, tokens: int) -> DriftState:
        """Counts one answer's verified tokens; an answer without any says nothing.

        Raises:
            DeliberateError: more disagreements than tokens, or negative counts.
        """
        if not 0 <= disagreements <= tokens:
            raise DeliberateError(
                f"{disagreements} disagreements in {tokens} verified tokens: counts from 0 up, "
                "and no more disagreements than tokens"
            )
        if not tokens:
            return self.state
        share = disagreements / tokens
        with self._lock:
            # Every answer starts a bet of its own, in case the traffic changed right there.
            self._sums = (1.0 + self._sums) * (1.0 + self._bets * (share - self.limit))
            self.answers += 1
            self.tokens += tokens
            self.disagreements += disagreements
            self.alarm = self.alarm or self.evidence >= self.run_length
            return self.state

    @property
    def evidence(self) -> float:
        """Mean of the bets' sums: the alarm is raised when it reaches `run_length`."""
        return float(self._sums.mean())

    @property
    def state(self) -> DriftState:
        """A snapshot."""
        return DriftState(self.answers, self.tokens, self.disagreements, self.evidence, self.alarm)

    def snapshot(self) -> dict[str, Any]:
        """All that it has seen, JSON-ready; `restore` takes it up."""
        return {
            "answers": self.answers,
            "tokens": self.tokens,
            "disagreements": self.disagreements,
            "alarm": self.alarm,
            "sums": self._sums.tolist(),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Goes on from a `snapshot` of a monitor with the same limit.

        Raises:
            DeliberateError: it is none.
        """
        try:
            counts = [int(snapshot[name]) for name in ("answers", "tokens", "disagreements")]
            alarm, sums = bool(snapshot["alarm"]), np.asarray(snapshot["sums"], dtype=np.float64)
        except (KeyError, TypeError, ValueError):
            raise DeliberateError("this is no snapshot of a drift monitor") from None
        if sums.shape != self._sums.shape or min(counts) < 0 or not np.isfinite(sums).all():
            raise DeliberateError("this snapshot is of another drift monitor")
        self.answers, self.tokens, self.disagreements = counts
        self.alarm, self._sums = alarm, sums

    def reset(self) -> None:
        """Forgets everything, after the alarm has been dealt with."""
        self.answers = self.tokens = self.disagreements = 0
        self.alarm = False
        self._sums = np.zeros(_BETS)
