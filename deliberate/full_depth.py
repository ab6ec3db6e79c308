"""What happens at full depth: choosing tokens, verifying drafts, taking back, watching drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from deliberate.backbone import Backbone
from deliberate.depth import DepthRunner, flat, newest
from deliberate.drafting import DraftPlanner
from deliberate.gate_runner import GateRunner
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
        gate: thinks again about uncertain tokens; the full depth's answer is then the one after it.
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
    ) -> None:
        self.backbone = backbone
        self.gate = gate
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
        self.choose(rows, *self._read(rows, hidden, [1] * len(rows)))

    def _read(
        self, rows: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> tuple[Tensor, list[int]]:
        """Logits ``[N, V]`` of ``hidden [N, d]``, each row's last `counts`, and the gate's rounds.

        The list is empty without a gate.
        """
        logits = self.backbone.logits(hidden)
        if self.gate is None:
            return logits, []
        owners: list[int] = []
        positions: list[int] = []
        for sequence, count in zip(rows, counts, strict=True):
            owners += [sequence.row] * count
            positions += self.depth.reached(sequence, count)
        return self.gate.think(hidden, logits, owners, positions)

    def choose(
        self, rows: Sequence[DecodingSequence], logits: Tensor, rounds: Sequence[int] = ()
    ) -> None:
        """Records the top's choices from logits ``[R, V]`` after rounds of the gate."""
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
            thought = rounds[place] if rounds else 0
            self.record(sequence, token, depth, confidences[place], verified=True, rounds=thought)
            sequence.verified = made + 1

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
        logits, rounds = self._read(riders, flat(hidden, counts), counts)
        answers = logits.argmax(dim=-1).tolist() if self.chooser.plain else []
        fresh: list[tuple[DecodingSequence, int]] = []
        at = 0
        for sequence, count in zip(riders, counts, strict=True):
            self._verify(sequence, count, logits, answers, rounds, at, fresh)
            at += count
        if fresh:
            places = [row for _, row in fresh]
            rows = logits[places] if len(fresh) < len(logits) else logits
            thought = [rounds[row] for row in places] if rounds else []
            self.choose([sequence for sequence, _ in fresh], rows, thought)
        if self.planner is not None:
            self.planner.review()

    def _verify(
        self,
        sequence: DecodingSequence,
        count: int,
        logits: Tensor,
        answers: Sequence[int],
        rounds: Sequence[int],
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
            sequence.confirm(index, rounds[row] if rounds else 0)
            if self.keep_scores:
                sequence.scores[index] = scores

    def _look_again(
        self, riders: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> None:
        """Tells the monitor how many tokens that left early the full depth agrees with."""
        logits, _ = self._read(riders, flat(hidden, counts), counts)
        answers = logits.argmax(dim=-1).tolist()
        agreed = seen = at = 0
        for sequence, count in zip(riders, counts, strict=True):
            first, last = self.depth.speaks_of(sequence, count)
            for index in range(first, min(last + 1, len(sequence.records))):
                seen += 1
                agreed += answers[at + index - first] == sequence.records[index].token
            at += count
        if seen and self.monitor is not None:
            self.monitor(agreed, seen)
