"""Exit policies: which tokens exit at an exit.

The decode loop knows the base class, policies of thresholds, and the adapters below. Certified
policies and the controller of a latency budget are in `deliberate.policies`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deliberate.trace import BatchTrace
from deliberate.utils.errors import DeliberateError

# Exit index, sequence index, confidence -> whether the token exits there.
Decision = Callable[[int, int, float], bool]
# Every so many deep passes a monitor has tokens that exited early compared with full depth.
MONITOR_EVERY = 8


@dataclass(frozen=True)
class ExitAnswer:
    """What an exit predicted for one token.

    Attributes:
        token: that it would choose.
        confidence: by the exits' measure, in [0, 1].
        state: hidden state ``[d]`` at the exit.
    """

    token: int
    confidence: float
    state: Tensor


class ExitReading:
    """What one exit says of the newest tokens of R sequences.

    Attributes:
        exit: index k of the exit, from 0.
        rows: index of each sequence within its request.
        confidences: R numbers in [0, 1], by the exits' measure, of the scores that the token is
            taken from (after temperature, penalties and processors); a probe's are of the state.
        states: hidden states ``[R, d]`` at the exit.
        earlier: of each sequence, the answers that lower exits gave for the same token, by exit
            index; empty unless the policy has `ExitPolicy.keeps_answers`. Exits that were not
            evaluated are missing.
    """

    __slots__ = (
        "_choice",
        "_choose",
        "_similarities",
        "confidences",
        "earlier",
        "exit",
        "rows",
        "states",
    )

    def __init__(
        self,
        exit: int,
        rows: Sequence[int],
        confidences: Sequence[float],
        states: Tensor,
        earlier: Sequence[Mapping[int, ExitAnswer]],
        choose: Callable[[], tuple[Sequence[int], Tensor]],
        similarities: Callable[[], Sequence[float]] | None = None,
    ) -> None:
        """
        Args:
            choose: returns tokens and processed scores; it is called when one is first read.
            similarities: replaces their computation from the states.
        """
        self.exit = exit
        self.rows = rows
        self.confidences = confidences
        self.states = states
        self.earlier = earlier
        self._choose = choose
        self._choice: tuple[Sequence[int], Tensor] | None = None
        self._similarities = similarities

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> Sequence[int]:
        """The R tokens that the exit would choose."""
        return self._chosen()[0]

    @property
    def scores(self) -> Tensor:
        """Scores ``[R, V]`` that the tokens are taken from, after all logits processors."""
        return self._chosen()[1]

    @property
    def similarities(self) -> Sequence[float]:
        """Cosine similarity of each state with that of the exit below, NaN where that is missing.

        Needs `ExitPolicy.keeps_answers`.
        """
        if self._similarities is not None:
            return self._similarities()
        known = [place for place, one in enumerate(self.earlier) if self.exit - 1 in one]
        found = [math.nan] * len(self.rows)
        if known:
            below = torch.stack([self.earlier[place][self.exit - 1].state for place in known])
            values = state_similarity(self.states[known], below).tolist()
            for place, value in zip(known, values, strict=True):
                found[place] = value
        return found

    def _chosen(self) -> tuple[Sequence[int], Tensor]:
        if self._choice is None:
            self._choice = self._choose()
        return self._choice


def state_similarity(state: Tensor, below: Tensor) -> Tensor:
    """Cosine similarity float32 ``[R]`` of hidden states ``[R, d]``."""
    return F.cosine_similarity(state.float(), below.float(), dim=-1)


class ExitPolicy:
    """Decides which tokens exit. Derive from it and override what differs; one per generation.

    Times are readings of one monotonic clock, in seconds, passed in by the caller: a policy never
    reads a clock itself.

    Attributes:
        thresholds: where a decision is nothing but a comparison of the exit's confidence: the least
            that exits, one per exit, ``[K]``; infinity means that no token exits and the exit is
            not evaluated. The executor then compares by itself, and `decide` is not called. None:
            `decide` is called at every exit.
        constant: nothing changes during a generation: `on_step` is not called, and with
            `thresholds` the executor may decode several tokens in one call.
        keeps_answers: `ExitReading.earlier` is filled; every exit's token is then chosen.
        gate_threshold: replaces `GateConfig.think_below` of the model's deliberation gate; None
            keeps the gate's own.
        compare_every: in threshold mode, every so many deep passes compare the tokens that exited
            early with full depth and tell `on_compared`; 0 for never.
        compare_offset: number of the first deep pass that compares.
        report: what is to be said of the generation once it has ended; None for nothing.
    """

    thresholds: Sequence[float] | None = None
    constant: bool = False
    keeps_answers: bool = False
    gate_threshold: float | None = None
    compare_every: int = 0
    compare_offset: int = 0
    report: Any = None

    def begin(self, now: float, prompt_tokens: int, max_new_tokens: int, work: BatchTrace) -> None:
        """A generation begins, before its prompt's pass.

        Args:
            prompt_tokens: of the longest prompt.
            work: what the generation runs; its lists grow while it does.
        """

    def on_step(self, now: float, tokens: int) -> None:
        """A step of the decode loop follows; may change any attribute.

        Args:
            tokens: tokens chosen so far; falls when drafts are rolled back.
        """

    def on_load(self, sequences: int) -> None:
        """In an engine: so many sequences run; before `on_step`."""

    def decide(self, reading: ExitReading) -> Sequence[bool]:
        """Which of the reading's R tokens exit here."""
        thresholds = self.thresholds
        if thresholds is None:
            raise DeliberateError(
                f"{type(self).__name__} has neither thresholds nor decide: set one of the two"
            )
        return [confidence >= thresholds[reading.exit] for confidence in reading.confidences]

    def on_compared(self, agreed: int, compared: int) -> None:
        """Of `compared` tokens that exited early, full depth chooses `agreed` too."""

    def end(self, now: float, tokens: int) -> None:
        """The generation is complete with `tokens` tokens in its longest sequence."""


class FixedPolicy(ExitPolicy):
    """The same thresholds at every step."""

    constant = True

    def __init__(self, thresholds: Sequence[float], gate_threshold: float | None = None) -> None:
        """`thresholds`: one per exit; `gate_threshold`: None for the deliberation gate's own."""
        self.thresholds = check_thresholds(thresholds)
        self.gate_threshold = gate_threshold


class CallablePolicy(ExitPolicy):
    """Decides by a function of exit index, sequence index and confidence."""

    constant = True

    def __init__(self, decision: Decision) -> None:
        """`decision` returns whether the token exits."""
        self._decision = decision

    def decide(self, reading: ExitReading) -> Sequence[bool]:
        """See `ExitPolicy`."""
        return [
            bool(self._decision(reading.exit, row, confidence))
            for row, confidence in zip(reading.rows, reading.confidences, strict=True)
        ]


class WrappedPolicy(ExitPolicy):
    """Passes everything on to another policy: a base for those that observe one."""

    def __init__(self, policy: ExitPolicy) -> None:
        self.policy = policy
        self._copy()

    def begin(self, now: float, prompt_tokens: int, max_new_tokens: int, work: BatchTrace) -> None:
        """See `ExitPolicy`."""
        self.policy.begin(now, prompt_tokens, max_new_tokens, work)
        self._copy()

    def on_step(self, now: float, tokens: int) -> None:
        """See `ExitPolicy`."""
        self.policy.on_step(now, tokens)
        self._copy()

    def on_load(self, sequences: int) -> None:
        """See `ExitPolicy`."""
        self.policy.on_load(sequences)

    def decide(self, reading: ExitReading) -> Sequence[bool]:
        """See `ExitPolicy`."""
        return self.policy.decide(reading)

    def on_compared(self, agreed: int, compared: int) -> None:
        """See `ExitPolicy`."""
        self.policy.on_compared(agreed, compared)

    def end(self, now: float, tokens: int) -> None:
        """See `ExitPolicy`."""
        self.policy.end(now, tokens)
        self.report = self.policy.report

    def _copy(self) -> None:
        """Takes over the attributes."""
        policy = self.policy
        self.thresholds, self.constant = policy.thresholds, policy.constant
        self.keeps_answers, self.gate_threshold = policy.keeps_answers, policy.gate_threshold
        self.compare_every, self.compare_offset = policy.compare_every, policy.compare_offset


class MonitoredPolicy(WrappedPolicy):
    """Another policy, of which a function is told how often early tokens agree with full depth."""

    def __init__(
        self,
        policy: ExitPolicy,
        monitor: Callable[[int, int], None],
        every: int = MONITOR_EVERY,
        offset: int = 0,
    ) -> None:
        """
        Args:
            monitor: called with (agreed, compared), counts of tokens that exited early.
            every: deep passes from one comparison to the next, at least 1.
            offset: number of the first deep pass that compares.

        Raises:
            DeliberateError: `every` below 1.
        """
        if every < 1:
            raise DeliberateError(f"monitor every {every} deep passes: it must be at least 1")
        self._monitor, self._every, self._offset = monitor, every, offset
        super().__init__(policy)

    def on_compared(self, agreed: int, compared: int) -> None:
        """See `ExitPolicy`."""
        self.policy.on_compared(agreed, compared)
        self._monitor(agreed, compared)

    def _copy(self) -> None:
        super()._copy()
        if not self.compare_every:
            self.compare_every, self.compare_offset = self._every, self._offset


def check_policy(policy: ExitPolicy, exits: int) -> None:
    """Raises where a policy cannot decide at this many exits.

    Raises:
        DeliberateError: another number of thresholds, or an object that is not an `ExitPolicy`.
    """
    if not isinstance(policy, ExitPolicy):
        raise DeliberateError(
            f"exit_policy={type(policy).__name__}: derive it from "
            "deliberate.engine.exit_policy.ExitPolicy, or use FixedPolicy(thresholds)"
        )
    if policy.thresholds is not None and len(policy.thresholds) != exits:
        raise DeliberateError(
            f"{type(policy).__name__} has {len(policy.thresholds)} thresholds for {exits} exits: "
            "give one per exit"
        )


def check_thresholds(thresholds: Sequence[float]) -> tuple[float, ...]:
    """The thresholds as a tuple, if each is a number or infinity.

    Raises:
        DeliberateError: one of them is NaN.
    """
    values = tuple(float(threshold) for threshold in thresholds)
    if any(math.isnan(value) for value in values):
        raise DeliberateError(f"thresholds {list(values)} contain NaN: use infinity for never")
    return values
