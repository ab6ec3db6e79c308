"""When to exit: optimal stopping, with one lambda for the whole family of policies.

At exit k a token may exit, at an expected loss of ``lambda * (1 - p_k)`` seconds, or continue for
``onward[k]`` seconds to the next exit's reading. Full depth disagrees with nothing, so by backward
induction (Bellman), with V at full depth = 0,

    V_k(p) = min(lambda * (1 - p), onward[k] + E[V_{k+1} | p]).

Calibrated probabilities never fall with the raw score, so the rule is one least score per exit.
Lambda, in seconds per expected disagreement, indexes all these rules from the fastest (every token
exits at the first exit) to dense.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deliberate.calibration.calibrator import Calibrator
from deliberate.calibration.cuts import cuts
from deliberate.calibration.exit_traces import Recording, first_true
from deliberate.calibration.gate_threshold import LEAST_UNCERTAIN_TOKENS, GateRounds
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hashing import json_sha256
from deliberate.utils.json_files import OrInfinity, build_from, file_key

LAMBDAS_PER_DECADE = 8


@dataclass(frozen=True)
class StepCosts:
    """What deciding one token costs, in `unit` (seconds, or layers where none were measured).

    Attributes:
        first: what every token costs whatever is decided: from its start to the first exit's
            reading, and where deferred tokens are run in a later pass, its cost in that pass.
        onward: ``[K]``, from exit k's reading to that of the next exit, or to full depth's token.
            Where a token that exited is deferred, less its cost in the later pass.
        unit: what the numbers count.
        round: one round of the deliberation gate, where the model has one.
    """

    first: float
    onward: tuple[float, ...]
    unit: str = "seconds"
    round: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "onward", tuple(float(cost) for cost in self.onward))
        if not self.onward:
            raise DeliberateError("costs: give the cost of going on from each exit")
        for cost in (self.first, *self.onward, self.round):
            if not (math.isfinite(cost) and cost >= 0):
                raise DeliberateError(f"cost {cost} must be a finite number of {self.unit} >= 0")
        if sum(self.onward) <= 0:
            raise DeliberateError("costs: going on from the exits costs nothing, so none can pay")

    @classmethod
    def in_layers(cls, layers: Sequence[int], num_layers: int) -> StepCosts:
        """Every decoder layer and every round costs 1, a reading nothing: exits after `layers`."""
        depths = [*layers, num_layers]
        onward = tuple(float(b - a) for a, b in pairwise(depths))
        return cls(float(depths[0]), onward, "layers", round=1.0)

    @property
    def dense(self) -> float:
        """Cost of a token that goes to full depth and is evaluated at every exit."""
        return self.first + sum(self.onward)

    def by_exit(self) -> NDArray[np.float64]:
        """Cost of a token that exits at each exit or at full depth, ``[K + 1]``."""
        return np.cumsum([self.first, *self.onward])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        return {
            "first": self.first,
            "onward": list(self.onward),
            "unit": self.unit,
            "round": self.round,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> StepCosts:
        """Reads `to_dict`'s form; tables of earlier releases have no `round`."""
        return build_from(cls, raw, "step costs")


@dataclass(frozen=True)
class PolicyTable:
    """Thresholds on the raw score for every lambda.

    Attributes:
        lambdas: rising; cost units per expected disagreement. The last is infinite: dense.
        rows: thresholds per lambda, ``[K]`` each, none falling as lambda rises; infinity =
            no token exits there.
        risks: expected share of disagreeing tokens of each row, by the calibrated probabilities of
            the recording that it was fitted on.
        shares: ``[K + 1]`` per row, share of that recording's tokens that exit at each exit and at
            full depth.
        steps: the costs of going on that the table was made for.
        gate_thresholds: the deliberation gate's `think_below` of each row, never falling as lambda
            rises; empty where the gate keeps its own.
        rounds: of the gate per token, expected at each gate threshold.
    """

    lambdas: Annotated[tuple[OrInfinity, ...], file_key("prices")]
    rows: tuple[tuple[OrInfinity, ...], ...]
    risks: tuple[float, ...]
    shares: tuple[tuple[float, ...], ...]
    steps: StepCosts
    gate_thresholds: Annotated[tuple[float, ...], file_key("bands")] = ()
    rounds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        sizes = {len(self.lambdas), len(self.rows), len(self.risks), len(self.shares)}
        if sizes != {len(self.lambdas)} or not self.lambdas:
            raise DeliberateError("policy table: one row, risk and share per lambda are needed")
        exits = len(self.steps.onward)
        for row, share in zip(self.rows, self.shares, strict=True):
            if len(row) != exits or len(share) != exits + 1:
                raise DeliberateError(
                    f"policy table: {exits} exits need rows of {exits} thresholds and "
                    f"{exits + 1} shares, got {len(row)} and {len(share)}"
                )
        if list(self.lambdas) != sorted(set(self.lambdas)) or self.lambdas[0] < 0:
            raise DeliberateError("policy table: lambdas must rise from 0 or more")
        if self.gate_thresholds:
            if {len(self.gate_thresholds), len(self.rounds)} != sizes:
                raise DeliberateError("policy table: a gate threshold and its rounds per lambda")
            rising = list(self.gate_thresholds) == sorted(self.gate_thresholds)
            if not rising or not 0 <= self.gate_thresholds[0] < math.inf:
                raise DeliberateError("policy table: gate thresholds must not fall as lambda rises")
        for before, after in pairwise(self.rows):
            if any(b > a for b, a in zip(before, after, strict=True)):
                raise DeliberateError("policy table: thresholds must not fall as lambda rises")

    def thresholds(self, lambda_: float) -> tuple[float, ...]:
        """One threshold per exit at this lambda: the row of the table's next lambda from it on.

        Between two lambdas of the table the larger, more careful one counts.
        """
        return self.rows[self.row(lambda_)]

    def gate_threshold(self, lambda_: float) -> float | None:
        """The gate's `think_below` at this lambda, of the same row; None: it keeps its own."""
        return self.gate_thresholds[self.row(lambda_)] if self.gate_thresholds else None

    def row(self, lambda_: float) -> int:
        """Number of the row that counts at this lambda."""
        if math.isnan(lambda_) or lambda_ < 0:
            raise DeliberateError(f"lambda {lambda_} must be 0 or more {self.steps.unit}")
        return min(bisect.bisect_left(self.lambdas, lambda_), len(self.rows) - 1)

    def costs(self, steps: StepCosts | None = None) -> tuple[float, ...]:
        """Expected cost per token of each row, at other costs than its own where they are given
        (another machine's): the shares of tokens stay what they are."""
        steps = steps or self.steps
        by_exit = steps.by_exit()
        rounds = self.rounds or (0.0,) * len(self.rows)
        return tuple(
            float(np.dot(share, by_exit)) + steps.round * more
            for share, more in zip(self.shares, rounds, strict=True)
        )

    def lambda_for_risk(self, risk: float) -> float:
        """The least lambda from which on every row expects at most this share of disagreements.

        An estimate; only a certificate guarantees a risk.
        """
        kept = len(self.risks)
        while kept and self.risks[kept - 1] <= risk:
            kept -= 1
        return self.lambdas[min(kept, len(self.lambdas) - 1)]

    @property
    def sha256(self) -> str:
        """Hash of lambdas, thresholds and gate thresholds."""
        whole = self.to_dict()
        kept = ("prices", "rows", *(["bands"] if self.gate_thresholds else []))
        return json_sha256({name: whole[name] for name in kept})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, infinity as null; `from_dict` reads it back."""
        raw: dict[str, Any] = {
            "prices": [_to_json(lambda_) for lambda_ in self.lambdas],
            "rows": [[_to_json(value) for value in row] for row in self.rows],
            "risks": list(self.risks),
            "shares": [list(share) for share in self.shares],
            "steps": self.steps.to_dict(),
        }
        if self.gate_thresholds:
            raw |= {"bands": list(self.gate_thresholds), "rounds": list(self.rounds)}
        return raw

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> PolicyTable:
        """Reads `to_dict`'s form.

        Raises:
            DeliberateError: a missing or unknown key, or a value that cannot be.
        """
        return build_from(cls, raw, "policy table")


def backward_induction(
    probabilities: NDArray[np.float64], onward: Sequence[float], lambda_: float
) -> tuple[float, ...]:
    """The least probability to exit with at each exit, by backward induction over a sample.

    Args:
        probabilities: float64 ``[T, K]``, calibrated.
        onward: ``[K]`` cost of going on.
        lambda_: cost of one expected disagreement.

    Returns:
        ``[K]``, infinity where to continue is better for every token. E[V_{k+1} | p] is taken as
        the mean over the sample on either side of the threshold.
    """
    going_on = np.zeros(len(probabilities))
    levels: list[float] = []
    for p, cost in zip(probabilities.T[::-1], reversed(onward), strict=True):
        exiting, continuing = lambda_ * (1.0 - p), cost + going_on
        level = best_threshold(p, exiting, continuing)
        going_on = np.where(p >= level, exiting, continuing)
        levels.append(level)
    return tuple(reversed(levels))


def best_threshold(
    scores: NDArray[np.floating[Any]],
    exiting: NDArray[np.float64],
    continuing: NDArray[np.float64],
) -> float:
    """The threshold t of least total: of `exiting` where score >= t, else of `continuing`.

    Args:
        scores, exiting, continuing: ``[T]``; what each token costs either way.

    Returns:
        A value of `scores`, 0 where every token exits (scores are confidences from 0 up), or
        infinity where none does. Of equally good thresholds the highest.
    """
    possible = cuts(scores, continuing - exiting)
    if not len(scores) or possible.totals.max() <= 0.0:
        return math.inf
    best = int(possible.totals.argmax())
    return 0.0 if best == len(possible.scores) - 1 else float(possible.scores[best])


def fit_policy(
    recording: Recording,
    calibrators: Sequence[Calibrator],
    steps: StepCosts,
    *,
    lambdas: Sequence[float] | None = None,
    gate_rounds: GateRounds | None = None,
    pays: Callable[[Sequence[float]], Sequence[bool]] | None = None,
) -> PolicyTable:
    """Thresholds for every lambda, by backward induction over the tokens of a recording.

    Backward induction takes p_k as all there is to know at exit k, though the tokens that get
    there are those that did not exit before. Improving the thresholds further on the
    tokens that reach each exit was tried, and gained nothing on fresh problems.

    Args:
        recording: what the calibrators were fitted on, or more of its kind.
        calibrators: one per exit.
        steps: costs of going on.
        lambdas: rising; by default eight a decade, from one at which every token exits at the first
            exit to one at which none does.
        gate_rounds: what the deliberation gate did to reference texts; with it each lambda gets
            the gate threshold that is worth most at it.
        pays: told the share of the tokens evaluated at each exit that exit there, says of which
            exits the evaluation pays; one that does not at a lambda and all larger ones is not
            evaluated there.

    Raises:
        DeliberateError: an empty recording, numbers that do not match, or too few uncertain tokens.
    """
    if len(recording) == 0:
        raise DeliberateError("the recording is empty: a policy needs tokens to be fitted on")
    for what, found in (("calibrators", len(calibrators)), ("costs", len(steps.onward))):
        if found != recording.num_exits:
            raise DeliberateError(f"{found} {what} for {recording.num_exits} exits: one per exit")
    probabilities = np.stack(
        [calibrator(recording.scores[:, k]) for k, calibrator in enumerate(calibrators)], axis=1
    )
    grid = _lambda_grid(probabilities, steps) if lambdas is None else list(lambdas)
    rows: list[tuple[float, ...]] = []
    gate_thresholds: list[float] = []
    if gate_rounds is not None and gate_rounds.uncertain_tokens < LEAST_UNCERTAIN_TOKENS:
        raise DeliberateError(
            f"{gate_rounds.uncertain_tokens} uncertain tokens are too few for a gate threshold: "
            f"{LEAST_UNCERTAIN_TOKENS} are needed, use more problems"
        )
    floor = np.zeros(recording.num_exits)
    for lambda_ in grid:
        levels = backward_induction(probabilities, steps.onward, lambda_)
        row = [
            math.inf if math.isinf(level) else calibrator.least_score(level)
            for level, calibrator in zip(levels, calibrators, strict=True)
        ]
        # By the exact rule fewer tokens exit as lambda rises; noise must not undo that.
        floor = np.maximum(floor, row)
        rows.append(tuple(floor.tolist()))
    if pays is not None:
        rows = _without_losses(recording, rows, pays)
    grid, rows = [*grid, math.inf], [*rows, (math.inf,) * recording.num_exits]
    if gate_rounds is not None:
        gate_thresholds = [gate_rounds.gate_threshold(lambda_, steps.round) for lambda_ in grid]
    grid, rows, gate_thresholds = _without_repeats(grid, rows, gate_thresholds)
    risks, shares = _outcomes(recording, probabilities, rows)
    rounds = (
        []
        if gate_rounds is None
        else [gate_rounds.rounds_per_token(one) for one in gate_thresholds]
    )
    return PolicyTable(
        tuple(grid), tuple(rows), risks, shares, steps, tuple(gate_thresholds), tuple(rounds)
    )


def _without_losses(
    recording: Recording,
    rows: Sequence[tuple[float, ...]],
    pays: Callable[[Sequence[float]], Sequence[bool]],
) -> list[tuple[float, ...]]:
    """Rows without the exits that pay neither at their lambda nor at a larger one.

    From the largest on: thresholds must not fall as lambda rises, and more tokens get to a deep
    exit where the exits before it are strict.
    """
    kept = np.zeros(recording.num_exits, dtype=bool)
    found: list[tuple[float, ...]] = []
    for row in reversed(rows):
        kept |= np.asarray(pays(_exit_rates(recording, np.asarray(row))), dtype=bool)
        found.append(tuple(np.where(kept, row, math.inf).tolist()))
    return found[::-1]


def _exit_rates(recording: Recording, row: NDArray[np.float64]) -> list[float]:
    """Of the tokens that are evaluated at each exit, the share that exits there, ``[K]``."""
    left = first_true(recording.scores >= row)
    counts = np.bincount(left, minlength=recording.num_exits + 1)
    there = len(recording) - np.concatenate(([0], np.cumsum(counts[:-2])))
    return [float(n / m) if m else 0.0 for n, m in zip(counts[:-1], there, strict=True)]


def _lambda_grid(probabilities: NDArray[np.float64], steps: StepCosts) -> list[float]:
    """From a lambda at which it is right always to exit to one at which it never is."""
    least = min(cost for cost in steps.onward if cost > 0)
    doubt = 1.0 - probabilities
    low, high = least / float(doubt.max()), 2.0 * sum(steps.onward) / float(doubt.min())
    count = max(2, math.ceil(LAMBDAS_PER_DECADE * math.log10(high / low)) + 1)
    return [0.0, *(float(lambda_) for lambda_ in np.geomspace(low, high, count))]


def _without_repeats(
    grid: Sequence[float], rows: Sequence[tuple[float, ...]], gate_thresholds: Sequence[float]
) -> tuple[list[float], list[tuple[float, ...]], list[float]]:
    """Of lambdas with the same row, the largest: `thresholds` looks up the next one above."""
    whole = [(row, gate_thresholds[i] if gate_thresholds else 0.0) for i, row in enumerate(rows)]
    kept = [i for i in range(len(rows)) if i + 1 == len(rows) or whole[i] != whole[i + 1]]
    return (
        [grid[i] for i in kept],
        [rows[i] for i in kept],
        [gate_thresholds[i] for i in kept if gate_thresholds],
    )


def _outcomes(
    recording: Recording, probabilities: NDArray[np.float64], rows: Sequence[ArrayLike]
) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]:
    """Expected share of disagreeing tokens, and shares of tokens by exit, of each row."""
    exits = recording.num_exits
    doubt = np.concatenate([1.0 - probabilities, np.zeros((len(recording), 1))], axis=1)
    every = np.arange(len(recording))
    risks, shares = [], []
    for row in rows:
        left = first_true(recording.scores >= np.asarray(row))
        counts = np.bincount(left, minlength=exits + 1)
        risks.append(float(doubt[every, left].mean()))
        shares.append(tuple((counts / len(recording)).tolist()))
    return tuple(risks), tuple(shares)


def _to_json(value: float) -> float | None:
    return None if math.isinf(value) else value
