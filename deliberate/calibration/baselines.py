"""The usual early-exit rules, as families with one setting each, for comparison on recordings.

A rule says, for every token of a recording, with what probability it exits at each exit or at
full depth: 0 or 1 for all of them but the random one. What is replayed is the exit policy itself
(`deliberate.engine.exit_rules`), the one that decides while decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deliberate.calibration.exit_traces import Recording, first_true
from deliberate.calibration.stopping_policy import PolicyTable
from deliberate.engine.exit_policy import ExitAnswer, ExitPolicy, ExitReading
from deliberate.engine.exit_rules import EXIT_RULES, ExitRule
from deliberate.trace import BatchTrace
from deliberate.utils.errors import DeliberateError

ExitProbabilities = NDArray[np.float64]
"""float64 ``[T, K + 1]``; every row sums to 1."""


@dataclass(frozen=True)
class Rule:
    """A family of rules with one setting.

    Attributes:
        name: in tables.
        settings: values of its one setting.
        exit_probabilities: what the rule does to a recording at a setting.
    """

    name: str
    settings: tuple[float, ...]
    exit_probabilities: Callable[[Recording, float], ExitProbabilities]


def optimal_stopping(table: PolicyTable) -> Rule:
    """The policy table; the setting is lambda."""
    return Rule(
        "optimal stopping",
        table.lambdas,
        lambda recording, lambda_: by_threshold(recording, np.asarray(table.thresholds(lambda_))),
    )


def usual_rules(recording: Recording) -> tuple[Rule, ...]:
    """Every rule of `EXIT_RULES` that the recording has the values for."""
    measures = {recording.measure, *recording.others}
    return tuple(
        replayed_rule(rule, recording.num_exits)
        for rule in EXIT_RULES.values()
        if rule.measure is None or rule.measure in measures
        if not rule.similarities or recording.similarities is not None
    )


def replayed_rule(rule: ExitRule, exits: int) -> Rule:
    """A rule whose policies are replayed on recordings of this many exits."""

    def exit_probabilities(recording: Recording, setting: float) -> ExitProbabilities:
        if rule.shares is not None:
            shares = np.asarray(rule.shares(setting, exits))
            return np.repeat(shares[None], len(recording), axis=0)
        if rule.measure is not None:
            recording = recording.with_measure(rule.measure)
        return _one_hot(policy_exits(recording, rule.policy(setting, exits)), exits)

    return Rule(rule.title, tuple(rule.settings(exits)), exit_probabilities)


def policy_exits(recording: Recording, policy: ExitPolicy) -> NDArray[np.int64]:
    """The exit, 0..K, at which an exit policy has each token exit, ``[T]``.

    The policy is told what it is told while decoding one sequence at a time. The longest answer
    stands for the most tokens that there may be; `ExitReading.scores` and states are not recorded.

    Raises:
        DeliberateError: a policy that changes from step to step and is shown every token.
    """
    longest = int(recording.position.max(initial=0)) + 1
    policy.begin(0.0, 1, longest, BatchTrace([]))
    if policy.thresholds is None:
        if not policy.constant:
            raise DeliberateError(
                f"{type(policy).__name__} is replayed token by token: set `constant`, or decide by "
                "thresholds that `on_step` changes"
            )
        return _decided_exits(recording, policy)
    if policy.constant:
        return first_true(recording.scores >= np.asarray(policy.thresholds, dtype=np.float64))
    rows = []
    for tokens in range(longest):
        policy.on_step(0.0, tokens)
        rows.append(tuple(policy.thresholds))
    return first_true(recording.scores >= np.asarray(rows)[recording.position])


def by_threshold(recording: Recording, thresholds: NDArray[np.float64]) -> ExitProbabilities:
    """Exits at the first exit that reaches its threshold: ``[K]``, or ``[T, K]`` by token."""
    return _one_hot(first_true(recording.scores >= thresholds), recording.num_exits)


def _decided_exits(recording: Recording, policy: ExitPolicy) -> NDArray[np.int64]:
    exits = np.full(len(recording), recording.num_exits, dtype=np.int64)
    for k in range(recording.num_exits):
        left = np.flatnonzero(exits == recording.num_exits)
        if len(left):
            exits[left[np.asarray(policy.decide(_reading(recording, k, left)), dtype=bool)]] = k
    return exits


def _reading(recording: Recording, k: int, rows: NDArray[np.int64]) -> ExitReading:
    """What exit `k` said of these tokens of a recording; lists of what most rules never read are
    made when they are read."""

    def similarities() -> Sequence[float]:
        if recording.similarities is None:
            raise DeliberateError("the recording has no similarities: record it again")
        return recording.similarities[rows, k].tolist()

    return ExitReading(
        k,
        recording.sequence[rows].tolist(),
        recording.scores[rows, k].tolist(),
        _NOTHING,
        _Earlier(recording, k, rows),
        lambda: (recording.tokens[rows, k].tolist(), _NOTHING),
        similarities,
    )


# States and scores are not recorded.
_NOTHING: Tensor = torch.empty(0)


class _Earlier(Sequence[Mapping[int, ExitAnswer]]):
    """Answers of the exits below `k`, made when they are read: tens of thousands of small lists
    that no rule but patience reads took most of the time of a comparison."""

    def __init__(self, recording: Recording, k: int, rows: NDArray[np.int64]) -> None:
        self._recording, self._k, self._rows = recording, k, rows
        self._held: tuple[list[list[int]], list[list[float]]] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Mapping[int, ExitAnswer]:  # type: ignore[override]
        if self._held is None:
            tokens, scores = self._recording.tokens, self._recording.scores
            kept = self._rows, slice(0, self._k)
            self._held = tokens[kept].tolist(), scores[kept].tolist()
        pairs = zip(self._held[0][place], self._held[1][place], strict=True)
        return {j: ExitAnswer(token, score, _NOTHING) for j, (token, score) in enumerate(pairs)}

    def __iter__(self) -> Iterator[Mapping[int, ExitAnswer]]:
        return (self[place] for place in range(len(self)))


def _one_hot(exits: NDArray[np.int64], top: int) -> ExitProbabilities:
    return np.eye(top + 1)[exits]
