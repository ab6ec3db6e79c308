"""Prompts and answers on machines of their own, or on the same ones: step by step, simulated.

Together, each machine runs chunks of prompts in the steps in which it decodes, as the engine here
does. Apart, some machines run prompts alone and hand the keys and values over to others that only
decode (DistServe, Zhong et al., OSDI 2024, arXiv:2401.09670; Splitwise, Patel et al., ISCA 2024,
arXiv:2311.18677). Nothing is measured here: the times are a cost model's.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from deliberate.utils.checks import at_least
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class StepTimes:
    """What passes take, in seconds.

    Attributes:
        decode: one token of each of so many sequences.
        prompt: so many tokens of a prompt.
        transfer: keys and values of so many tokens, from one machine to another.
    """

    decode: Callable[[int], float]
    prompt: Callable[[int], float]
    transfer: Callable[[int], float] = lambda _: 0.0


@dataclass(frozen=True)
class Layout:
    """Which machines do what.

    Attributes:
        machines: in all.
        prefill: of them that only run prompts; 0: all machines do both.
        slots: requests that a decoding machine holds at a time.
        chunk: prompt tokens in a step beside decoding sequences, where machines do both.
        idle_chunk: the same where nothing is decoded.

    Raises:
        DeliberateError: a value that is not allowed.
    """

    machines: int
    prefill: int = 0
    slots: int = 16
    chunk: int = 256
    idle_chunk: int = 1024

    def __post_init__(self) -> None:
        for name in ("machines", "slots", "chunk", "idle_chunk"):
            at_least(name, getattr(self, name), 1)
        if not 0 <= self.prefill < self.machines:
            raise DeliberateError(
                f"prefill={self.prefill} of machines={self.machines}: from 0 to one fewer than all"
            )


@dataclass
class Turn:
    """One request, and when its tokens came.

    Attributes:
        arrival: second.
        prompt, answer: tokens, at least one each.
        times: second of each token so far.
    """

    arrival: float
    prompt: int
    answer: int
    times: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds from arrival to the first token."""
        return self.times[0] - self.arrival

    @property
    def gaps(self) -> list[float]:
        """Seconds between its tokens."""
        return [after - before for before, after in itertools.pairwise(self.times)]


@dataclass
class _Machine:
    """What runs and waits on one machine."""

    decodes: bool
    takes_prompts: bool
    running: list[Turn] = field(default_factory=list)
    prompts: deque[list[int]] = field(default_factory=deque)
    turns: deque[Turn] = field(default_factory=deque)  # of `prompts`, in the same order
    busy: bool = False

    @property
    def held(self) -> int:
        return len(self.running) + len(self.turns)

    def work(self, times: StepTimes) -> float:
        """Seconds of the prompts that wait, and a step: by which the emptiest is found."""
        return times.prompt(1) * sum(left for (left,) in self.prompts) + times.decode(
            max(1, len(self.running))
        )


def arrivals(
    rate: float, count: int, prompt: tuple[int, int], answer: tuple[int, int], seed: int
) -> list[Turn]:
    """Poisson arrivals of requests whose lengths are uniform in these ranges."""
    dice, now, made = random.Random(seed), 0.0, []
    for _ in range(count):
        now += dice.expovariate(rate)
        made.append(Turn(now, dice.randint(*prompt), dice.randint(*answer)))
    return made


def capacity(
    times: StepTimes, layout: Layout, prompt: tuple[int, int], answer: tuple[int, int]
) -> float:
    """Requests a second that as many machines could do together with all places taken."""
    tokens = sum(answer) / 2
    each = times.prompt(round(sum(prompt) / 2)) + tokens * times.decode(layout.slots) / layout.slots
    return layout.machines / each


class Separation:
    """One run of a layout.

    Args:
        times: of the machines, which are alike.
        layout: of them.
    """

    def __init__(self, times: StepTimes, layout: Layout) -> None:
        self._times, self._layout = times, layout
        apart = layout.prefill > 0
        self._machines = [
            _Machine(decodes=not (apart and k < layout.prefill), takes_prompts=not apart)
            for k in range(layout.machines)
        ]
        for machine in self._machines[: layout.prefill]:
            machine.takes_prompts = True
        self._events: list[tuple[float, int, str, object]] = []
        self._numbers = itertools.count()
        # Requests that wait for a machine: with their prompt, or with its keys and values.
        self._waiting: deque[Turn] = deque()
        self._moved: deque[Turn] = deque()

    def run(self, turns: Sequence[Turn]) -> None:
        """Serves all requests; each then has its times."""
        for turn in turns:
            self._push(turn.arrival, "arrival", turn)
        while self._events:
            now, _, kind, what = heapq.heappop(self._events)
            if kind == "arrival":
                assert isinstance(what, Turn)
                self._waiting.append(what)
            elif kind == "moved":
                assert isinstance(what, Turn)
                self._moved.append(what)
            else:
                self._end_step(now, what)
            self._place()
            for machine in self._machines:
                if not machine.busy and machine.held:
                    self._begin_step(now, machine)

    def _push(self, at: float, kind: str, what: object) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), kind, what))

    def _place(self) -> None:
        apart = self._layout.prefill > 0
        while self._waiting:
            # A machine that only runs prompts begins one at a time.
            most = 1 if apart else self._layout.slots
            free = [one for one in self._machines if one.takes_prompts and one.held < most]
            if not free:
                break
            chosen = min(free, key=lambda one: (one.work(self._times), one.held))
            turn = self._waiting.popleft()
            chosen.turns.append(turn)
            chosen.prompts.append([turn.prompt])
        while self._moved:
            free = [one for one in self._machines if one.decodes and one.held < self._layout.slots]
            if not free:
                break
            min(free, key=lambda one: one.held).running.append(self._moved.popleft())

    def _begin_step(self, now: float, machine: _Machine) -> None:
        layout, decoding = self._layout, list(machine.running)
        room = layout.chunk if decoding else layout.idle_chunk
        ran: list[Turn] = []
        taken = 0
        while machine.prompts and taken < room:
            left = machine.prompts[0]
            part = min(left[0], room - taken)
            left[0] -= part
            taken += part
            if left[0]:
                break
            machine.prompts.popleft()
            ran.append(machine.turns.popleft())
        seconds = self._times.prompt(taken) if taken else 0.0
        if decoding:
            seconds += self._times.decode(len(decoding))
        machine.busy = True
        # Those whose prompt ends in this step hold their places until it has ended.
        machine.running += ran
        self._push(now + seconds, "step", (machine, [*decoding, *ran]))

    def _end_step(self, now: float, what: object) -> None:
        assert isinstance(what, tuple)
        machine, served = what
        machine.busy = False
        for turn in served:
            turn.times.append(now)
            ended = len(turn.times) == turn.answer
            if ended or not machine.decodes:
                machine.running.remove(turn)
            if not ended and not machine.decodes:
                self._push(now + self._times.transfer(turn.prompt), "moved", turn)


@dataclass(frozen=True)
class Served:
    """What came of a run; seconds.

    Attributes:
        first: P50 and P99 of the time to the first token.
        gap: P50 and P99 between tokens.
        in_time: share of the requests whose first token and whose every gap kept the limits.
        rate: requests a second.
    """

    first: tuple[float, float]
    gap: tuple[float, float]
    in_time: float
    rate: float


def served(turns: Sequence[Turn], first_limit: float, gap_limit: float) -> Served:
    """The figures of requests that were served."""
    gaps = sorted(gap for turn in turns for gap in turn.gaps) or [0.0]
    first = sorted(turn.first for turn in turns)
    good = sum(
        turn.first <= first_limit and max(turn.gaps, default=0.0) <= gap_limit for turn in turns
    )
    length = max(turn.times[-1] for turn in turns) - min(turn.arrival for turn in turns)
    return Served(
        (_at(first, 0.5), _at(first, 0.99)),
        (_at(gaps, 0.5), _at(gaps, 0.99)),
        good / len(turns),
        len(turns) / length,
    )


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
