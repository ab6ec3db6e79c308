"""Fitting the parts of a cost model to times.

Coefficients are at least 0 and least squares of relative errors (Lawson & Hanson, 1974).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import nnls

from deliberate.cost.parts import MultiStepCost, PassCost, SegmentCost, Staleness, WarmCost

# Values tried for `CostModel.memory`.
_MEMORIES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8)


@dataclass
class TimedPart:
    """One part of a decode that was run several times over.

    Attributes:
        part: "segment", "read" (right after its segment), "head", "step" or "prompt".
        index: of the segment or the exit.
        batch: sequences; for the head, rows.
        tokens: of each.
        context: tokens cached before; for a prompt, its length.
        samples: seconds, one per run.
    """

    part: str
    index: int
    batch: int
    tokens: int
    context: int
    samples: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Their median."""
        # A clock too coarse for the part gives 0; a nanosecond keeps the relative error defined.
        return max(statistics.median(self.samples), 1e-9)


def best_fit(timed: Sequence[TimedPart], boundaries: Sequence[int]) -> Fit:
    """The fit of the times of a decode, in its order, with the memory that explains them best.

    Args:
        boundaries: layers below each exit, and last all of them.
    """
    return min((Fit(timed, boundaries, memory) for memory in _MEMORIES), key=lambda fit: fit.loss)


class Fit:
    """Coefficients for one value of the cache's memory, and how well they explain the times.

    Attributes:
        segments, reads, head, step, memory: as in `CostModel`.
        errors: relative error of every time.
        loss: sum of their squares.
    """

    def __init__(
        self, timed: Sequence[TimedPart], boundaries: Sequence[int], memory: float
    ) -> None:
        self.memory = memory
        self.errors: list[float] = []
        self.loss = 0.0
        tracker = Staleness(boundaries, memory)
        stale: list[float] = []
        for part in timed:
            if part.part in ("segment", "prompt"):
                stale.append(tracker.run(part.index))
            else:  # a read follows its own segment
                stale.append(stale[-1] if part.part == "read" else 1.0)
        self._parts = list(zip(timed, stale, strict=True))
        count = len(boundaries)
        self.segments = tuple(
            SegmentCost(
                self._fitted("segment", k, ("per_key",), single=True),
                self._fitted("segment", k, ("per_row", "per_key", "per_pair"), single=False),
                self._fitted("prompt", k, ("per_row", "per_pair"), warms=False).cold,
            )
            for k in range(count)
        )
        self.reads = tuple(self._fitted("read", k, ("per_row",)) for k in range(count - 1))
        self.head = self._fitted("head", 0, ("per_row",), warms=False).cold
        self.step = statistics.median(part.seconds for part in timed if part.part == "step")

    def steps_alone(self) -> list[PassCost]:
        """One token of one sequence from its embedding to each exit's answer, and to the top's."""
        below, answers = PassCost(self.step), [*(read.cold for read in self.reads), self.head]
        found = []
        for segment, answer in zip(self.segments, answers, strict=True):
            below = below + segment.single.cold
            found.append(below + PassCost(answer.seconds(1, 1, 0)))
        return found

    def _fitted(
        self,
        name: str,
        index: int,
        terms: Sequence[str],
        *,
        single: bool | None = None,
        warms: bool = True,
    ) -> WarmCost:
        chosen = [
            (part, stale)
            for part, stale in self._parts
            if part.part == name
            and part.index == index
            and (single is None or single == (part.batch * part.tokens == 1))
        ]
        seconds = np.array([part.seconds for part, _ in chosen])
        columns = [np.ones(len(chosen))]
        if warms:
            columns.append(np.array([stale for _, stale in chosen]))
        columns += [np.array([_TERMS[term](part) for part, _ in chosen]) for term in terms]
        matrix = np.stack(columns, axis=1)
        # Columns of like size keep the solver well conditioned.
        scale = np.maximum(matrix.max(axis=0), 1e-30)
        solution, residual = nnls(matrix / scale / seconds[:, None], np.ones(len(chosen)))
        self.loss += float(residual) ** 2
        found = [float(value) for value in solution / scale]
        self.errors += [float(e) for e in np.abs(matrix @ found / seconds - 1)]
        warm, saved, rest = (found[0], found[1], found[2:]) if warms else (found[0], 0.0, found[1:])
        return WarmCost(PassCost(warm + saved, **dict(zip(terms, rest, strict=True))), saved)


def fit_multi_step(
    alone: Sequence[PassCost], single: Sequence[TimedPart], several: Sequence[TimedPart]
) -> MultiStepCost:
    """Calls of steps ahead from the times of calls with one step and with several.

    Args:
        alone: a step to each exit and to the top by itself; what a boundary costs that was not
            timed, because the executor does not run ahead to it.
        single, several: alike but for their `tokens`, which are steps; `index` is the boundary.
    """
    calls: list[float] = []
    steps: list[PassCost] = []
    for k, by_itself in enumerate(alone):
        pairs = [pair for pair in zip(single, several, strict=True) if pair[0].index == k]
        if not pairs:
            calls.append(0.0)
            steps.append(by_itself)
            continue
        # Of the same round and so of the same speed of the machine.
        each = [
            max(
                statistics.median(
                    (more - one) / (many.tokens - few.tokens)
                    for one, more in zip(few.samples, many.samples, strict=True)
                ),
                1e-9,
            )
            for few, many in pairs
        ]
        columns = np.stack([np.ones(len(pairs)), [few.context for few, _ in pairs]], axis=1)
        scale = columns.max(axis=0)
        found, _ = nnls(columns / scale / np.array(each)[:, None], np.ones(len(pairs)))
        base, per_key = (float(value) for value in found / scale)
        steps.append(PassCost(base, per_key=per_key))
        beside = [
            max(0.0, few.seconds - few.tokens * step)
            for (few, _), step in zip(pairs, each, strict=True)
        ]
        calls.append(statistics.median(beside))
    return MultiStepCost(tuple(calls), tuple(steps))


_TERMS: Mapping[str, Callable[[TimedPart], float]] = {
    "per_row": lambda part: part.batch * part.tokens,
    "per_key": lambda part: part.batch * part.context,
    "per_pair": lambda part: part.batch * part.tokens * part.context,
}
