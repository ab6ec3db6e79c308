"""How much optimal stopping wins: the cost of every rule at equal risk, on the same fresh tokens.

Each rule may choose between any two of its settings by a coin, so its cost at a risk is read off
the lower convex hull of its operating points. Which settings are worth having is decided on one
recording and their risk and cost are measured on another. Risk is the share of tokens that differ
from the full-depth token, each after a dense prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deliberate.calibration.baselines import Rule, by_threshold
from deliberate.calibration.exit_traces import Recording
from deliberate.calibration.stopping_policy import StepCosts
from deliberate.engine.exit_rules import published_thresholds
from deliberate.utils.errors import DeliberateError

RISKS = (0.0002, 0.0005, 0.001, 0.002, 0.005)
RESAMPLES = 500
# A risk of fewer disagreements than this on the held-out tokens cannot be told from none.
_LEAST_DISAGREEMENTS = 5


@dataclass(frozen=True)
class RuleAtRisk:
    """One rule at one risk.

    Attributes:
        rule: its name.
        risk: share of disagreeing tokens that is allowed.
        cost: mean cost per token, in the unit of the costs.
        interval: its 95 % bootstrap interval over sequences.
        ratio: cost over that of the first rule (optimal stopping): above 1 the first one wins.
        ratio_interval: 95 % bootstrap interval of the ratio, both rules on the same resamples.
    """

    rule: str
    risk: float
    cost: float
    interval: tuple[float, float]
    ratio: float
    ratio_interval: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class _Points:
    """Sums over tokens at each setting, by sequence: wrong tokens and cost, ``[P, S]`` each."""

    wrong: NDArray[np.float64]
    cost: NDArray[np.float64]


def compare_rules(
    rules: Sequence[Rule],
    chosen_on: Recording,
    measured_on: Recording,
    steps: StepCosts,
    *,
    risks: Sequence[float] = RISKS,
    resamples: int = RESAMPLES,
    seed: int = 0,
    note: Callable[[], None] = lambda: None,
) -> list[RuleAtRisk]:
    """Every rule at every risk; the first rule is what the others are compared with.

    Args:
        rules: families with one setting each.
        chosen_on: where each rule's efficient settings are found (the fitting recording).
        measured_on: fresh sequences, where risk and cost are measured.
        steps: costs of going on.
        risks: allowed shares of disagreeing tokens, rising.
        note: called after each rule.

    Raises:
        DeliberateError: an empty recording, or risks outside (0, 1).
    """
    for name, recording in (("fitting", chosen_on), ("held-out", measured_on)):
        if len(recording) == 0:
            raise DeliberateError(f"the {name} recording is empty: rules need tokens to compare on")
    if any(not 0.0 < risk < 1.0 for risk in risks):
        raise DeliberateError(f"risks {list(risks)} must lie in (0, 1)")
    tokens = np.bincount(measured_on.sequence).astype(np.float64)
    weights = _resamples(len(tokens), resamples, seed)
    costs = []
    for rule in rules:
        settings = _efficient_settings(rule, chosen_on, steps)
        points = _points(rule, settings, measured_on, steps)
        costs.append(np.stack([_cost_at(points, tokens, row, risks, steps) for row in weights]))
        note()
    found = []
    for rule, cost in zip(rules, costs, strict=True):
        ratio = cost / costs[0]
        for column, risk in enumerate(risks):
            found.append(
                RuleAtRisk(
                    rule=rule.name,
                    risk=float(risk),
                    cost=float(cost[0, column]),
                    interval=_percentiles(cost[:, column]),
                    ratio=float(ratio[0, column]),
                    ratio_interval=_percentiles(ratio[:, column]),
                )
            )
    return found


def useful_risks(recording: Recording, risks: Sequence[float] = RISKS) -> list[float]:
    """Those risks that the recording can resolve: several tokens' worth, and below that of always
    exiting at the first exit."""
    most = float(1.0 - recording.agrees[:, 0].mean())
    return [r for r in risks if r * len(recording) >= _LEAST_DISAGREEMENTS and r < most]


def published_point(recording: Recording, steps: StepCosts) -> tuple[float, float]:
    """Risk and mean cost of the published thresholds (0.85 / 0.90 / 0.95), unchanged."""
    exits = by_threshold(recording, np.asarray(published_thresholds(recording.num_exits)))
    wrong, cost = _per_token(exits, recording, steps)
    return float(wrong.mean()), float(cost.mean())


def lower_hull(risk: NDArray[np.float64], cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the points on the lower convex hull, by rising risk and falling cost."""
    kept: list[int] = []
    for i in np.lexsort((cost, risk)):
        if kept and cost[i] >= cost[kept[-1]]:
            continue
        while len(kept) > 1 and _above(risk, cost, kept[-2], kept[-1], i):
            kept.pop()
        kept.append(int(i))
    return np.asarray(kept, dtype=np.int64)


def _above(risk: NDArray[np.float64], cost: NDArray[np.float64], a: int, b: int, c: int) -> bool:
    """Whether point b lies on or above the line from a to c."""
    return bool(
        (cost[b] - cost[a]) * (risk[c] - risk[a]) >= (cost[c] - cost[a]) * (risk[b] - risk[a])
    )


def _resamples(sequences: int, count: int, seed: int) -> NDArray[np.float64]:
    """How often each sequence counts: all once, then `count` bootstrap draws."""
    random = np.random.default_rng(seed)
    drawn = random.multinomial(sequences, np.full(sequences, 1.0 / sequences), size=count)
    return np.concatenate([np.ones((1, sequences)), drawn])


def _per_token(
    exits: NDArray[np.float64], recording: Recording, steps: StepCosts
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    wrong = (exits[:, :-1] * ~recording.agrees).sum(axis=1)
    return wrong, exits @ steps.by_exit()


def _efficient_settings(rule: Rule, recording: Recording, steps: StepCosts) -> list[float]:
    risk, cost = np.empty(len(rule.settings)), np.empty(len(rule.settings))
    for i, setting in enumerate(rule.settings):
        wrong, spent = _per_token(rule.exit_probabilities(recording, setting), recording, steps)
        risk[i], cost[i] = wrong.mean(), spent.mean()
    return [rule.settings[i] for i in lower_hull(risk, cost)]


def _points(
    rule: Rule, settings: Sequence[float], recording: Recording, steps: StepCosts
) -> _Points:
    sequences = recording.num_sequences
    wrong, cost = np.empty((sequences, len(settings))), np.empty((sequences, len(settings)))
    for i, setting in enumerate(settings):
        by_token = _per_token(rule.exit_probabilities(recording, setting), recording, steps)
        wrong[:, i], cost[:, i] = (
            np.bincount(recording.sequence, weights=values, minlength=sequences)
            for values in by_token
        )
    return _Points(wrong, cost)


def _cost_at(
    points: _Points,
    tokens: NDArray[np.float64],
    weights: NDArray[np.float64],
    risks: Sequence[float],
    steps: StepCosts,
) -> NDArray[np.float64]:
    """Cost of the rule at each allowed risk; dense, at risk 0, is open to every rule."""
    total = float(weights @ tokens)
    risk = np.append(weights @ points.wrong / total, 0.0)
    cost = np.append(weights @ points.cost / total, steps.dense)
    hull = lower_hull(risk, cost)
    return np.interp(np.asarray(risks), risk[hull], cost[hull])


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values[1:] if len(values) > 1 else values, [2.5, 97.5])
    return float(low), float(high)
