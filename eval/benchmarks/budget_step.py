"""A machine that becomes slower in the middle of a stream of answers, and how the budget fares.

Simulated: the model decodes, and a clock says how long that takes on a machine that is exactly what
the cost model says, but for noise, and becomes twice as slow at one token. Real: another process
that does nothing but compute on the same core.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from deliberate.api.generation import AdaptiveDecoding
from deliberate.api.model import AdaptiveModel
from deliberate.cost.meter import Work, WorkMeter
from deliberate.cost.model import CostModel
from deliberate.engine.decode_loop import DecodeLoop
from deliberate.engine.exit_policy import WrappedPolicy
from deliberate.policies.budget import LatencyBudget
from deliberate.policies.exit_policies import BudgetPolicy
from deliberate.utils.errors import DeliberateError

OSCILLATION = 0.1
SOON = 32


class SlowedClock:
    """Readings of `base` that can be made to run faster, as on a machine that became slower."""

    def __init__(self, base: Callable[[], float] = time.perf_counter) -> None:
        self._base = base
        self._mark = base()
        self._now = 0.0
        self._factor = 1.0

    def __call__(self) -> float:
        """Seconds."""
        mark = self._base()
        self._now += self._factor * (mark - self._mark)
        self._mark = mark
        return self._now

    def slow(self, factor: float) -> None:
        """From now on an elapsed second counts as `factor` seconds."""
        self()
        self._factor = factor


class WorkClock:
    """Time as the cost model predicts it for the passes of the loops that it is shown, with noise.

    Args:
        cost: of the model.
        noise: standard deviation of the logarithm of each interval.
        seed: of the noise.
    """

    def __init__(self, cost: CostModel, *, noise: float = 0.0, seed: int = 0) -> None:
        self._cost, self._noise = cost, noise
        self._random = random.Random(seed)
        self._now = self._charged = 0.0
        self._loop: DecodeLoop | None = None
        self._meter: WorkMeter | None = None
        self._prompt = 0.0

    def watch(self, loop: DecodeLoop, prompt_tokens: int) -> None:
        """The next generation; call it before the loop runs."""
        self._loop, self._charged = loop, 0.0
        self._prompt = self._cost.prompt_seconds(prompt_tokens)
        batch = loop.batch
        layers = loop.boundaries[:-1]
        rounds = None if loop.gate is None else batch.deliberation_rounds
        work = Work(
            layers, batch.passes, reads=batch.reads, deliberation_rounds=rounds, runs=batch.runs
        )
        self._meter = WorkMeter(self._cost, work)

    def __call__(self) -> float:
        """Seconds."""
        if self._loop is not None and self._meter is not None:
            # The prompt's pass yields the first token, and is not among the passes.
            begun = self._loop.sequences and self._loop.records
            total = self._meter.seconds() + (self._prompt if begun else 0.0)
            if total > self._charged:
                noise = math.exp(self._random.gauss(0.0, self._noise))
                self._now += noise * (total - self._charged)
                self._charged = total
        return self._now


@dataclass(frozen=True)
class TokenTime:
    """One decoded token of the stream.

    Attributes:
        seconds: it took.
        planned: what its lambda takes per token by the cost model and the text's factor, on the
            machine that the cost model was measured on.
        speed: the machine's factor as the controller believed it.
        guarded: the hard guard chose.
    """

    seconds: float
    planned: float
    speed: float
    guarded: bool


@dataclass(frozen=True)
class StepChange:
    """How the budget fared after the machine became slower.

    Attributes:
        budget_ms, factor, before, after, window: what was done.
        tokens_back: tokens until the mean of the next `window` tokens is within the budget again;
            None if never.
        planned_back: tokens until the choices are, at the speed the machine then had; None if
            never, or where that speed is not known.
        oscillation: largest mean of a window over the budget, later than 32 tokens after the
            change, as a share of it; 0 where none is over. The machine's own noise is in it.
        planned_oscillation: the same of the choices; None where the speed is not known.
        ms_before, ms_after: means of the tokens before, and later than 32 tokens after.
        tokens: every token, prompt passes left out.
    """

    budget_ms: float
    factor: float
    before: int
    after: int
    window: int
    tokens_back: int | None
    planned_back: int | None
    oscillation: float
    planned_oscillation: float | None
    ms_before: float
    ms_after: float
    tokens: tuple[TokenTime, ...]

    @property
    def recovered(self) -> bool:
        """Back within the budget in 32 tokens, and never over it by more than 10 % after.

        By the choices where the machine's speed is known, else by the time that was measured.
        """
        back, over = self.tokens_back, self.oscillation
        if self.planned_oscillation is not None:
            back, over = self.planned_back, self.planned_oscillation
        return back is not None and back <= SOON and over <= OSCILLATION


class _Watch(WrappedPolicy):
    """A policy that notes every token's time and choice, and calls `change` after so many."""

    def __init__(
        self,
        policy: BudgetPolicy,
        tokens: list[TokenTime],
        at: int,
        change: Callable[[], None],
    ) -> None:
        super().__init__(policy)
        self._budget, self._tokens = policy, tokens
        self._at, self._change = at, change
        self._last: tuple[float, int] | None = None

    def on_step(self, now: float, tokens: int) -> None:
        """See `ExitPolicy`."""
        if self._last is None:
            self._last = now, tokens
        elif tokens > self._last[1]:
            self._note(now, tokens)
        super().on_step(now, tokens)

    def end(self, now: float, tokens: int) -> None:
        """See `ExitPolicy`."""
        if self._last is not None and tokens > self._last[1]:
            self._note(now, tokens)
        super().end(now, tokens)

    def _note(self, now: float, tokens: int) -> None:
        assert self._last is not None
        controller, (then, made) = self._budget.controller, self._last
        each = (now - then) / (tokens - made)
        planned = controller.planned_seconds / controller.speed
        for _ in range(tokens - made):
            self._tokens.append(TokenTime(each, planned, controller.speed, controller.guarding))
            if len(self._tokens) == self._at:
                self._change()
        self._last = now, tokens


def stream(
    model: AdaptiveModel,
    prompts: Iterable[Sequence[int]],
    budget: LatencyBudget,
    *,
    before: int,
    after: int,
    clock: Callable[[], float],
    change: Callable[[], None],
    max_new_tokens: int,
    end_tokens: Sequence[int],
    machine: WorkClock | None = None,
) -> list[TokenTime]:
    """Answers prompts until ``before + after`` tokens are decoded; `change` is called in between.

    Args:
        prompts: as many as it takes; repeated where they are too few.
        clock: seconds, monotonic.
        machine: what the clock is made of, where it is simulated.

    Raises:
        DeliberateError: no prompts, or no calibration.
    """
    tokens: list[TokenTime] = []
    exit_policy = model.guarantees.budget(model, budget)
    for prompt in itertools.cycle(list(prompts)):
        if len(tokens) >= before + after:
            return tokens[: before + after]
        # Not through fidelity "budget": a request after the change may be refused as infeasible,
        # and what the controller makes of it is to be seen.
        watch = _Watch(exit_policy, tokens, before, change)
        loop = AdaptiveDecoding(model, "threshold", exit_policy=watch).loop(
            max_new_tokens=max_new_tokens, end_tokens=end_tokens, prompt_tokens=len(prompt)
        )
        loop.stopwatch.clock = clock
        if machine is not None:
            machine.watch(loop, len(prompt))
        with torch.inference_mode():
            for _ in loop.run(torch.tensor([list(prompt)], device=model.device)):
                pass
    raise DeliberateError("the step change needs at least one prompt")


def judge(
    tokens: Sequence[TokenTime],
    budget: LatencyBudget,
    *,
    before: int,
    factor: float,
    window: int,
    known: bool,
) -> StepChange:
    """Figures of a stream whose machine changed after `before` tokens.

    Args:
        known: the machine was what the cost model says, and became exactly `factor` times slower.
    """
    per_token = budget.per_token_seconds
    assert per_token is not None
    times = [token.seconds for token in tokens]
    after = times[before:]
    windows = [sum(after[j : j + window]) / window for j in range(len(after) - window + 1)]
    back = next((j for j, mean in enumerate(windows) if mean <= per_token), None)
    planned_back = planned_over = None
    if known:
        paces = [factor * token.planned for token in tokens[before:]]
        planned_back = next((j for j, pace in enumerate(paces) if pace <= per_token), None)
        planned_over = _over(paces[SOON:], per_token)
    rest = after[SOON:] or after
    return StepChange(
        budget_ms=1e3 * per_token,
        factor=factor,
        before=before,
        after=len(after),
        window=window,
        tokens_back=back,
        planned_back=planned_back,
        oscillation=_over(windows[SOON:], per_token),
        planned_oscillation=planned_over,
        ms_before=1e3 * sum(times[:before]) / before,
        ms_after=1e3 * sum(rest) / len(rest),
        tokens=tuple(tokens),
    )


def _over(paces: Sequence[float], per_token: float) -> float:
    """Largest excess over the budget, as a share of it."""
    return max([0.0, *(pace / per_token - 1.0 for pace in paces)])


@contextmanager
def busy_core() -> Iterator[Callable[[], None]]:
    """Keeps this process on one core; the function it gives starts another one there.

    Raises:
        DeliberateError: the system cannot pin a process to a core.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise DeliberateError("step.real=true needs a system that pins processes to cores: Linux")
    allowed = os.sched_getaffinity(0)
    running: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        # It inherits the one core.
        running.append(subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]))

    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield start
    finally:
        for process in running:
            process.kill()
            process.wait()
        os.sched_setaffinity(0, allowed)
