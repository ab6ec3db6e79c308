"""Full depth: choosing tokens, verifying drafts and rolling back, monitoring agreement."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deliberate.engine.loop_settings import Stopwatch
from deliberate.engine.row_states import flat, newest
from deliberate.engine.sampler import choose_tokens
from deliberate.engine.segment_runner import SegmentRunner
from deliberate.engine.sequence import DecodingSequence
from deliberate.engine.strict import NearTies
from deliberate.engine.watched_rows import observe, observe_forced, reweighed
from deliberate.modeling.head_output import HeadOutput


class Verifier:
    """The full-depth model: what it predicts for each sequence, and what follows from it.

    Args:
        runner: for positions, and to roll back.
        stopwatch: reads the clock.
        near_ties: of sequences in strict exact mode, by their number: finds the tokens that dense's
            own passes choose.
    """

    def __init__(
        self, runner: SegmentRunner, stopwatch: Stopwatch, near_ties: Mapping[int, NearTies]
    ) -> None:
        self.near_ties = near_ties
        self._backbone = runner.backbone
        self._runner = runner
        self._gate = runner.gate
        self._stopwatch = stopwatch

    def predict_after(
        self, rows: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> None:
        """As `predict`, where several tokens of a sequence have just been run, forced ones.

        Args:
            hidden: final states ``[R, M, d]``, of each sequence its last ``counts`` positions.
        """
        if max(counts) > 1:
            observe_forced(self._runner, rows, hidden, counts)
        self.predict(rows, newest(hidden, counts))

    def predict(self, rows: Sequence[DecodingSequence], hidden: Tensor) -> None:
        """Appends the next token of each sequence, from its newest final state ``[R, d]``."""
        if any(one.constraint is not None for one in rows):
            rows, hidden = self._unforced(rows, hidden)
            if not rows:
                return
        reading = self.read(rows, hidden, [1] * len(rows))
        if self.near_ties:
            rows, reading = self._choose_near_ties(rows, reading)
        if rows:
            self.choose(rows, reading)

    def _choose_near_ties(
        self, rows: Sequence[DecodingSequence], reading: HeadOutput
    ) -> tuple[Sequence[DecodingSequence], HeadOutput]:
        """Has dense's own passes choose near-ties; the other rows and what was read for them."""
        decided = []
        for place, sequence in enumerate(rows):
            near_ties, made = self.near_ties.get(sequence.index), len(sequence.records)
            if near_ties is None:
                decided.append(place)
                continue
            if made == 0:
                near_ties.begin(sequence.prompt_tokens)
            near_ties.note_pass(sequence, 1)
            scores = reading.logits[place : place + 1]
            if sequence.processed:
                scores = choose_tokens(scores, [(sequence, made)])[0][1]
            if near_ties.undecided(sequence, made, scores):
                state = near_ties.run_again(sequence, made)
                self.choose([sequence], self._backbone.read_full_depth(state))
            else:
                decided.append(place)
        if len(decided) == len(rows):
            return rows, reading
        return [rows[place] for place in decided], reading.take(decided)

    def _unforced(
        self, rows: Sequence[DecodingSequence], hidden: Tensor
    ) -> tuple[list[DecodingSequence], Tensor]:
        """Appends what constraints force here, e.g. at the start; the other rows and states."""
        free = []
        for place, sequence in enumerate(rows):
            made = len(sequence.records)
            if sequence.watch is not None:  # nothing is read where a token is forced
                observe(self._runner, [sequence], hidden[place : place + 1], [1])
            sequence.add_forced(self.seconds_of(sequence), self._backbone.vocab_size)
            if len(sequence.records) == made:
                free.append(place)
        return [rows[place] for place in free], hidden[free]

    def seconds_of(self, sequence: DecodingSequence) -> float:
        """Seconds since the sequence began."""
        return self._stopwatch.clock() - sequence.began

    def read(
        self, rows: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> HeadOutput:
        """Predictions from ``hidden [N, d]``, each row's last `counts`, deliberation included."""
        watched = any(one.watch is not None for one in rows)
        gated = self._gate is not None and any(one.gated for one in rows)
        if not gated and not watched:
            return self._backbone.read_full_depth(hidden)
        logits = self._backbone.logits(hidden)
        rounds: list[int] = []
        if gated:
            logits, rounds = self._deliberate(rows, hidden, counts, logits)
        if watched:
            firsts = observe(self._runner, rows, hidden, counts)
            logits = reweighed(rows, firsts, counts, logits)
        return HeadOutput(logits, rounds=rounds)

    def _deliberate(
        self,
        rows: Sequence[DecodingSequence],
        hidden: Tensor,
        counts: Sequence[int],
        logits: Tensor,
    ) -> tuple[Tensor, list[int]]:
        """Logits ``[N, V]`` after the rounds of sequences with a gate, and each state's rounds."""
        assert self._gate is not None
        places: list[int] = []
        owners: list[int] = []
        positions: list[int] = []
        thresholds: list[float] = []
        at = 0
        for sequence, count in zip(rows, counts, strict=True):
            if sequence.gate_threshold is not None:
                places += range(at, at + count)
                owners += [sequence.row] * count
                positions += self._runner.position_range(sequence, count)
                thresholds += [sequence.gate_threshold] * count
            at += count
        if len(places) == at:
            return self._gate.deliberate(hidden, logits, owners, positions, thresholds)
        refined, own = self._gate.deliberate(
            hidden[places], logits[places], owners, positions, thresholds
        )
        rounds = [0] * at
        for place, taken in zip(places, own, strict=True):
            rounds[place] = taken
        if any(own):
            logits = logits.index_copy(0, torch.tensor(places, device=logits.device), refined)
        return logits, rounds

    def choose(
        self,
        rows: Sequence[DecodingSequence],
        reading: HeadOutput,
        chosen: Mapping[int, tuple[int, Tensor]] | None = None,
    ) -> None:
        """Appends the token that full depth chooses, one of each sequence.

        Args:
            chosen: by row, tokens and processed scores that have been chosen already.
        """
        if chosen is None:
            chosen = self._chosen(rows, reading)
        confidences: Sequence[float] | None = None
        depth = self._backbone.num_layers
        for place, sequence in enumerate(rows):
            made = chosen.get(place)
            if made is not None and sequence.keeps:
                sequence.scores.append(sequence.kept(made[0], reading.logits[place], made[1]))
            confidence = float("nan")
            if sequence.confident:
                confidences = reading.probabilities if confidences is None else confidences
                confidence = confidences[place]
            sequence.add(
                reading.tokens[place] if made is None else made[0],
                depth,
                confidence,
                self.seconds_of(sequence),
                verified=True,
                rounds=reading.rounds_of(place),
            )
            sequence.verified = len(sequence.records)
            if sequence.constraint is not None:
                sequence.add_forced(self.seconds_of(sequence), self._backbone.vocab_size)

    def _chosen(
        self, rows: Sequence[DecodingSequence], reading: HeadOutput
    ) -> dict[int, tuple[int, Tensor]]:
        """Next token and processed scores of those rows whose tokens are not plain argmaxes."""
        own = [place for place, sequence in enumerate(rows) if sequence.processed]
        if not own:
            return {}
        logits = reading.logits if len(own) == len(rows) else reading.logits[own]
        places = [(rows[place], len(rows[place].records)) for place in own]
        return dict(zip(own, choose_tokens(logits, places), strict=True))

    def complete(
        self, rows: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> None:
        """Ends a deep pass: verifies drafts (exact mode) and chooses the tokens that come next.

        Args:
            hidden: final states ``[R, M, d]``, of each sequence its last ``counts`` positions.
        """
        for sequence in rows:
            sequence.blocked, sequence.waited = False, 0
            sequence.deep_passes += 1
        drafted = [place for place, sequence in enumerate(rows) if sequence.exact]
        if len(drafted) < len(rows):
            self._compare(rows, hidden, counts)
        if not drafted:
            new = self._unpredicted(rows, hidden, counts)
            if new:
                last = newest(hidden, counts)
                states = last if len(new) == len(rows) else last[new]
                self.predict([rows[place] for place in new], states)
            return
        # Of an exact sequence all states are read, of another only the newest, in one call.
        read, sizes = drafted, [counts[place] for place in drafted]
        states = flat(hidden if len(drafted) == len(rows) else hidden[drafted], sizes)
        if len(drafted) < len(rows):
            new = self._unpredicted(rows, hidden, counts)
            read, sizes = drafted + new, sizes + [1] * len(new)
            states = torch.cat((states, newest(hidden, counts)[new]))
        self._verify_all([rows[place] for place in read], states, sizes)

    def _unpredicted(
        self, rows: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> list[int]:
        """Places of the sequences without drafts whose next token has not been chosen yet."""
        new = []
        for place, (sequence, count) in enumerate(zip(rows, counts, strict=True)):
            if sequence.exact:
                continue
            if sequence.watch is not None:
                observe(self._runner, [sequence], hidden[place, :count], [count])
            if self._runner.token_range(sequence, count)[1] == len(sequence.records):
                new.append(place)
        return new

    def _verify_all(
        self, rows: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> None:
        """Verifies the drafts that ``hidden [N, d]`` follow from, and chooses the next tokens."""
        reading = self.read(rows, hidden, counts)
        chosen = self._choose_drafted(rows, counts, reading)
        fresh: list[tuple[DecodingSequence, int]] = []
        at = 0
        for sequence, count in zip(rows, counts, strict=True):
            if sequence.exact:
                self._verify(sequence, count, reading, at, fresh, chosen)
            else:
                fresh.append((sequence, at))
            at += count
        if fresh:
            own = [row for _, row in fresh]
            self.choose(
                [sequence for sequence, _ in fresh],
                reading.take(own),
                {place: chosen[row] for place, row in enumerate(own) if row in chosen},
            )
        for planner in {id(one.planner): one.planner for one in rows if one.planner}.values():
            planner.review()

    def _choose_drafted(
        self, rows: Sequence[DecodingSequence], counts: Sequence[int], reading: HeadOutput
    ) -> dict[int, tuple[int, Tensor]]:
        """Token and scores by row of the reading, up to each sequence's first rejected draft.

        Of sequences whose tokens are not plain argmaxes. The first rows of all are chosen in one
        call, then the second rows of those whose drafts are accepted so far, and so on.
        """
        chosen: dict[int, tuple[int, Tensor]] = {}
        accepted: list[tuple[DecodingSequence, int, int, int]] = []
        at = 0
        for sequence, count in zip(rows, counts, strict=True):
            if sequence.processed:
                first = self._runner.token_range(sequence, count)[0]
                accepted.append((sequence, at, first, at + count))
            at += count
        while accepted:
            places = [row for _, row, _, _ in accepted]
            made = [(sequence, index) for sequence, _, index, _ in accepted]
            chosen |= zip(places, choose_tokens(reading.logits[places], made), strict=True)
            accepted = [
                (sequence, row + 1, index + 1, end)
                for sequence, row, index, end in accepted
                if index < len(sequence.records)
                and sequence.records[index].token == chosen[row][0]
                and row + 1 < end
            ]
        return chosen

    def _verify(
        self,
        sequence: DecodingSequence,
        count: int,
        reading: HeadOutput,
        at: int,
        fresh: list[tuple[DecodingSequence, int]],
        chosen: Mapping[int, tuple[int, Tensor]],
    ) -> None:
        """Compares a sequence's drafts with full depth's choices, rows `at`.. of the reading.

        Adds to `fresh` the row that chooses the sequence's next token.
        """
        first, last = self._runner.token_range(sequence, count)
        near_ties = self.near_ties.get(sequence.index) if self.near_ties else None
        if near_ties is not None:
            near_ties.note_pass(sequence, count)
        for index in range(first, last + 1):
            row = at + index - first
            if near_ties is not None:
                scored = chosen[row][1] if sequence.processed else reading.logits[row]
                if near_ties.undecided(sequence, index, scored):
                    self._decide_near_tie(sequence, index, near_ties)
                    return
            if index == len(sequence.records):
                fresh.append((sequence, row))
                return
            token, scores = chosen[row] if sequence.processed else (reading.tokens[row], None)
            draft = sequence.records[index]
            agreed = token == draft.token
            # Layer 0: looked up, or forced by a constraint.
            if sequence.planner is not None and 0 < draft.exit_layer < self._backbone.num_layers:
                sequence.planner.verified(
                    self._runner.boundaries.index(draft.exit_layer),
                    agreed,
                    discarded=len(sequence.records) - index - 1,
                )
            if not agreed:
                self._runner.roll_back(sequence, index)
                fresh.append((sequence, row))
                return
            if not draft.verified:
                sequence.confirm(index, reading.rounds_of(row))
            if sequence.keeps:
                # A draft that was looked up has none until here.
                kept = sequence.kept(token, reading.logits[row], scores)
                sequence.scores[index : index + 1] = [kept]

    def _decide_near_tie(self, sequence: DecodingSequence, index: int, near_ties: NearTies) -> None:
        """Has dense's own passes choose the token at `index`, and removes the drafts after it."""
        reading = self._backbone.read_full_depth(near_ties.run_again(sequence, index))
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
        if sequence.planner is not None and draft.exit_layer < self._backbone.num_layers:
            sequence.planner.verified(
                self._runner.boundaries.index(draft.exit_layer), agreed, discarded=0
            )

    def _compare(
        self, rows: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> None:
        """Tells policies with how many tokens that exited early full depth agrees, now and then."""
        due = [
            place
            for place, sequence in enumerate(rows)
            if sequence.policy.compare_every
            and sequence.deep_passes % sequence.policy.compare_every == 0
        ]
        if not due:
            return
        rows, counts = [rows[place] for place in due], [counts[place] for place in due]
        tokens = self.read(rows, flat(hidden[due], counts), counts).tokens
        # Sequences of one generation share a policy, which is told once of a pass.
        totals: dict[int, list[int]] = {}
        at = 0
        for sequence, count in zip(rows, counts, strict=True):
            first, last = self._runner.token_range(sequence, count)
            total = totals.setdefault(id(sequence.policy), [0, 0])
            for index in range(first, min(last + 1, len(sequence.records))):
                total[0] += tokens[at + index - first] == sequence.records[index].token
                total[1] += 1
            at += count
        for policy in {id(one.policy): one.policy for one in rows}.values():
            agreed, compared = totals[id(policy)]
            if compared:
                policy.on_compared(agreed, compared)
