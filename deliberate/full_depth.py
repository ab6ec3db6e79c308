"""What happens at full depth: choosing tokens, verifying drafts, taking back, watching drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from deliberate.backbone import Backbone
from deliberate.depth import DepthRunner, flat, newest
from deliberate.drafting import DraftPlanner
from deliberate.kernels.exit_head import top_probability
from deliberate.sampling import TokenChooser
from deliberate.sequences import DecodingSequence
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
    ) -> None:
        self.backbone = backbone
        self.depth = depth
        self.chooser = chooser
        self.exact = exact
        self.planner = planner
        self.keep_scores = keep_scores
        self.monitor = monitor
        self.monitor_every = monitor_every
        self._seconds = seconds
        self._passes = -monitor_offset - 1

    def choose(self, rows: Sequence[DecodingSequence], logits: Tensor) -> None:
        """Records the top's choices from logits ``[R, V]``."""
        confidences = [float("nan")] * len(rows)
        if len(self.depth.boundaries) > 1:
            best, probability = top_probability(logits)
            confidences = probability.tolist()
            tokens = best.tolist()
        else:
            tokens = logits.argmax(dim=-1).tolist()
        depth = self.backbone.num_layers
        for place, sequence in enumerate(rows):
            made = len(sequence.records)
            token = tokens[place]
            if not self.chooser.plain or self.keep_scores:
                token, scores = self.chooser.choose(
                    logits[place], sequence.ids(made), sequence.index, made
                )
                if self.keep_scores:
                    sequence.scores.append(scores)
            self.record(sequence, token, depth, confidences[place], verified=True)
            sequence.verified = made + 1

    def record(
        self,
        sequence: DecodingSequence,
        token: int,
        layer: int,
        confidence: float,
        *,
        verified: bool,
    ) -> None:
        seconds = self._seconds()
        sequence.records.append(TokenRecord(token, layer, confidence, seconds, verified))

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
            last = newest(hidden, counts)
            new = [
                place
                for place, (sequence, count) in enumerate(zip(riders, counts, strict=True))
                if self.depth.speaks_of(sequence, count)[1] == len(sequence.records)
            ]
            if new:
                chosen = last if len(new) == len(riders) else last[new]
                self.choose([riders[i] for i in new], self.backbone.logits(chosen))
            return
        logits = self.backbone.logits(flat(hidden, counts))
        answers = logits.argmax(dim=-1).tolist() if self.chooser.plain else []
        fresh: list[tuple[DecodingSequence, int]] = []
        at = 0
        for sequence, count in zip(riders, counts, strict=True):
            self._verify(sequence, count, logits, answers, at, fresh)
            at += count
        if fresh:
            rows = logits[[row for _, row in fresh]] if len(fresh) < len(logits) else logits
            self.choose([sequence for sequence, _ in fresh], rows)
        if self.planner is not None:
            self.planner.review()

    def _verify(
        self,
        sequence: DecodingSequence,
        count: int,
        logits: Tensor,
        answers: Sequence[int],
        at: int,
        fresh: list[tuple[DecodingSequence, int]],
    ) -> None:
        """Compares drafts with the top's choices, rows `at`.. of the logits; notes what is new."""
        first, last = self.depth.speaks_of(sequence, count)
        for index in range(first, last + 1):
            row = at + index - first
            if index == len(sequence.records):
                fresh.append((sequence, row))
                return
            scores = None
            if self.chooser.plain and not self.keep_scores:
                answer = answers[row]
            else:
                answer, scores = self.chooser.choose(
                    logits[row], sequence.ids(index), sequence.index, index
                )
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
            sequence.confirm(index)
            if self.keep_scores:
                sequence.scores[index] = scores

    def _look_again(
        self, riders: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> None:
        """Tells the monitor how many tokens that left early the full depth agrees with."""
        answers = self.backbone.logits(flat(hidden, counts)).argmax(dim=-1).tolist()
        agreed = seen = at = 0
        for sequence, count in zip(riders, counts, strict=True):
            first, last = self.depth.speaks_of(sequence, count)
            for index in range(first, min(last + 1, len(sequence.records))):
                seen += 1
                agreed += answers[at + index - first] == sequence.records[index].token
            at += count
        if seen and self.monitor is not None:
            self.monitor(agreed, seen)
