"""Several tokens of one sequence, or of each of several, in one call of the executor.

Greedy drafting needs nothing from the decode loop but the exit's own choice, and full-depth passes
need not even that. Then the executor decodes until a token does not exit, and the loop records
afterwards what was done: the same tokens, passes and counts as step by step. The seconds of a token
are those at which the loop learned of it.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence
from typing import Any

from deliberate.cache.block_cache import BlockCache
from deliberate.config import MAX_CALL_STEPS
from deliberate.engine.loop_settings import Stopwatch
from deliberate.engine.ngram_drafts import DraftSource
from deliberate.engine.segment_runner import SegmentRunner
from deliberate.engine.sequence import DecodingSequence
from deliberate.kernels.native_drafts import DraftRow
from deliberate.modeling.exit_heads import ExitReader
from deliberate.trace import MultiStepRecord


class MultiStep:
    """Decodes several tokens of the only sequence of a batch at a time.

    Args:
        reader: of the exits, for the executor; None for dense.
        runner: has the layers and the cache, and counts the passes.
        stopwatch: reads the clock.
        any_row: the sequence may have any row of a cache of several; who sets its `multi_step` sees
            to it that no other is decoded.

    Attributes:
        executor: of several steps, what `Backbone.multi_step` returned.
    """

    def __init__(
        self,
        reader: ExitReader | None,
        runner: SegmentRunner,
        stopwatch: Stopwatch,
        *,
        any_row: bool = False,
    ) -> None:
        self.executor = runner.backbone.multi_step(reader)
        self._any_row = any_row and self._takes_rows()
        self._runner = runner
        self._stopwatch = stopwatch

    def _takes_rows(self) -> bool:
        """Whether the executor can decode in another row than the first."""
        decode = getattr(self.executor, "decode", None)
        return decode is not None and "row" in inspect.signature(decode).parameters

    def possible(self, sequence: DecodingSequence, exit_index: int | None) -> bool:
        """Whether the executor can decode to this exit, or to full depth (None), by itself."""
        alone = self._any_row or self._runner.cache.batch == 1
        if self.executor is None or not sequence.multi_step or not alone:
            return False
        serves = getattr(self.executor, "serves", None)
        if serves is not None and not serves(self._runner.cache):
            return False
        return exit_index is None or self.executor.can_evaluate(exit_index)

    def full_depth(self, sequence: DecodingSequence, most: int = MAX_CALL_STEPS) -> int:
        """Decodes at most so many tokens through all layers, all accepted; returns how many."""
        settings = sequence.settings
        steps = min(most, MAX_CALL_STEPS, settings.max_new_tokens - len(sequence.records))
        if sequence.planner is not None:
            steps = max(1, min(steps, sequence.planner.disabled_tokens))
        stops, steps = sequence.next_ends(steps)
        last, start = len(self._runner.boundaries) - 1, sequence.position
        decoded = self._decode(
            sequence,
            last,
            steps=steps,
            requested=steps,
            threshold=-math.inf,
            stops=stops,
            accept_stops=True,
        )
        _fed(sequence, len(decoded.tokens))
        depth = self._runner.boundaries[last]
        for token, score in zip(decoded.tokens, decoded.scores, strict=True):
            confidence = score if sequence.confident else float("nan")
            seconds = self._stopwatch.clock() - sequence.began
            sequence.add(token, depth, confidence, seconds, verified=True)
        sequence.verified = len(sequence.records)
        if sequence.lookup is not None:
            sequence.lookup.saw(start, decoded.states)
        return len(decoded.tokens)

    def drafted(self, sequence: DecodingSequence, source: DraftSource) -> bool:
        """Decodes several passes with drafts of this source in one call, if it and the executor
        can; whether they did.

        Rejected drafts are rolled back in it: the tokens, counts and layers are those of pass by
        pass.
        """
        # Where other tokens end the output from some token on, a call ends before it.
        stops, left = sequence.next_ends(sequence.settings.max_new_tokens - len(sequence.records))
        plain = sequence.planner is None and not sequence.confident
        if left < 2 or not plain or not hasattr(self.executor, "decode_drafted"):
            return False
        runner, start = self._runner, sequence.position
        room = MAX_CALL_STEPS * (1 + source.most)
        if isinstance(runner.cache, BlockCache):  # the blocks that the scheduler has set aside
            room = max(MAX_CALL_STEPS, 1 + source.most)
        # The prefix may begin with padding.
        text = sequence.ids(len(sequence.records))[-start - 1 :]
        plan = source.plan(text, room) if len(text) == start + 1 else None
        if plan is None:
            return False
        layers = runner.boundaries[-1]
        self._check_held(sequence, layers, runner.cache.length(layers - 1, sequence.row))
        began = self._stopwatch.work()
        made = self.executor.decode_drafted(
            text,
            runner.cache,
            room=min(room, plan.passes * (1 + plan.widest)),
            row=sequence.row,
            passes=plan.passes,
            left=left,
            stops=stops,
            layer=plan.layer,
            model=plan.model,
            lookup=plan.lookup,
        )
        took = self._stopwatch.work() - began
        measured = sum(one.drafting + one.verifying for one in made.passes)
        source.note_passes(made, start, took / measured if measured else 0.0)
        runner.note_drafted(sequence, start, [(one.drafted, one.accepted) for one in made.passes])
        sequence.blocked, sequence.waited = False, 0
        sequence.deep_passes += len(made.passes)
        sequence.add_verified(made, layers, self._stopwatch.clock() - sequence.began)
        return True

    def draft(self, sequence: DecodingSequence, k: int, limit: int, threshold: float) -> bool:
        """Decodes through the layers below exit `k` until a token does not exit there.

        The states of all of them are pending at the exit afterwards.

        Args:
            limit: tokens that may be pending above the exit, including those that already are.

        Returns:
            Whether anything was done; not where the next token may not exit anyway.
        """
        settings, exact = sequence.settings, sequence.exact
        room = limit - self._runner.pending_tokens(sequence)
        # Exact mode chooses the last token of the output at full depth.
        left = settings.max_new_tokens - len(sequence.records) - exact
        evaluated = min(room, left)
        if evaluated < 1:
            return False
        # The token after the last that may exit is fed too, unless the output ends before it, or
        # other tokens end the output from there on.
        stops, evaluated = sequence.next_ends(evaluated)
        more = evaluated == min(room, left) and (exact or room < left)
        decoded = self._decode(
            sequence,
            k,
            steps=evaluated + more,
            requested=evaluated,
            threshold=threshold,
            stops=stops,
            accept_stops=not exact,
        )
        passes = len(decoded.states)
        _fed(sequence, passes)
        layer = self._runner.boundaries[k]
        for index, (token, score) in enumerate(zip(decoded.tokens, decoded.scores, strict=True)):
            exits = index < decoded.accepted
            self._runner.batch.reads.append((k, 1))
            if exits:
                sequence.draft(token, layer, score, self._stopwatch.clock() - sequence.began)
        if sequence.planner is not None:
            sequence.planner.evaluated(k, True, decoded.accepted)
            sequence.planner.evaluated(k, False, len(decoded.tokens) - decoded.accepted)
        sequence.blocked, sequence.waited = decoded.accepted < passes, 0
        self._runner.add_pending(k, [sequence], decoded.states.unsqueeze(0), [passes])
        return True

    def can_draft_rows(self, sequences: Sequence[DecodingSequence]) -> bool:
        """Whether the executor can draft for all of these at the first exit by itself."""
        return (
            hasattr(self.executor, "draft_rows")
            and all(one.multi_draft and one.is_enabled(0) for one in sequences)
            and self.executor.can_evaluate(0)
        )

    def draft_rows(
        self, sequences: Sequence[DecodingSequence], enough: int, patience: int, *, waiting: bool
    ) -> int:
        """Drafts tokens at the first exit for sequences in rising rows that share passes.

        Args:
            enough: of these sequences may become blocked; the call ends then.
            patience: passes after the first of them is blocked at which it ends; from the beginning
                on where others are `waiting` blocked.

        Returns:
            Passes that were run.
        """
        runner = self._runner
        limits = []
        for sequence in sequences:
            # The last token of the output is chosen at full depth.
            left = sequence.settings.max_new_tokens - len(sequence.records) - 1
            room = sequence.pending_limit - runner.pending_tokens(sequence)
            limits.append(max(0, min(room, left)))
        made = self._draft(sequences, limits, enough=enough, patience=patience, waiting=waiting)
        passes, layer = len(made.seconds), runner.boundaries[0]
        now = self._stopwatch.clock()
        for sequence, decoded in zip(sequences, made.rows, strict=True):
            seconds, planner = now - sequence.began, sequence.planner
            drafts = zip(decoded.tokens, decoded.scores, strict=True)
            for token, score in itertools.islice(drafts, decoded.accepted):
                sequence.draft(token, layer, score, seconds)
            if planner is not None:
                planner.evaluated(0, True, decoded.accepted)
                planner.evaluated(0, False, len(decoded.tokens) - decoded.accepted)
            run = len(decoded.states)
            sequence.blocked = decoded.accepted < run
            sequence.waited = passes - run if sequence.blocked else 0
        for planner in {id(p): p for one in sequences if (p := one.planner) is not None}.values():
            planner.token_fed(passes - 1)
        counts = [len(one.states) for one in made.rows]
        runner.add_pending(0, sequences, made.states[:, : max(counts)], counts)
        return passes

    def _decode(self, sequence: DecodingSequence, k: int, **how: Any) -> Any:
        """Has the executor decode the only sequence through the layers below boundary `k`.

        Args:
            **how: for `deliberate.executors.fused.native.NativeMultiStep.decode`.
        """
        runner, executor = self._runner, self.executor
        full, last = k == len(runner.boundaries) - 1, runner.boundaries[k]
        start = runner.cache.length(last - 1, sequence.row)
        self._check_held(sequence, last, start)
        if sequence.row:
            how["row"] = sequence.row
        began = self._stopwatch.work() if runner.planners else 0.0
        decoded = executor.decode(
            None if full else k, last, sequence.newest, start, runner.cache, **how
        )
        passes = len(decoded.states)
        for planner in runner.planners if k == 0 else ():
            each = (self._stopwatch.work() - began) / passes - planner.read_seconds(0)
            planner.segment(0, 1, 1, max(each, 0.0), passes)
        batch = runner.batch
        read = 0 if full else len(decoded.tokens)
        batch.runs.append(MultiStepRecord(len(batch.passes), len(batch.reads), k, passes, read))
        runner.note_steps(k, sequence, start, passes)
        return decoded

    def _check_held(self, sequence: DecodingSequence, last: int, held: int) -> None:
        """Raises unless layers 0..last-1 hold all tokens before the newest one."""
        if held != sequence.position:
            raise RuntimeError(
                f"token at position {sequence.position}: layers 0..{last - 1} hold {held} tokens, "
                "but must hold all tokens before it"
            )

    def _draft(
        self, sequences: Sequence[DecodingSequence], limits: Sequence[int], **how: Any
    ) -> Any:
        """Has the executor draft for several sequences through the layers below the first exit.

        Args:
            limits: of each, most drafts.
            **how: for `deliberate.executors.fused.native.NativeMultiStep.draft_rows`.
        """
        runner = self._runner
        cache, last = runner.cache, runner.boundaries[0]
        rows = []
        for sequence, limit in zip(sequences, limits, strict=True):
            start = cache.length(last - 1, sequence.row)
            # No further block than the step's own, which the scheduler has set aside.
            most = max(1, -start % cache.block_size) if isinstance(cache, BlockCache) else limit + 1
            stops, most = sequence.next_ends(most)
            rows.append(
                DraftRow(
                    sequence.row,
                    sequence.newest,
                    start,
                    steps=min(limit + 1, most),
                    requested=min(limit, most),
                    threshold=sequence.thresholds[0],
                    stops=tuple(stops),
                )
            )
        made = self.executor.draft_rows(0, last, rows, cache, **how)
        runs = [len(one.states) for one in made.rows]
        for index, seconds in enumerate(made.seconds):
            own = [place for place, run in enumerate(runs) if index < run]
            read = sum(index < len(made.rows[place].tokens) for place in own)
            if read:
                runner.batch.reads.append((0, read))
            for planner in runner.planners:
                planner.segment(0, len(own), len(own), seconds)
            ends = max(rows[place].start for place in own) + index + 1
            runner.note(0, 0, [sequences[place] for place in own], [1] * len(own), ends)
        return made


def _fed(sequence: DecodingSequence, tokens: int) -> None:
    """Tells the planner of the tokens after the first, of which it has been told already."""
    if sequence.planner is not None:
        sequence.planner.token_fed(tokens - 1)
