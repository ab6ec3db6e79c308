"""A simulated machine that decodes: exits, pending tokens, catch-up passes, and a clock."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from deliberate.cost.meter import Work, WorkMeter
from deliberate.cost.model import CostModel
from deliberate.cost.parts import PassCost, SegmentCost, WarmCost
from deliberate.engine.exit_policy import FixedPolicy

EXITS = (2, 4, 6)
MAX_PENDING = 12


def plant_cost(layer_ms: float = 0.2, row_ms: float = 0.01, read_ms: float = 0.04) -> CostModel:
    """Eight layers with exits after 2, 4 and 6; a deferred token adds a twentieth of a layer."""
    segment = SegmentCost(
        single=WarmCost(PassCost(2 * layer_ms / 1e3)),
        several=WarmCost(PassCost(2.2 * layer_ms / 1e3, per_row=2 * row_ms / 1e3)),
        prompt=PassCost(2 * layer_ms / 1e3, per_row=2 * row_ms / 1e3),
    )
    read = PassCost(read_ms / 1e3)
    return CostModel(EXITS, 8, (segment,) * 4, (WarmCost(read),) * 3, read, step=0.01 / 1e3)


@dataclass
class Plant:
    """Decodes one response at a time on a simulated clock, as the decode loop does at batch 1.

    `slowdown` maps the number of tokens decoded so far, over all responses, to a factor on every
    duration; `noise` is the standard deviation of the logarithm of each step's duration.
    """

    cost: CostModel
    slowdown: Callable[[int], float] = lambda _: 1.0
    noise: float = 0.0
    hard: float = 1.0
    seed: int = 0
    now: float = 0.0
    decoded: int = 0
    step_seconds: list[float] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def respond(
        self, exit_policy, tokens: int, *, prompt: int = 40, limit: int = 256, metered=True
    ):
        """One response of `tokens` tokens; returns its seconds."""
        work = Work(EXITS, [])
        began = self.now
        fixed = isinstance(exit_policy, FixedPolicy)
        if not fixed:
            exit_policy.begin(self.now, prompt, limit)
        if metered and hasattr(exit_policy, "watch"):
            exit_policy.watch(WorkMeter(self.cost, work))
        self._spend(self.cost.prompt_seconds(prompt))
        pending = [0] * len(EXITS)
        for made in range(1, tokens):
            thresholds = exit_policy.thresholds
            if not fixed:
                thresholds = thresholds(self.now, made)
            self._step(thresholds, pending, work, made)
            self.decoded += 1
        return self.now - began

    def _step(self, thresholds: Sequence[float], pending: list[int], work: Work, made: int) -> None:
        # Scores rise with depth; a fifth of the tokens are doubtful everywhere.
        ease = self.random.random() ** self.hard
        forced = sum(pending) >= MAX_PENDING
        deferred, seconds = 0, self.cost.step
        for k in range(len(EXITS) + 1):
            rows = deferred + 1
            work.passes.append((k, 1, rows, 60 + made))
            seconds += self.cost.segment_seconds(k, tokens=rows, context=60 + made - rows)
            if k == len(EXITS):
                break
            seconds += self.cost.read_seconds(k)
            score = min(1.0, ease * (0.6 + 0.25 * k))
            if not forced and score >= thresholds[k]:
                pending[k] += rows
                self.exits.append(k)
                self._spend(seconds)
                return
            deferred, pending[k] = deferred + pending[k], 0
        self.exits.append(len(EXITS))
        self._spend(seconds + self.cost.head_seconds)

    def _spend(self, seconds: float) -> None:
        seconds *= self.slowdown(self.decoded) * math.exp(self.random.gauss(0.0, self.noise))
        self.step_seconds.append(seconds)
        self.now += seconds


@dataclass(frozen=True)
class Table:
    """Lambdas and the thresholds of each."""

    lambdas: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]

    def thresholds(self, lambda_: float) -> tuple[float, ...]:
        return self.rows[self.lambdas.index(lambda_)]


def plant_table(cost: CostModel, steps: int = 40) -> tuple[Table, list[float]]:
    """Thresholds from always exiting to never, with the seconds per token each takes."""
    levels = [i / steps for i in range(steps + 1)]
    rows = [(level,) * len(EXITS) for level in levels] + [(math.inf,) * len(EXITS)]
    expected = []
    for row in rows:
        plant = Plant(cost, seed=1)
        plant.respond(FixedPolicy(row), 3000)
        expected.append(sum(plant.step_seconds[1:]) / (len(plant.step_seconds) - 1))
    lambdas = tuple(float(10 ** (i / 8)) for i in range(len(rows)))
    return Table(lambdas, tuple(rows)), expected
