"""One step of the decode loop: which sequences are run through which segments.

The first segment runs for the sequences that can go on drafting or exiting there. A sequence that
cannot (its newest token did not exit) is *blocked* until a deep pass. A deep pass runs when enough
sequences are blocked, or one has waited long enough (`DeepSchedule`), and serves all of them at
once, with everything that is pending of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deliberate.config import KVMode
from deliberate.engine.exit_step import ExitStep
from deliberate.engine.loop_settings import Stopwatch
from deliberate.engine.multi_step import MultiStep
from deliberate.engine.proposed_drafts import ProposedDrafts, unfed
from deliberate.engine.row_states import newest
from deliberate.engine.sampled_steps import SampledSteps
from deliberate.engine.scheduler import DeepSchedule
from deliberate.engine.segment_runner import SegmentRunner
from deliberate.engine.sequence import DecodingSequence
from deliberate.engine.verifier import Verifier


class DecodeStep:
    """Steps of sequences that share passes, whatever each of them was asked for.

    Args:
        runner: runs the segments and keeps the pending states.
        exit_step: evaluates the exits.
        verifier: chooses and verifies tokens at full depth.
        multi_step: decodes several tokens in one call of the executor.
        schedule: when deep passes are run.
        stopwatch: reads the clock.

    Attributes:
        lone: whether one sequence runs and nobody joins it.
        proposed: passes over drafts that were proposed.
    """

    def __init__(
        self,
        runner: SegmentRunner,
        exit_step: ExitStep,
        verifier: Verifier,
        multi_step: MultiStep | None,
        schedule: DeepSchedule,
        stopwatch: Stopwatch,
    ) -> None:
        self._runner = runner
        self._exit_step = exit_step
        self._verifier = verifier
        self._schedule = schedule
        self._multi_step = multi_step
        self._last = len(runner.boundaries) - 1
        self.lone = False
        self._stopwatch = stopwatch
        self.proposed = ProposedDrafts(runner, verifier, multi_step, stopwatch)
        executor = None if multi_step is None else multi_step.executor
        self._sampled = SampledSteps(executor, runner, verifier, stopwatch)

    def recomputed(self, active: Sequence[DecodingSequence]) -> bool:
        """Recomputes sequences at the length where "longrope" changes its frequencies; if any."""
        switch = self._runner.backbone.rope_switch
        if switch is None:
            return False
        recomputed = [one for one in active if one.position == switch]
        for sequence in recomputed:
            near_ties = self._verifier.near_ties.get(sequence.index)
            if near_ties is not None:
                near_ties.begin(switch + 1)  # dense runs the same pass
            self._verifier.predict([sequence], self._runner.recompute(sequence))
        return bool(recomputed)

    def _joins(self, sequence: DecodingSequence) -> bool:
        """Whether a sequence that is not blocked takes part in a deep pass, to verify drafts."""
        if not sequence.exact:
            # It would be allowed to exit where alone it would not: its output would depend on
            # the others.
            return False
        limit = self._schedule.join * sequence.pending_limit
        enough = self._runner.pending_tokens(sequence) >= limit
        return enough and self._runner.pending_at_first_exit(sequence) > 0

    def due(self, active: Sequence[DecodingSequence]) -> list[DecodingSequence]:
        """Those that a deep pass should serve now; none where it is not due."""
        if not self._schedule.is_due(active):
            return []
        return [one for one in active if one.blocked or self._joins(one)]

    def shallow(
        self, ready: Sequence[DecodingSequence], active: Sequence[DecodingSequence] = ()
    ) -> int:
        """Feeds the newest tokens to the first segment; each then exits or is blocked.

        Where no exit is evaluated for any of them, they go through all layers at once.

        Args:
            ready: in rising rows, none of them blocked.
            active: all that are running: several drafts may be made in one call, until a deep pass
                of these is due. Empty: one token of each is fed.

        Returns:
            Passes of the first segment, where several sequences drafted in one call; else 1.
        """
        runner = self._runner
        counts = [1] * len(ready)
        if any(sequence.constraint is not None for sequence in ready):
            counts = [unfed(runner, sequence) for sequence in ready]
        for planner in {id(p): p for one in ready if (p := one.planner) is not None}.values():
            planner.token_fed(min(counts))
        stop = self._next_stop(0, ready)
        lookup = ready[0].lookup
        if lookup is not None and self.lone:
            self.proposed.alone(lookup, ready[0])
            return 1
        if stop == self._last and any(one.lookup is not None for one in ready):
            self.proposed.together(ready, counts)
            return 1
        if stop == self._last and max(counts) == 1 and self._sampled.decode(ready):
            return 1
        if len(ready) == 1 and self._run_multi_step(ready[0], stop):
            return 1
        multi_step = self._multi_step
        if stop == 0 and active and multi_step is not None and multi_step.can_draft_rows(ready):
            enough, patience = self._schedule.until_due(active)
            waiting = any(sequence.blocked for sequence in active)
            return multi_step.draft_rows(ready, enough, patience, waiting=waiting)
        most = max(counts)
        tokens = [
            sequence.newest_tokens(count) + [0] * (most - count)
            for sequence, count in zip(ready, counts, strict=True)
        ]
        ids = torch.tensor(tokens, device=runner.backbone.device)
        hidden = runner.run(0, ready, ids, counts, through=stop)
        if stop == self._last:
            self._verifier.predict_after(ready, hidden, counts)
            return 1
        if stop > 0:
            for sequence in ready:
                sequence.blocked = True
            self._exit_or_continue(stop, ready, hidden, counts)
            return 1
        exiting = self._exit_step.evaluate(0, ready, newest(hidden, counts))
        for sequence in ready:
            sequence.blocked = sequence not in exiting
            sequence.waited = 0
        self._keep_pending(0, exiting, ready, hidden, counts)
        return 1

    def _keep_pending(
        self,
        k: int,
        exiting: Sequence[DecodingSequence],
        rows: Sequence[DecodingSequence],
        hidden: Tensor,
        counts: Sequence[int],
    ) -> None:
        """Keeps ``hidden [R, M, d]`` as pending at exit `k`, where tokens are deferred."""
        passing = [sequence for sequence in exiting if not sequence.defers]
        if not passing:
            self._runner.add_pending(k, rows, hidden, counts)
            return
        self._runner.pass_by(k, passing, rows, hidden)
        stay = [place for place, sequence in enumerate(rows) if sequence not in passing]
        if stay:
            kept = [rows[place] for place in stay]
            self._runner.add_pending(k, kept, hidden[stay], [counts[place] for place in stay])

    def _run_multi_step(self, sequence: DecodingSequence, stop: int) -> bool:
        """Lets the executor decode several tokens up to a boundary, if it can; whether it did."""
        full = stop == self._last
        multi_step = self._multi_step
        if multi_step is None or not multi_step.possible(sequence, None if full else stop):
            return False
        if full:
            multi_step.full_depth(sequence)
            return True
        if not sequence.defers or not sequence.is_enabled(stop):
            return False
        limit, threshold = sequence.pending_limit, sequence.thresholds[stop]
        if not multi_step.draft(sequence, stop, limit, threshold):
            return False
        if sequence.blocked and stop > 0:
            self._continue(stop + 1, [sequence], *self._runner.take_pending(stop, [sequence]))
        return True

    def deep(self, rows: Sequence[DecodingSequence]) -> None:
        """Runs the upper segments for these sequences and all that is pending of them."""
        rows = sorted(rows, key=lambda sequence: sequence.row)
        hidden, counts = self._runner.take_pending(0, rows)
        self._continue(1, rows, hidden, counts)

    def _continue(
        self, k: int, rows: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> None:
        """Runs ``hidden [R, M, d]`` through segment `k` and on, to the next stop or full depth."""
        stop = self._next_stop(k, rows)
        hidden = self._runner.run(k, rows, hidden, counts, through=stop)
        if stop == self._last:
            self._verifier.complete(rows, hidden, counts)
        else:
            self._exit_or_continue(stop, rows, hidden, counts)

    def _exit_or_continue(
        self, k: int, rows: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> None:
        """At exit `k`: some newest tokens exit, the others go on with what is pending there."""
        runner = self._runner
        candidates = [index for index, sequence in enumerate(rows) if sequence.blocked]
        began = self._stopwatch.work() if len(rows) > 1 and runner.planners else None
        states = newest(hidden, counts)
        chosen = [rows[index] for index in candidates]
        if len(candidates) < len(rows):
            states = states[candidates]
        exiting = self._exit_step.evaluate(k, chosen, states) if chosen else []
        for sequence in exiting:
            sequence.blocked = False
        staying: Sequence[DecodingSequence] = rows
        if exiting or runner.has_pending(k, rows):
            self._keep_pending(k, exiting, rows, hidden, counts)
            staying = [sequence for sequence in rows if sequence not in exiting]
            if staying:
                hidden, counts = runner.take_pending(k, staying)
        if began is not None and chosen:
            for planner in runner.planners:
                planner.handled(k, len(chosen), self._stopwatch.work() - began)
        if staying:
            self._continue(k + 1, staying, hidden, counts)

    def _next_stop(self, k: int, rows: Sequence[DecodingSequence]) -> int:
        """The first boundary from `k` on that is evaluated, has pending tokens, or is the last."""
        if any(sequence.settings.kv_mode is KVMode.SKIP for sequence in rows):
            return k  # each segment has holes of its own
        # Without exits nothing is ever pending of a sequence.
        own = [sequence for sequence in rows if sequence.settings.exits]
        if not own:
            return self._last
        runner = self._runner
        while k < self._last and not runner.has_pending(k, own):
            if any(sequence.is_enabled(k) for sequence in own):
                break
            k += 1
        return k
