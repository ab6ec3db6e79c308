"""Early exits: which tokens exit at an exit, by its head's confidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deliberate.engine.constraints import confidence_of
from deliberate.engine.exit_policy import ExitAnswer, ExitReading
from deliberate.engine.loop_settings import Stopwatch
from deliberate.engine.sampler import choose_tokens
from deliberate.engine.segment_runner import SegmentRunner
from deliberate.engine.sequence import DecodingSequence
from deliberate.modeling.exit_heads import ExitReader, Reading
from deliberate.utils.errors import DeliberateError


class ExitStep:
    """The exits of one model, evaluated for sequences that each have their own exit policy.

    Args:
        reader: runs the exit heads; None where no token exits early.
        runner: has the cache and the pending tokens.
        stopwatch: reads the clock.
    """

    def __init__(
        self, reader: ExitReader | None, runner: SegmentRunner, stopwatch: Stopwatch
    ) -> None:
        self._reader = reader
        self._runner = runner
        self._stopwatch = stopwatch

    def evaluate(
        self, k: int, rows: Sequence[DecodingSequence], hidden: Tensor
    ) -> list[DecodingSequence]:
        """Evaluates exit `k` for newest tokens with states ``[R, d]``.

        Returns:
            The sequences whose token exits here; the tokens they chose are in their records.
        """
        if self._reader is None:
            return []
        able = [
            place for place, one in enumerate(rows) if one.is_enabled(k) and self._may_exit(one)
        ]
        if not able:
            return []
        if len(able) < len(rows):
            hidden, rows = hidden[able], [rows[place] for place in able]
        self._runner.batch.reads.append((k, len(rows)))
        first = rows[0]
        if len(rows) == 1 and not first.processed and first.policy.thresholds is not None:
            return [first] if self._exits(k, first, hidden) else []
        processed = any(sequence.processed for sequence in rows)
        lowest = min(sequence.thresholds[k] for sequence in rows)
        reading = self._reader.evaluate(
            k, hidden, lowest, keep_logits=processed, cache=self._runner.cache
        )
        predicted = (
            _predicted(reading, rows, self._reader)
            if processed
            else _Predicted(reading, rows, reading.confidences, {})
        )
        confidences = predicted.confidences
        confident = []
        undecided: dict[int, list[int]] = {}
        for place, sequence in enumerate(rows):
            if sequence.policy.thresholds is None:
                undecided.setdefault(id(sequence.policy), []).append(place)
            elif confidences[place] >= sequence.thresholds[k]:
                confident.append(place)
        for places in undecided.values():
            confident += self._decided(k, places, hidden, predicted)
        tokens, scores = predicted.exiting(confident)
        layer = self._runner.boundaries[k]
        exiting = []
        for place, sequence in enumerate(rows):
            # -1: no token is left. One that ends the output is chosen at full depth in exact mode.
            draft = tokens.get(place, -1)
            exits = draft >= 0 and not (sequence.exact and sequence.ends_with(draft))
            if exits:
                seconds = self._stopwatch.clock() - sequence.began
                sequence.draft(draft, layer, confidences[place], seconds)
                if sequence.keeps:
                    logits = reading.logits(place)
                    sequence.scores.append(sequence.kept(draft, logits, scores[place]))
                sequence.add_forced(seconds, self._runner.backbone.vocab_size)
                exiting.append(sequence)
            if sequence.planner is not None:
                sequence.planner.evaluated(k, exits)
        return exiting

    def _exits(self, k: int, sequence: DecodingSequence, hidden: Tensor) -> bool:
        """Whether one token exits by a threshold on the logits: `evaluate` without what it needs
        for several rows, processed scores and decisions; a few microseconds of a token's 200."""
        assert self._reader is not None
        threshold = sequence.thresholds[k]
        reading = self._reader.evaluate(k, hidden, threshold, cache=self._runner.cache)
        confidence = reading.confidences[0]
        exits = confidence >= threshold
        if exits:
            token = reading.token(0)
            # What ends the output is chosen at full depth in exact mode.
            exits = not (sequence.exact and sequence.ends_with(token))
            if exits:
                seconds = self._stopwatch.clock() - sequence.began
                sequence.draft(token, self._runner.boundaries[k], confidence, seconds)
                sequence.add_forced(seconds, self._runner.backbone.vocab_size)
        if sequence.planner is not None:
            sequence.planner.evaluated(k, exits)
        return exits

    def _decided(
        self,
        k: int,
        places: Sequence[int],
        hidden: Tensor,
        predicted: _Predicted,
    ) -> list[int]:
        """Those of these places that exit by the decision of the policy that they share."""
        own = [predicted.rows[place] for place in places]
        policy = own[0].policy
        # In the order of the request's exits; the runner may have those of other requests, too.
        exit_index = own[0].settings.exits.index(self._runner.boundaries[k])
        confidences = [predicted.confidences[place] for place in places]
        states = hidden if len(places) == len(hidden) else hidden[list(places)]
        reading = ExitReading(
            exit_index,
            [sequence.place for sequence in own],
            confidences,
            states,
            [sequence.earlier_answers(exit_index) for sequence in own],
            lambda: predicted.choose(places),
        )
        exits = list(policy.decide(reading))
        if len(exits) != len(own):
            raise DeliberateError(
                f"{type(policy).__name__}.decide returned {len(exits)} decisions for {len(own)} "
                "tokens: return one for each"
            )
        if policy.keeps_answers:
            answers = zip(own, reading.tokens, confidences, states, strict=True)
            for sequence, token, confidence, state in answers:
                sequence.keep_answer(exit_index, ExitAnswer(token, confidence, state.clone()))
        return [place for place, exiting in zip(places, exits, strict=True) if exiting]

    def _may_exit(self, sequence: DecodingSequence) -> bool:
        """Whether the newest token may exit early at all."""
        if sequence.watch is not None and sequence.watch.active(sequence):
            return False  # an exit head knows nothing of the re-weighing
        if sequence.defers and self._runner.pending_tokens(sequence) >= sequence.pending_limit:
            return False
        if sequence.position + 1 == self._runner.backbone.rope_switch:
            return False  # everything is recomputed next, so nothing may be pending then
        constraint, made = sequence.constraint, len(sequence.records)
        if constraint is not None and constraint.forced(sequence.records, made):
            return False  # exact mode: what is forced ends the output, at full depth
        # Exact mode chooses the last token at full depth, so that nothing stays unverified.
        last = len(sequence.records) + 1 >= sequence.settings.max_new_tokens
        return not (sequence.exact and last)


@dataclass(frozen=True)
class _Predicted:
    """What an exit predicts: its reading, the confidences that count, and tokens chosen so far.

    Attributes:
        drafts: by place, token and processed scores ``[1, V]``, chosen as drafts are: without
            processors that may keep state, since most tokens do not exit.
    """

    reading: Reading
    rows: Sequence[DecodingSequence]
    confidences: Sequence[float]
    drafts: dict[int, tuple[int, Tensor]]

    def choose(self, places: Sequence[int]) -> tuple[list[int], Tensor]:
        """Tokens and processed scores ``[R, V]`` of these places."""
        if not self.rows[places[0]].processed:
            logits = torch.stack([self.reading.logits(place) for place in places])
            return [self.reading.token(place) for place in places], logits
        self.draft([place for place in places if place not in self.drafts])
        own = [self.drafts[place] for place in places]
        return [token for token, _ in own], torch.cat([scores for _, scores in own])

    def draft(self, places: Sequence[int]) -> None:
        """Chooses the tokens of these places."""
        self.drafts.update(self._chosen(places, drafting=True))

    def exiting(self, places: Sequence[int]) -> tuple[dict[int, int], dict[int, Tensor]]:
        """The tokens of these places, which exit, and the scores ``[1, V]`` of some."""
        plain = [place for place in places if not self.rows[place].processed]
        tokens, scores = {place: self.reading.token(place) for place in plain}, {}
        exact = [p for p in places if self.rows[p].processed and self.rows[p].exact]
        self.draft([place for place in exact if place not in self.drafts])
        # Of other modes the choice is final: every processor takes part.
        others = [p for p in places if self.rows[p].processed and not self.rows[p].exact]
        final = self._chosen(others, drafting=False)
        for place in (*exact, *others):
            tokens[place], scores[place] = (self.drafts if place in exact else final)[place]
        return tokens, scores

    def _chosen(self, places: Sequence[int], *, drafting: bool) -> dict[int, tuple[int, Tensor]]:
        if not places:
            return {}
        made = choose_tokens(
            torch.stack([self.reading.logits(place) for place in places]),
            [(self.rows[place], len(self.rows[place].records)) for place in places],
            drafting=drafting,
        )
        return dict(zip(places, made, strict=True))


def _predicted(
    reading: Reading, rows: Sequence[DecodingSequence], reader: ExitReader
) -> _Predicted:
    """Confidences of the scores that tokens are taken from, where those are not the logits.

    That is where tokens are sampled or constrained, or processors change the scores. A probe's
    confidence is of the hidden state and stays. Of a draft vocabulary a constraint may leave a few
    tokens, and what it leaves outside is not known: its best token is worth the confidence that it
    had among all, and another token nothing.
    """
    measure = reader.measure
    predicted = _Predicted(reading, rows, list(reading.confidences), {})
    if measure.before_head:
        return predicted
    own = [
        place for place, one in enumerate(rows)
        if not one.chooser.plain or one.constraint is not None
    ]  # fmt: skip
    predicted.draft(own)
    confidences = list(reading.confidences)
    for place in own:
        token, scores = predicted.drafts[place]
        if reader.ids is None or rows[place].constraint is None:
            confidences[place] = confidence_of(measure, scores[0])
        elif token != reading.token(place):
            confidences[place] = 0.0
    return _Predicted(reading, rows, confidences, predicted.drafts)
