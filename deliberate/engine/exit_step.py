"""Early exits: which tokens exit at an exit, by its head's confidence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deliberate.engine.constraints import confidence_of, masked
from deliberate.engine.exit_policy import ExitAnswer, ExitReading
from deliberate.engine.loop_settings import Stopwatch
from deliberate.engine.sampler import choose_tokens
from deliberate.engine.segment_runner import SegmentRunner
from deliberate.engine.sequence import DecodingSequence
from deliberate.modeling.exit_heads import ExitReader, Reading
from deliberate.modeling.measures import Measure
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
        processed = any(sequence.processed for sequence in rows)
        lowest = min(sequence.thresholds[k] for sequence in rows)
        reading = self._reader.evaluate(k, hidden, lowest, keep_logits=processed)
        confidences = reading.confidences
        if any(sequence.constraint is not None for sequence in rows):
            confidences = _constrained(reading, rows, self._reader.measure)
        confident = []
        undecided: dict[int, list[int]] = {}
        for place, sequence in enumerate(rows):
            if sequence.policy.thresholds is None:
                undecided.setdefault(id(sequence.policy), []).append(place)
            elif confidences[place] >= sequence.thresholds[k]:
                confident.append(place)
        for places in undecided.values():
            confident += self._decided(k, places, rows, hidden, reading, confidences)
        tokens, scores = _tokens(reading, confident, rows)
        layer = self._runner.boundaries[k]
        exiting = []
        for place, sequence in enumerate(rows):
            # -1: no token is left. One that ends the output is chosen at full depth in exact mode.
            draft = tokens.get(place, -1)
            exits = draft >= 0 and not (sequence.exact and sequence.ends_with(draft))
            if exits:
                seconds = self._stopwatch.clock() - sequence.began
                sequence.draft(draft, layer, confidences[place], seconds)
                if sequence.settings.keep_scores:
                    sequence.scores.append(scores[place])
                sequence.add_forced(seconds, self._runner.backbone.vocab_size)
                exiting.append(sequence)
            if sequence.planner is not None:
                sequence.planner.evaluated(k, exits)
        return exiting

    def _decided(
        self,
        k: int,
        places: Sequence[int],
        rows: Sequence[DecodingSequence],
        hidden: Tensor,
        output: Reading,
        every: Sequence[float],
    ) -> list[int]:
        """Those of these places that exit by the decision of the policy that they share.

        Args:
            every: confidences of all rows.
        """
        own = [rows[place] for place in places]
        policy = own[0].policy
        # In the order of the request's exits; the runner may have those of other requests, too.
        exit_index = own[0].settings.exits.index(self._runner.boundaries[k])

        def choose() -> tuple[list[int], Tensor]:
            logits = torch.stack([output.logits(place) for place in places])
            if not own[0].processed:
                return [output.token(place) for place in places], logits
            # Not for good: a processor that may keep state is called for tokens that do exit.
            at = [(one, len(one.records)) for one in own]
            chosen = choose_tokens(logits, at, drafting=True)
            return [token for token, _ in chosen], torch.cat([scores for _, scores in chosen])

        confidences = [every[place] for place in places]
        states = hidden if len(places) == len(rows) else hidden[list(places)]
        reading = ExitReading(
            exit_index,
            [sequence.place for sequence in own],
            confidences,
            states,
            [sequence.earlier_answers(exit_index) for sequence in own],
            choose,
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


def _tokens(
    reading: Reading, places: Sequence[int], rows: Sequence[DecodingSequence]
) -> tuple[dict[int, int], dict[int, Tensor]]:
    """The tokens that an exit chooses at these places, and the scores ``[1, V]`` of some."""
    plain = [place for place in places if not rows[place].processed]
    tokens, scores = {place: reading.token(place) for place in plain}, {}
    for exact in (True, False):
        others = [p for p in places if rows[p].processed and rows[p].exact is exact]
        if others:
            chosen = choose_tokens(
                torch.stack([reading.logits(place) for place in others]),
                [(rows[place], len(rows[place].records)) for place in others],
                drafting=exact,
            )
            for place, (token, own) in zip(others, chosen, strict=True):
                tokens[place], scores[place] = token, own
    return tokens, scores


def _constrained(
    reading: Reading, rows: Sequence[DecodingSequence], measure: Measure
) -> list[float]:
    """Confidences in the tokens that are left by each sequence's constraint."""
    confidences = list(reading.confidences)
    for place, sequence in enumerate(rows):
        if sequence.constraint is not None and not measure.before_head:
            at = [(sequence, len(sequence.records))]
            left = masked(reading.logits(place).unsqueeze(0), at)[0]
            confidences[place] = confidence_of(measure, left)
    return confidences
