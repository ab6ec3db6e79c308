"""An engine of one generation: its rows are all added before the first step, and nobody joins them.

Steps, passes and requests are those of `deliberate.engine.engine`. Only the scheduler has nothing
to choose: the prompts are one pass, and every further step runs what can go on or, where enough
sequences are blocked, a deep pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from deliberate.engine.admitted import Admitted, StepOutput
from deliberate.engine.engine import Engine
from deliberate.engine.loop_settings import Stopwatch
from deliberate.engine.request import Request
from deliberate.engine.sequence import DecodingSequence
from deliberate.trace import BatchTrace


class ClosedEngine(Engine):
    """Decodes the rows of one generation; stepped by `advance`.

    Args:
        *args: of `Engine`.
        stopwatch: of the generation.
        trace: of all that it runs; no step empties it.
        keep_rows: finished sequences keep their cache rows. Else the cache drops these, and the
            rows of the others are numbered anew.
        **settings: of `Engine`.
    """

    def __init__(
        self, *args: Any, stopwatch: Stopwatch, trace: BatchTrace, keep_rows: bool, **settings: Any
    ) -> None:
        super().__init__(*args, stopwatch=stopwatch, trace=trace, **settings)
        self._began = stopwatch.began
        self._keep_rows = keep_rows

    def step(self) -> list[StepOutput]:
        """Not of a generation, whose tokens are read from its sequences.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("an engine of one generation is stepped by advance")

    @torch.inference_mode()
    def advance(self) -> None:
        """One step: the prompts first, then passes; sequences have their new tokens after it."""
        with self._lock, self._turn():
            if self._waiting:
                self._run_prompts()
            elif self._running:
                self._decode_running()
            for entry in list(self._running.values()):
                if entry.sequence.is_complete():
                    entry.end(self._clock())
                    self._end(entry)

    def finish(self, number: int) -> None:
        """Ends a request with the tokens that it has, where it runs; between two steps."""
        with self._lock:
            entry = self._running.get(number)
            if entry is not None:
                entry.end(self._clock())
                self._end(entry)

    def close(self, sequences: Sequence[DecodingSequence]) -> None:
        """Counts what was launched for these and discarded; nothing follows."""
        self._runner.count_discarded(sequences, final=True)

    @torch.inference_mode()
    def catch_up(self, sequences: Sequence[DecodingSequence]) -> None:
        """After the end, where rows are kept: runs the upper layers for all pending tokens, so that
        keys and values are complete."""
        for sequence in sequences:
            if sequence.index in self._near_ties:
                self._near_ties[sequence.index].finish(sequence)
        self._runner.catch_up(sequences)

    def _take_up(self, request: Request) -> tuple[Request, float]:
        # Who asked for the generation has checked its prompts.
        if self._backbone.contexts.takes_rows:
            seen = self._backbone.hold(request.prompt_ids)
            request = dataclasses.replace(request, seen=seen)
        return request, self._began

    def _end(self, entry: Admitted) -> None:
        del self._running[entry.number]

    def _run_prompts(self) -> None:
        """Runs all prompts through all layers, in one pass where they are not strict mode's."""
        waiting = list(self._waiting.values())
        self._run_prefill([(one.number, 0, len(one.refill.tokens)) for one in waiting])
        self._trace.prefills.clear()
        for entry in waiting:
            entry.plan_drafts(len(waiting))
        # One planner serves all rows of a generation.
        planner = waiting[0].sequence.planner
        self._runner.planners = () if planner is None else (planner,)

    def _decode_running(self) -> None:
        """Runs what can go on, or a deep pass where it is due, and tells policy and planner."""
        self._drop_finished()
        sequences = [entry.sequence for entry in self._running.values()]
        first = self._running[sequences[0].index]
        planners = self._runner.planners
        began = self._work() if planners else 0.0
        before = sum(one.verified for one in sequences) if planners else 0
        if first.policy_run.changes:  # it is that of all of them
            first.policy_run.step(self._clock(), len(sequences))
        if len(sequences) == 1 and self._backbone.rope_switch is None:
            self._run_alone(first)
        else:
            deep = self._decode.due(sequences)
            self._run_passes([] if deep else [one for one in sequences if not one.blocked], deep)
        self._runner.count_discarded(sequences)
        for planner in planners:
            verified = sum(one.verified for one in sequences)
            planner.progress(self._work() - began, verified - before)

    def _run_alone(self, entry: Admitted) -> None:
        """As `_run_passes` of one sequence, whose every pass is due at once."""
        sequence, decode = entry.sequence, self._decode
        if not sequence.blocked:
            decode.lone, sequence.multi_step = True, entry.steady
            decode.shallow([sequence], [sequence])
        if sequence.blocked:
            decode.deep([sequence])

    def _drop_finished(self) -> None:
        """Drops the cache rows of finished sequences, unless they are to be kept."""
        if not self._keep_rows and len(self._running) < self._cache.batch:
            self._runner.compact([entry.sequence for entry in self._running.values()])
