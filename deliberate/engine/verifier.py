"""Full depth: choosing tokens, verifying drafts and rolling back, monitoring agreement."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from deliberate.engine.draft_planner import DraftPlanner
from deliberate.engine.long_text import LongTextWatch
from deliberate.engine.loop_settings import LoopSettings, Stopwatch
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.segment_runner import SegmentRunner, flat, newest
from deliberate.engine.sequence import DecodingSequence
from deliberate.engine.strict import NearTies
from deliberate.modeling.head_output import HeadOutput


class Verifier:
    """The full-depth model of one generation: what it predicts, and what follows from it.

    Args:
        runner: for positions, and to roll back.
        settings: of the generation.
        chooser: how logits become tokens.
        planner: told whether full depth agreed with each draft.
        stopwatch: of the generation.
        watch: re-weighs the logits where a text repeats itself, after the deliberation gate.
        near_ties: strict exact mode: the tokens that dense's own passes choose.
    """

    def __init__(
        self,
        runner: SegmentRunner,
        settings: LoopSettings,
        chooser: TokenChooser,
        planner: DraftPlanner | None,
        stopwatch: Stopwatch,
        watch: LongTextWatch | None,
        near_ties: NearTies | None,
    ) -> None:
        self.near_ties = near_ties
        self._backbone = runner.backbone
        self._runner = runner
        self._gate = runner.gate
        self._settings = settings
        self._chooser = chooser
        self._planner = planner
        self._stopwatch = stopwatch
        self._watch = watch
        self._passes = -settings.monitor_offset - 1

    def predict(self, rows: Sequence[DecodingSequence], hidden: Tensor) -> None:
        """Appends the next token of each sequence, from its newest final state ``[R, d]``."""
        reading = self._read(rows, hidden, [1] * len(rows))
        if self.near_ties is not None:
            (sequence,) = rows
            made = len(sequence.records)
            if made == 0:
                self.near_ties.begin(sequence.prompt_tokens)
            self.near_ties.note_pass(sequence, 1)
            scores = reading.logits
            if self._processes:
                scores = self._chosen(scores, [(sequence, made)])[0][1]
            if self.near_ties.undecided(sequence, made, scores):
                reading = self._backbone.read_full_depth(self.near_ties.run_again(sequence, made))
        self._choose(rows, reading)

    def _read(
        self, rows: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> HeadOutput:
        """Predictions from ``hidden [N, d]``, each row's last `counts`, deliberation included."""
        if self._gate is None and self._watch is None:
            return self._backbone.read_full_depth(hidden)
        logits = self._backbone.logits(hidden)
        rounds: list[int] = []
        if self._gate is not None:
            owners: list[int] = []
            positions: list[int] = []
            for sequence, count in zip(rows, counts, strict=True):
                owners += [sequence.row] * count
                positions += self._runner.position_range(sequence, count)
            logits, rounds = self._gate.deliberate(hidden, logits, owners, positions)
        if self._watch is not None:
            firsts = self._observe(self._watch, rows, hidden, counts)
            logits = self._watch.reweigh(rows, firsts, counts, logits)
        return HeadOutput(logits, rounds=rounds)

    def _observe(
        self,
        watch: LongTextWatch,
        rows: Sequence[DecodingSequence],
        hidden: Tensor,
        counts: Sequence[int],
    ) -> list[int]:
        """Gives the watch ``hidden [N, d]``; the first token that each row's states predict."""
        firsts = [
            self._runner.token_range(sequence, count)[0]
            for sequence, count in zip(rows, counts, strict=True)
        ]
        parts = hidden.split(list(counts))
        for sequence, first, part in zip(rows, firsts, parts, strict=True):
            watch.observe(sequence, first, part)
        return firsts

    def _choose(
        self,
        rows: Sequence[DecodingSequence],
        reading: HeadOutput,
        chosen: Sequence[tuple[int, Tensor]] | None = None,
    ) -> None:
        """Appends the token that full depth chooses, one of each sequence.

        Args:
            chosen: tokens and processed scores, where they have been chosen already.
        """
        confidences = [float("nan")] * len(rows)
        if len(self._runner.boundaries) > 1:
            confidences = reading.probabilities
        if chosen is None and self._processes:
            made = [(sequence, len(sequence.records)) for sequence in rows]
            chosen = self._chosen(reading.logits, made)
        tokens = reading.tokens if chosen is None else [token for token, _ in chosen]
        depth = self._backbone.num_layers
        seconds = self._stopwatch.seconds
        for place, sequence in enumerate(rows):
            if chosen is not None and self._settings.keep_scores:
                sequence.scores.append(chosen[place][1])
            sequence.add(
                tokens[place],
                depth,
                confidences[place],
                seconds(),
                verified=True,
                rounds=reading.rounds_of(place),
            )
            sequence.verified = len(sequence.records)

    @property
    def _processes(self) -> bool:
        """Whether tokens are more than the argmax of the logits."""
        return not self._chooser.plain or self._settings.keep_scores

    def _chosen(
        self, logits: Tensor, places: Sequence[tuple[DecodingSequence, int]]
    ) -> list[tuple[int, Tensor]]:
        """Token and processed scores ``[1, V]`` of each row of ``[R, V]``, at those indices."""
        ids = self._chooser.needs_ids
        tokens, scores = self._chooser.choose_rows(
            logits,
            [(one.index, index, one.ids(index) if ids else []) for one, index in places],
        )
        return list(zip(tokens, scores.split(1), strict=True))

    def complete(
        self, rows: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> None:
        """Ends a deep pass: verifies drafts (exact mode) and chooses the tokens that come next.

        Args:
            hidden: final states ``[R, M, d]``, of each sequence its last ``counts`` positions.
        """
        settings = self._settings
        self._passes += 1
        for sequence in rows:
            sequence.blocked, sequence.waited = False, 0
        if not settings.exact:
            if settings.monitor is not None and self._passes % settings.monitor_every == 0:
                self._monitor_agreement(rows, hidden, counts)
            if self._watch is not None:
                self._observe(self._watch, rows, flat(hidden, counts), counts)
            last = newest(hidden, counts)
            new = [
                place
                for place, (sequence, count) in enumerate(zip(rows, counts, strict=True))
                if self._runner.token_range(sequence, count)[1] == len(sequence.records)
            ]
            if new:
                states = last if len(new) == len(rows) else last[new]
                self.predict([rows[i] for i in new], states)
            return
        reading = self._read(rows, flat(hidden, counts), counts)
        chosen = self._choose_drafted(rows, counts, reading) if self._processes else None
        fresh: list[tuple[DecodingSequence, int]] = []
        at = 0
        for sequence, count in zip(rows, counts, strict=True):
            self._verify(sequence, count, reading, at, fresh, chosen)
            at += count
        if fresh:
            reading = reading.take([row for _, row in fresh])
            self._choose(
                [sequence for sequence, _ in fresh],
                reading,
                None if chosen is None else [chosen[row] for _, row in fresh],
            )
        if self._planner is not None:
            self._planner.review()

    def _choose_drafted(
        self, rows: Sequence[DecodingSequence], counts: Sequence[int], reading: HeadOutput
    ) -> dict[int, tuple[int, Tensor]]:
        """Token and scores by row of the reading, up to each sequence's first rejected draft.

        The first rows of all sequences are chosen in one call, then the second rows of those whose
        drafts are accepted so far, and so on.
        """
        chosen: dict[int, tuple[int, Tensor]] = {}
        at, ends = 0, []
        accepted: list[tuple[DecodingSequence, int, int]] = []
        for sequence, count in zip(rows, counts, strict=True):
            accepted.append((sequence, at, self._runner.token_range(sequence, count)[0]))
            at += count
            ends.append(at)
        limits = dict(zip((sequence.index for sequence in rows), ends, strict=True))
        while accepted:
            places = [row for _, row, _ in accepted]
            made = [(sequence, index) for sequence, _, index in accepted]
            chosen |= dict(zip(places, self._chosen(reading.logits[places], made), strict=True))
            accepted = [
                (sequence, row + 1, index + 1)
                for sequence, row, index in accepted
                if index < len(sequence.records)
                and sequence.records[index].token == chosen[row][0]
                and row + 1 < limits[sequence.index]
            ]
        return chosen

    def _verify(
        self,
        sequence: DecodingSequence,
        count: int,
        reading: HeadOutput,
        at: int,
        fresh: list[tuple[DecodingSequence, int]],
        chosen: Mapping[int, tuple[int, Tensor]] | None,
    ) -> None:
        """Compares a sequence's drafts with full depth's choices, rows `at`.. of the reading.

        Adds to `fresh` the row that chooses the sequence's next token.
        """
        first, last = self._runner.token_range(sequence, count)
        if self.near_ties is not None:
            self.near_ties.note_pass(sequence, count)
        for index in range(first, last + 1):
            row = at + index - first
            if self.near_ties is not None:
                scored = reading.logits[row] if chosen is None else chosen[row][1]
                if self.near_ties.undecided(sequence, index, scored):
                    self._decide_near_tie(sequence, index, self.near_ties)
                    return
            if index == len(sequence.records):
                fresh.append((sequence, row))
                return
            scores = None
            if chosen is None:
                token = reading.tokens[row]
            else:
                token, scores = chosen[row]
            draft = sequence.records[index]
            agreed = token == draft.token
            if self._planner is not None and draft.exit_layer < self._backbone.num_layers:
                self._planner.verified(
                    self._runner.boundaries.index(draft.exit_layer),
                    agreed,
                    discarded=len(sequence.records) - index - 1,
                )
            if not agreed:
                self._runner.roll_back(sequence, index)
                fresh.append((sequence, row))
                return
            sequence.confirm(index, reading.rounds_of(row))
            if self._settings.keep_scores:
                sequence.scores[index] = scores

    def _decide_near_tie(self, sequence: DecodingSequence, index: int, near_ties: NearTies) -> None:
        """Has dense's own passes choose the token at `index`, and removes the drafts after it."""
        reading = self._backbone.read_full_depth(near_ties.run_again(sequence, index))
        draft = sequence.records[index] if index < len(sequence.records) else None
        sequence.trace.discarded += max(0, len(sequence.records) - index - 1)
        del sequence.records[index:]
        del sequence.scores[index:]
        self._choose([sequence], reading)
        if draft is None:
            return
        chosen = sequence.records[index]
        agreed = chosen.token == draft.token
        if agreed:
            sequence.records[index] = dataclasses.replace(draft, verified=True)
        else:
            sequence.trace.rejected += 1
            sequence.trace.discarded += 1
        if self._planner is not None and draft.exit_layer < self._backbone.num_layers:
            self._planner.verified(
                self._runner.boundaries.index(draft.exit_layer), agreed, discarded=0
            )

    def _monitor_agreement(
        self, rows: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> None:
        """Tells the monitor with how many tokens that exited early full depth agrees."""
        tokens = self._read(rows, flat(hidden, counts), counts).tokens
        agreed = compared = at = 0
        for sequence, count in zip(rows, counts, strict=True):
            first, last = self._runner.token_range(sequence, count)
            for index in range(first, min(last + 1, len(sequence.records))):
                compared += 1
                agreed += tokens[at + index - first] == sequence.records[index].token
            at += count
        if compared and self._settings.monitor is not None:
            self._settings.monitor(agreed, compared)
