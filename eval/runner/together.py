"""Answers of several modes to many problems, several problems at a time: for accuracies.

Each mode has an engine of its own, which takes the next problem as soon as one ends. The engine
that is behind steps next, so a slower machine meets all modes alike and an interrupted run loses
the problems that were being decoded, no more.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from deliberate.api.model import AdaptiveModel
from deliberate.engine.engine import Engine
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec
from deliberate.eval.runner.decoded import Decoded

TOGETHER = ("dense", "exact", "threshold")
"""Modes that an engine decodes without a guarantee to account for."""


@dataclass
class _Answer:
    """One answer on its way.

    Attributes:
        index: of its problem.
        tokens: so far.
        seconds: its shares of the steps: a step's wall clock over the answers in the engine.
        first: the same until its first token.
    """

    index: int
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    first: float | None = None


class _ModeEngine:
    """One mode's engine, and the problems that it still has to answer."""

    def __init__(self, engine: Engine, requests: Mapping[int, Request], max_running: int) -> None:
        self.engine = engine
        self.requests = requests
        self.max_running = max_running
        self.waiting = deque(requests)
        self.running: dict[int, _Answer] = {}
        self.done: dict[int, Decoded] = {}
        self.finished = 0

    @property
    def over(self) -> bool:
        return not self.waiting and not self.running

    def step(self) -> list[int]:
        """Fills the engine up and steps it; returns the problems that ended."""
        while self.waiting and len(self.running) < self.max_running:
            index = self.waiting.popleft()
            self.running[self.engine.add(self.requests[index])] = _Answer(index)
        began = time.perf_counter()
        outputs = self.engine.step()
        share = (time.perf_counter() - began) / len(self.running)
        for answer in self.running.values():
            answer.seconds += share
        ended = []
        for output in outputs:
            answer = self.running[output.id]
            answer.tokens += output.tokens
            if answer.first is None and output.tokens:
                answer.first = answer.seconds
            if output.finished is not None:
                first = answer.seconds if answer.first is None else answer.first
                self.done[answer.index] = Decoded(
                    answer.tokens, answer.seconds, first, output.trace
                )
                del self.running[output.id]
                ended.append(answer.index)
        self.finished += len(ended)
        return ended


def decode_together(
    model: AdaptiveModel,
    prompts: Mapping[int, Sequence[int]],
    specs: Mapping[str, DecodingSpec],
    *,
    lengths: Mapping[int, int],
    end_tokens: Collection[int],
    max_running: int,
) -> Iterator[tuple[int, dict[str, Decoded]]]:
    """Yields each problem once all modes have answered it, greedily.

    Args:
        prompts: token ids by the number of the problem.
        specs: of each mode, in the order in which a problem's answers are to come.
        lengths: most tokens of each answer.
        max_running: answers that each engine decodes at a time.
    """
    engines = [
        _ModeEngine(
            model.engine(max_running=max_running),
            {
                index: Request(prompt, lengths[index], spec=spec, end_tokens=end_tokens)
                for index, prompt in prompts.items()
            },
            max_running,
        )
        for spec in specs.values()
    ]
    while left := [one for one in engines if not one.over]:
        for index in min(left, key=lambda one: one.finished).step():
            if all(index in one.done for one in engines):
                yield (
                    index,
                    {mode: one.done.pop(index) for mode, one in zip(specs, engines, strict=True)},
                )
