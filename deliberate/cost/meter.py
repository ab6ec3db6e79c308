"""Pricing what a generation ran: counts of passes and reads into predicted seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deliberate.cost.model import CostModel
from deliberate.cost.parts import Staleness
from deliberate.trace import MultiStepRecord


@dataclass(frozen=True)
class Work:
    """What a generation ran, as the decode loop counts it; the lists may still grow.

    Attributes:
        layers: the exits that the loop used; empty for dense.
        passes: (segment, sequences, tokens per sequence padded, keys looked at) of each pass after
            the prompts; the keys are the longest context, the pass's own tokens included.
        prompts: sequences and longest length of the prompts' pass; None leaves it out.
        verifies: every state that reaches the top is read by the head, not only the newest.
        reads: (exit, rows) of each call of the exit reader; None where they were not counted, and
            every pass below the top is taken to end in one.
        deliberation_rounds: tokens of each round of a deliberation gate; None where none was on.
        runs: which of the passes and reads were steps of one call, in order.
        prefills: passes over prompts that were run in between, each segment by itself, as `passes`.
    """

    layers: Sequence[int]
    passes: Sequence[tuple[int, int, int, int]]
    prompts: tuple[int, int] | None = None
    verifies: bool = False
    reads: Sequence[tuple[int, int]] | None = None
    deliberation_rounds: Sequence[int] | None = None
    runs: Sequence[MultiStepRecord] = ()
    prefills: Sequence[tuple[int, int, int, int]] = ()


class WorkMeter:
    """Running total of the predicted seconds of what a generation has run so far.

    Each call prices only what was added to the lists of `work` since the call before.
    """

    def __init__(self, cost: CostModel, work: Work) -> None:
        self._cost = cost = cost.restricted(work.layers)
        self._work = work
        self._top = len(cost.segments) - 1
        self._passes = self._reads = self._rounds_counted = self._runs = self._prefills = 0
        self._multi_step = _MultiStepRuns()
        self._last = self._top
        self._staleness = Staleness(cost.boundaries, cost.memory)
        self._seconds = 0.0
        if work.prompts is not None:
            sequences, longest = work.prompts
            self._seconds = cost.prompt_seconds(longest, sequences)
            if work.deliberation_rounds is None:
                self._seconds -= cost.remember_seconds

    def seconds(self) -> float:
        """Predicted seconds of everything run until now."""
        cost, work, top = self._cost, self._work, self._top
        total, multi_step = self._seconds + self._run_multi_step(), self._multi_step
        for segment, batch, tokens, keys in work.prefills[self._prefills :]:
            total += cost.segments[segment].prompt.seconds(batch, tokens, keys)
            if segment == top:
                total += cost.step + cost.head.seconds(batch, 1, 0)
        self._prefills = len(work.prefills)
        # Staleness of each segment's passes, summed, and their number: reads share it.
        stales: dict[int, tuple[float, int]] = {}
        for index in range(self._passes, len(work.passes)):
            segment, batch, tokens, keys = work.passes[index]
            stale = self._staleness.run(segment)
            if index in multi_step.passes:
                self._last = segment
                continue
            total += cost.segments[segment].seconds(batch, tokens, keys - tokens, stale)
            if segment == 0:
                total += cost.step
                if cost.gated and self._last != top:
                    total += cost.head_seconds  # the step before exited by a gate
            self._last = segment
            if segment == top:
                total += cost.head.seconds(batch, tokens if work.verifies else 1, 0)
                if work.deliberation_rounds is not None:
                    total += cost.remember_seconds
            elif work.reads is None:
                total += cost.reads[segment].seconds(batch, 1, 0, stale)
            else:
                before, count = stales.get(segment, (0.0, 0))
                stales[segment] = (before + stale, count + 1)
        self._passes = len(work.passes)
        if work.reads is not None:
            for index in range(self._reads, len(work.reads)):
                if index in multi_step.reads:
                    continue
                exit_index, rows = work.reads[index]
                summed, count = stales.get(exit_index, (1.0, 1))
                total += cost.reads[exit_index].seconds(rows, 1, 0, summed / count)
            self._reads = len(work.reads)
        if work.deliberation_rounds is not None and cost.deliberation is not None:
            for tokens in work.deliberation_rounds[self._rounds_counted :]:
                total += cost.deliberation.round.seconds(1, tokens, 0)
            self._rounds_counted = len(work.deliberation_rounds)
        self._multi_step.forget()
        self._seconds = total
        return total

    def _run_multi_step(self) -> float:
        """Seconds of the runs not yet counted; notes which passes and reads are theirs.

        Without the executor's cost of runs their passes are counted one by one, which is too much.
        """
        cost, total = self._cost.multi_step, 0.0
        if cost is None:
            return total
        for run in self._work.runs[self._runs :]:
            context = self._work.passes[run.first][3] - 1
            total += cost.seconds(run.boundary, run.steps, context)
            self._multi_step.note(run)
        self._runs = len(self._work.runs)
        return total


class _MultiStepRuns:
    """Indices of the passes and reads that belong to runs."""

    def __init__(self) -> None:
        self.passes: set[int] = set()
        self.reads: set[int] = set()

    def note(self, run: MultiStepRecord) -> None:
        self.passes.update(range(run.first, run.first + run.steps * (run.boundary + 1)))
        self.reads.update(range(run.read, run.read + run.evaluated))

    def forget(self) -> None:
        self.passes.clear()
        self.reads.clear()


def predict_seconds(cost: CostModel, work: Work) -> float:
    """Seconds of a whole generation from the counts of what it ran."""
    return WorkMeter(cost, work).seconds()
