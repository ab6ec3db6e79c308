"""Early exits: which tokens exit at an exit, by its head's confidence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deliberate.config import KVMode
from deliberate.engine.draft_planner import DraftPlanner
from deliberate.engine.long_text import LongTextWatch
from deliberate.engine.loop_settings import LoopSettings, Stopwatch
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.segment_runner import SegmentRunner
from deliberate.engine.sequence import DecodingSequence
from deliberate.modeling.exit_heads import ExitReader, Reading


class ExitStep:
    """The exits of one generation.

    Args:
        reader: runs the exit heads; None where no token exits early.
        runner: has the cache and the pending tokens.
        settings: of the generation.
        chooser: how logits become tokens.
        planner: which exits are worth evaluating; None evaluates all of them always.
        stopwatch: of the generation.
        watch: no token exits early while it re-weighs.

    Attributes:
        thresholds: least confidence to exit early, one per exit; an exit policy changes them.
    """

    def __init__(
        self,
        reader: ExitReader | None,
        runner: SegmentRunner,
        settings: LoopSettings,
        chooser: TokenChooser,
        planner: DraftPlanner | None,
        stopwatch: Stopwatch,
        watch: LongTextWatch | None,
    ) -> None:
        self.thresholds = tuple(settings.thresholds)
        self._reader = reader
        self._runner = runner
        self._settings = settings
        self._chooser = chooser
        self._planner = planner
        self._stopwatch = stopwatch
        self._watch = watch

    def pending_limit(self) -> int:
        """Tokens of a sequence that may be pending above an exit now."""
        return self._settings.max_pending if self._planner is None else self._planner.cap

    def is_enabled(self, k: int) -> bool:
        """Whether exit `k` is evaluated at all now."""
        if self._planner is not None and not self._planner.is_enabled(k):
            return False
        # At an infinite threshold no token exits, and the head need not be run.
        return self._settings.decide is not None or self.thresholds[k] < math.inf

    def evaluate(
        self, k: int, rows: Sequence[DecodingSequence], hidden: Tensor
    ) -> list[DecodingSequence]:
        """Evaluates exit `k` for newest tokens with states ``[R, d]``.

        Returns:
            The sequences whose token exits here; the tokens they chose are in their records.
        """
        if self._reader is None or not self.is_enabled(k):
            return []
        able = [index for index, sequence in enumerate(rows) if self._may_exit(sequence)]
        if not able:
            return []
        if len(able) < len(rows):
            hidden = hidden[able]
        settings, plain = self._settings, self._chooser.plain
        self._runner.batch.reads.append((k, len(able)))
        reading = self._reader.evaluate(k, hidden, self.thresholds[k], keep_logits=not plain)
        confident = []
        for place, index in enumerate(able):
            confidence = reading.confidences[place]
            if settings.decide is not None:
                exits = settings.decide(k, rows[index].index, confidence)
            else:
                exits = confidence >= self.thresholds[k]
            if exits:
                confident.append(place)
        tokens, scores = self._tokens(reading, confident, [rows[able[i]] for i in confident])
        layer = self._runner.boundaries[k]
        exiting = []
        for place, index in enumerate(able):
            sequence = rows[index]
            # An end token ends the output: exact mode has it chosen at full depth.
            exits = place in tokens
            exits = exits and not (settings.exact and tokens[place] in settings.end_tokens)
            if exits:
                seconds = self._stopwatch.seconds()
                sequence.draft(tokens[place], layer, reading.confidences[place], seconds)
                if settings.keep_scores:
                    sequence.scores.append(scores[place])
                exiting.append(sequence)
            if self._planner is not None:
                self._planner.evaluated(k, exits)
        return exiting

    def _may_exit(self, sequence: DecodingSequence) -> bool:
        """Whether the newest token may exit early at all."""
        if self._watch is not None and self._watch.active(sequence):
            return False  # an exit head knows nothing of the re-weighing
        settings = self._settings
        defers = settings.kv_mode is KVMode.DEFER
        if defers and self._runner.pending_tokens(sequence) >= self.pending_limit():
            return False
        if sequence.position + 1 == self._runner.backbone.rope_switch:
            return False  # everything is recomputed next, so nothing may be pending then
        # Exact mode chooses the last token at full depth, so that nothing stays unverified.
        return not (settings.exact and len(sequence.records) + 1 >= settings.max_new_tokens)

    def _tokens(
        self, reading: Reading, places: Sequence[int], rows: Sequence[DecodingSequence]
    ) -> tuple[dict[int, int], dict[int, Tensor]]:
        """The tokens that the exit chooses at these places, and their scores ``[1, V]``."""
        if self._chooser.plain and not self._settings.keep_scores:
            return {place: reading.token(place) for place in places}, {}
        if not places:
            return {}, {}
        made = [len(sequence.records) for sequence in rows]
        ids = self._chooser.needs_ids
        tokens, scores = self._chooser.choose_rows(
            torch.stack([reading.logits(place) for place in places]),
            [
                (sequence.index, count, sequence.ids(count) if ids else [])
                for sequence, count in zip(rows, made, strict=True)
            ],
        )
        return (
            dict(zip(places, tokens, strict=True)),
            dict(zip(places, scores.split(1), strict=True)),
        )
