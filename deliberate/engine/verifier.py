"""What happens at full depth: choosing tokens, verifying drafts, taking back, watching drift."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from deliberate.engine.deliberation import GateRunner
from deliberate.engine.draft_planner import DraftPlanner
from deliberate.engine.long_text import LongTextWatch
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.segment_runner import DepthRunner, flat, newest
from deliberate.engine.sequence import DecodingSequence
from deliberate.engine.strict import NearTies
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.head_output import TopReading
from deliberate.trace import TokenRecord


class FullDepth:
    """The top of one generation.

    Args:
        backbone: for its head.
        depth: for positions, and to roll back.
        chooser: how logits become tokens.
        exact: drafts are verified.
        planner: told of every verdict.
        keep_scores: keep the processed scores of every token.
        monitor, monitor_every, monitor_offset: see `DecodeLoop`.
        seconds: since the generation began.
        gate: thinks again about uncertain tokens; the full depth's answer is then the one after it.
        watch: re-weighs the logits of a text that goes round, after the gate.
        near_ties: strict exact mode of one sequence: which tokens dense's own passes choose.
    """

    def __init__(
        self,
        backbone: Backbone,
        depth: DepthRunner,
        chooser: TokenChooser,
        *,
        exact: bool,
        planner: DraftPlanner | None,
        keep_scores: bool,
        monitor: Callable[[int, int], None] | None,
        monitor_every: int,
        monitor_offset: int,
        seconds: Callable[[], float],
        gate: GateRunner | None = None,
        watch: LongTextWatch | None = None,
        near_ties: NearTies | None = None,
    ) -> None:
        self.near_ties = near_ties
        self.backbone = backbone
        self.gate = gate
        self.watch = watch
        self.depth = depth
        self.chooser = chooser
        self.exact = exact
        self.planner = planner
        self.keep_scores = keep_scores
        self.monitor = monitor
        self.monitor_every = monitor_every
        self._seconds = seconds
        self._passes = -monitor_offset - 1

    def answer(self, rows: Sequence[DecodingSequence], hidden: Tensor) -> None:
        """Records the top's choices from the newest states ``[R, d]``."""
        reading = self._read(rows, hidden, [1] * len(rows))
        if self.near_ties is not None:
            (sequence,) = rows
            made = len(sequence.records)
            if made == 0:
                self.near_ties.begin(sequence.prompt_tokens)
            self.near_ties.ran(sequence, 1)
            scores = reading.logits
            if self._processes:
                scores = self._chosen(scores, [(sequence, made)])[0][1]
            if self.near_ties.open(sequence, made, scores):
                reading = self.backbone.read_top(self.near_ties.run_again(sequence, made))
        self.choose(rows, reading)

    def _read(
        self, rows: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> TopReading:
        """Answers from ``hidden [N, d]``, each row's last `counts`, the gate's rounds included."""
        if self.gate is None and self.watch is None:
            return self.backbone.read_top(hidden)
        logits = self.backbone.logits(hidden)
        rounds: list[int] = []
        if self.gate is not None:
            owners: list[int] = []
            positions: list[int] = []
            for sequence, count in zip(rows, counts, strict=True):
                owners += [sequence.row] * count
                positions += self.depth.reached(sequence, count)
            logits, rounds = self.gate.think(hidden, logits, owners, positions)
        if self.watch is not None:
            firsts = self._show(self.watch, rows, hidden, counts)
            logits = self.watch.reweigh(rows, firsts, counts, logits)
        return TopReading(logits, rounds=rounds)

    def _show(
        self,
        watch: LongTextWatch,
        rows: Sequence[DecodingSequence],
        hidden: Tensor,
        counts: Sequence[int],
    ) -> list[int]:
        """Shows the watch ``hidden [N, d]``; the first token that each row's states are about."""
        firsts = [
            self.depth.speaks_of(sequence, count)[0]
            for sequence, count in zip(rows, counts, strict=True)
        ]
        parts = hidden.split(list(counts))
        for sequence, first, part in zip(rows, firsts, parts, strict=True):
            watch.observe(sequence, first, part)
        return firsts

    def choose(
        self,
        rows: Sequence[DecodingSequence],
        reading: TopReading,
        chosen: Sequence[tuple[int, Tensor]] | None = None,
    ) -> None:
        """Records the top's choices, one of each sequence.

        Args:
            chosen: tokens and processed scores, where the chooser has been asked already.
        """
        confidences = [float("nan")] * len(rows)
        if len(self.depth.boundaries) > 1:
            confidences = reading.probabilities
        if chosen is None and self._processes:
            made = [(sequence, len(sequence.records)) for sequence in rows]
            chosen = self._chosen(reading.logits, made)
        tokens = reading.tokens if chosen is None else [token for token, _ in chosen]
        depth = self.backbone.num_layers
        for place, sequence in enumerate(rows):
            made_so_far = len(sequence.records)
            token = tokens[place]
            if chosen is not None and self.keep_scores:
                sequence.scores.append(chosen[place][1])
            thought = reading.rounds_of(place)
            self.record(sequence, token, depth, confidences[place], verified=True, rounds=thought)
            sequence.verified = made_so_far + 1

    @property
    def _processes(self) -> bool:
        """Whether tokens are more than the argmax of the logits."""
        return not self.chooser.plain or self.keep_scores

    def _chosen(
        self, logits: Tensor, places: Sequence[tuple[DecodingSequence, int]]
    ) -> list[tuple[int, Tensor]]:
        """Token and processed scores ``[1, V]`` of each row of ``[R, V]``, at those indices."""
        ids = self.chooser.needs_ids
        tokens, scores = self.chooser.choose_rows(
            logits,
            [(one.index, index, one.ids(index) if ids else []) for one, index in places],
        )
        return list(zip(tokens, scores.split(1), strict=True))

    def record(
        self,
        sequence: DecodingSequence,
        token: int,
        layer: int,
        confidence: float,
        *,
        verified: bool,
        rounds: int = 0,
    ) -> None:
        seconds = self._seconds()
        sequence.records.append(TokenRecord(token, layer, confidence, seconds, verified, rounds))

    def arrive(
        self, riders: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> None:
        """At the top with ``hidden [R, M, d]``, of each sequence its last ``counts`` positions."""
        self._passes += 1
        for sequence in riders:
            sequence.blocked, sequence.waited = False, 0
        if not self.exact:
            if self.monitor is not None and self._passes % self.monitor_every == 0:
                self._look_again(riders, hidden, counts)
            if self.watch is not None:
                self._show(self.watch, riders, flat(hidden, counts), counts)
            last = newest(hidden, counts)
            new = [
                place
                for place, (sequence, count) in enumerate(zip(riders, counts, strict=True))
                if self.depth.speaks_of(sequence, count)[1] == len(sequence.records)
            ]
            if new:
                chosen = last if len(new) == len(riders) else last[new]
                self.answer([riders[i] for i in new], chosen)
            return
        reading = self._read(riders, flat(hidden, counts), counts)
        answers = self._answers(riders, counts, reading) if self._processes else None
        fresh: list[tuple[DecodingSequence, int]] = []
        at = 0
        for sequence, count in zip(riders, counts, strict=True):
            self._verify(sequence, count, reading, at, fresh, answers)
            at += count
        if fresh:
            reading = reading.take([row for _, row in fresh])
            self.choose(
                [sequence for sequence, _ in fresh],
                reading,
                None if answers is None else [answers[row] for _, row in fresh],
            )
        if self.planner is not None:
            self.planner.review()

    def _answers(
        self, riders: Sequence[DecodingSequence], counts: Sequence[int], reading: TopReading
    ) -> dict[int, tuple[int, Tensor]]:
        """Token and scores by row of the reading, up to each sequence's first rejected draft.

        The first rows of all sequences are chosen in one call, then the second rows of those whose
        drafts are accepted so far, and so on.
        """
        chosen: dict[int, tuple[int, Tensor]] = {}
        at, ends = 0, []
        open_rows: list[tuple[DecodingSequence, int, int]] = []
        for sequence, count in zip(riders, counts, strict=True):
            open_rows.append((sequence, at, self.depth.speaks_of(sequence, count)[0]))
            at += count
            ends.append(at)
        limits = dict(zip((sequence.index for sequence in riders), ends, strict=True))
        while open_rows:
            rows = [row for _, row, _ in open_rows]
            made = [(sequence, index) for sequence, _, index in open_rows]
            chosen |= dict(zip(rows, self._chosen(reading.logits[rows], made), strict=True))
            open_rows = [
                (sequence, row + 1, index + 1)
                for sequence, row, index in open_rows
                if index < len(sequence.records)
                and sequence.records[index].token == chosen[row][0]
                and row + 1 < limits[sequence.index]
            ]
        return chosen

    def _verify(
        self,
        sequence: DecodingSequence,
        count: int,
        reading: TopReading,
        at: int,
        fresh: list[tuple[DecodingSequence, int]],
        chosen: Mapping[int, tuple[int, Tensor]] | None,
    ) -> None:
        """Compares drafts with the top's choices, rows `at`.. of the reading; notes what is new."""
        first, last = self.depth.speaks_of(sequence, count)
        if self.near_ties is not None:
            self.near_ties.ran(sequence, count)
        for index in range(first, last + 1):
            row = at + index - first
            if self.near_ties is not None:
                heard = reading.logits[row] if chosen is None else chosen[row][1]
                if self.near_ties.open(sequence, index, heard):
                    self._decide(sequence, index, self.near_ties)
                    return
            if index == len(sequence.records):
                fresh.append((sequence, row))
                return
            scores = None
            if chosen is None:
                answer = reading.tokens[row]
            else:
                answer, scores = chosen[row]
            draft = sequence.records[index]
            agreed = answer == draft.token
            if self.planner is not None and draft.exit_layer < self.backbone.num_layers:
                self.planner.judged(
                    self.depth.boundaries.index(draft.exit_layer),
                    agreed,
                    discarded=len(sequence.records) - index - 1,
                )
            if not agreed:
                self.depth.roll_back(sequence, index)
                fresh.append((sequence, row))
                return
            sequence.confirm(index, reading.rounds_of(row))
            if self.keep_scores:
                sequence.scores[index] = scores

    def _decide(self, sequence: DecodingSequence, index: int, near_ties: NearTies) -> None:
        """Lets dense's own passes choose the token at `index`; what was drafted after it goes."""
        reading = self.backbone.read_top(near_ties.run_again(sequence, index))
        draft = sequence.records[index] if index < len(sequence.records) else None
        sequence.trace.discarded += max(0, len(sequence.records) - index - 1)
        del sequence.records[index:]
        del sequence.scores[index:]
        self.choose([sequence], reading)
        if draft is None:
            return
        chosen = sequence.records[index]
        agreed = chosen.token == draft.token
        if agreed:
            sequence.records[index] = dataclasses.replace(draft, verified=True)
        else:
            sequence.trace.rejected += 1
            sequence.trace.discarded += 1
        if self.planner is not None and draft.exit_layer < self.backbone.num_layers:
            self.planner.judged(self.depth.boundaries.index(draft.exit_layer), agreed, discarded=0)

    def _look_again(
        self, riders: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> None:
        """Tells the monitor how many tokens that left early the full depth agrees with."""
        answers = self._read(riders, flat(hidden, counts), counts).tokens
        agreed = seen = at = 0
        for sequence, count in zip(riders, counts, strict=True):
            first, last = self.depth.speaks_of(sequence, count)
            for index in range(first, min(last + 1, len(sequence.records))):
                seen += 1
                agreed += answers[at + index - first] == sequence.records[index].token
            at += count
        if seen and self.monitor is not None:
            self.monitor(agreed, seen)
