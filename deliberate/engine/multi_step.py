"""Several tokens of one sequence in one call of the executor.

Greedy drafting needs nothing from the decode loop but the exit's own choice, and full-depth passes
need not even that. Then the executor decodes until a token does not exit, and the loop records
afterwards what was done: the same tokens, passes and counts as step by step. The seconds of a token
are those at which the loop learned of it.
"""

from __future__ import annotations

import inspect
import math

from deliberate.config import MAX_CALL_STEPS
from deliberate.engine.loop_settings import Stopwatch
from deliberate.engine.segment_runner import SegmentRunner
from deliberate.engine.sequence import DecodingSequence
from deliberate.modeling.exit_heads import ExitReader


class MultiStep:
    """Decodes several tokens of the only sequence of a batch at a time.

    Args:
        reader: of the exits, for the executor; None for dense.
        runner: has the layers and the cache, and counts the passes.
        stopwatch: reads the clock.
        any_row: the sequence may have any row of a cache of several; who sets its `multi_step` sees
            to it that no other is decoded.
    """

    def __init__(
        self,
        reader: ExitReader | None,
        runner: SegmentRunner,
        stopwatch: Stopwatch,
        *,
        any_row: bool = False,
    ) -> None:
        self._executor = runner.backbone.multi_step(reader)
        self._any_row = any_row and self._takes_rows()
        self._runner = runner
        self._stopwatch = stopwatch

    def _takes_rows(self) -> bool:
        """Whether the executor can decode in another row than the first."""
        decode = getattr(self._executor, "decode", None)
        return decode is not None and "row" in inspect.signature(decode).parameters

    def possible(self, sequence: DecodingSequence, exit_index: int | None) -> bool:
        """Whether the executor can decode to this exit, or to full depth (None), by itself."""
        alone = self._any_row or self._runner.cache.batch == 1
        if self._executor is None or not sequence.multi_step or not alone:
            return False
        serves = getattr(self._executor, "serves", None)
        if serves is not None and not serves(self._runner.cache):
            return False
        return exit_index is None or self._executor.can_evaluate(exit_index)

    def full_depth(self, sequence: DecodingSequence, most: int = MAX_CALL_STEPS) -> int:
        """Decodes at most so many tokens through all layers, all accepted; returns how many."""
        settings = sequence.settings
        steps = min(most, MAX_CALL_STEPS, settings.max_new_tokens - len(sequence.records))
        if sequence.planner is not None:
            steps = max(1, min(steps, sequence.planner.disabled_tokens))
        last = len(self._runner.boundaries) - 1
        decoded = self._runner.decode(
            self._executor,
            sequence,
            last,
            steps=steps,
            requested=steps,
            threshold=-math.inf,
            stops=settings.end_tokens,
            accept_stops=True,
        )
        _fed(sequence, len(decoded.tokens))
        depth = self._runner.boundaries[last]
        for token, score in zip(decoded.tokens, decoded.scores, strict=True):
            confidence = score if settings.exits else float("nan")
            seconds = self._stopwatch.clock() - sequence.began
            sequence.add(token, depth, confidence, seconds, verified=True)
        sequence.verified = len(sequence.records)
        return len(decoded.tokens)

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
        # The token after the last that may exit is fed too, unless the output ends before it.
        more = exact or room < left
        decoded = self._runner.decode(
            self._executor,
            sequence,
            k,
            steps=evaluated + more,
            requested=evaluated,
            threshold=threshold,
            stops=settings.end_tokens,
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
                sequence.planner.evaluated(k, exits)
        sequence.blocked, sequence.waited = decoded.accepted < passes, 0
        self._runner.add_pending(k, [sequence], decoded.states.unsqueeze(0), [passes])
        return True


def _fed(sequence: DecodingSequence, tokens: int) -> None:
    """Tells the planner of the tokens after the first, of which it has been told already."""
    if sequence.planner is not None:
        for _ in range(tokens - 1):
            sequence.planner.token_fed()
