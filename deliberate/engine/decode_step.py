"""One step of the decode loop: which sequences are run through which segments.

The first segment runs for the sequences that can go on drafting or exiting there. A sequence that
cannot (its newest token did not exit) is *blocked* until a deep pass. A deep pass runs when enough
sequences are blocked, or one has waited long enough (`DeepSchedule`), and serves all of them at
once, with everything that is pending of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from deliberate.config import KVMode
from deliberate.engine.exit_step import ExitStep
from deliberate.engine.loop_settings import Stopwatch
from deliberate.engine.multi_step import MultiStep
from deliberate.engine.ngram_drafts import DraftSource
from deliberate.engine.row_states import newest
from deliberate.engine.scheduler import DeepSchedule
from deliberate.engine.segment_runner import SegmentRunner
from deliberate.engine.sequence import DecodingSequence
from deliberate.engine.verifier import Verifier

# Passes without drafts in one call of the executor, where a pass is cheap.
_CHEAP_STEPS = 8
# Weight of the newest time of a full-depth pass without drafts.
_NEWEST = 0.25
# Looked-up drafts beside others: before they are judged, after which older ones count half; of so
# many passes one has drafts where they do not pay; and seconds of a pass for each sequence below
# which looking up costs too large a part of them.
_ENOUGH, _MEMORY, _TRY_AGAIN, _CHEAP_SHARE = 16, 512, 16, 0.0005


class DecodeStep:
    """Steps of sequences that share passes, whatever each of them was asked for.

    Args:
        runner: runs the segments and keeps the pending states.
        exit_step: evaluates the exits.
        verifier: chooses and verifies tokens at full depth.
        multi_step: decodes several tokens in one call of the executor.
        schedule: when deep passes are run.
        stopwatch: reads the clock.

    Attributes:
        lone: whether there is one sequence only; None: where the cache has one row.
    """

    def __init__(
        self,
        runner: SegmentRunner,
        exit_step: ExitStep,
        verifier: Verifier,
        multi_step: MultiStep | None,
        schedule: DeepSchedule,
        stopwatch: Stopwatch,
    ) -> None:
        self._stopwatch = stopwatch
        self._runner = runner
        self._exit_step = exit_step
        self._verifier = verifier
        self._schedule = schedule
        self._multi_step = multi_step
        self._last = len(runner.boundaries) - 1
        self.lone: bool | None = None
        self._full_passes: dict[int, float] = {}
        # Of looked-up drafts beside others, and the seconds that one adds to a pass.
        self._drafted, self._accepted, self._extra, self._declined = 0.0, 0.0, 0.0, 0

    def run(self, active: Sequence[DecodingSequence]) -> None:
        """Runs a shallow pass for the sequences that are not blocked, or a deep one for the others.

        Args:
            active: the unfinished sequences, at least one.
        """
        if self.recomputed(active):
            return
        ready = [sequence for sequence in active if not sequence.blocked]
        if ready and not self._schedule.is_due(active):
            blocked = [sequence for sequence in active if sequence.blocked]
            passes = self.shallow(ready, active)
            for sequence in blocked:
                sequence.waited += passes
            ready = [sequence for sequence in active if not sequence.blocked]
            if ready:
                return
        blocked = [sequence for sequence in active if sequence.blocked]
        if blocked:
            self.deep(blocked + [sequence for sequence in ready if self._joins(sequence)])

    def recomputed(self, active: Sequence[DecodingSequence]) -> bool:
        """Recomputes sequences at the length where "longrope" changes its frequencies; if any."""
        switch = self._runner.backbone.rope_switch
        if switch is None:
            return False
        recomputed = [one for one in active if one.position == switch]
        for sequence in recomputed:
            if self._verifier.near_ties is not None:
                self._verifier.near_ties.begin(switch + 1)  # dense runs the same pass
            self._verifier.predict([sequence], self._runner.recompute(sequence))
        return bool(recomputed)

    def _joins(self, sequence: DecodingSequence) -> bool:
        """Whether a sequence that is not blocked takes part in a deep pass, to verify drafts."""
        if not sequence.exact:
            # It would be allowed to exit where alone it would not: its output would depend on
            # the others.
            return False
        limit = self._schedule.join * sequence.pending_limit
        enough = self._runner.pending_tokens(sequence) >= limit
        return enough and self._runner.pending_at_first_exit(sequence) > 0

    def due(self, active: Sequence[DecodingSequence]) -> list[DecodingSequence]:
        """Those that a deep pass should serve now; none where it is not due."""
        if not self._schedule.is_due(active):
            return []
        return [one for one in active if one.blocked or self._joins(one)]

    def shallow(
        self, ready: Sequence[DecodingSequence], active: Sequence[DecodingSequence] = ()
    ) -> int:
        """Feeds the newest tokens to the first segment; each then exits or is blocked.

        Where no exit is evaluated for any of them, they go through all layers at once.

        Args:
            ready: in rising rows, none of them blocked.
            active: all that are running: several drafts may be made in one call, until a deep pass
                of these is due. Empty: one token of each is fed.

        Returns:
            Passes of the first segment, where several sequences drafted in one call; else 1.
        """
        runner = self._runner
        counts = [1] * len(ready)
        if any(sequence.constraint is not None for sequence in ready):
            counts = [self._unfed(sequence) for sequence in ready]
        for planner in {id(p): p for one in ready if (p := one.planner) is not None}.values():
            for _ in range(min(counts)):
                planner.token_fed()
        stop = self._next_stop(0, ready)
        lookup = ready[0].lookup
        if lookup is not None and (runner.cache.batch == 1 if self.lone is None else self.lone):
            self._look_up(lookup, ready[0])
            return 1
        if stop == self._last and any(one.lookup is not None for one in ready):
            self._look_up_together(ready, counts)
            return 1
        if len(ready) == 1 and self._run_multi_step(ready[0], stop):
            return 1
        multi_step = self._multi_step
        if stop == 0 and active and multi_step is not None and multi_step.can_draft_rows(ready):
            enough, patience = self._schedule.until_due(active)
            waiting = any(sequence.blocked for sequence in active)
            return multi_step.draft_rows(ready, enough, patience, waiting=waiting)
        most = max(counts)
        tokens = [
            [record.token for record in sequence.records[-count:]] + [0] * (most - count)
            for sequence, count in zip(ready, counts, strict=True)
        ]
        ids = torch.tensor(tokens, device=runner.backbone.device)
        hidden = runner.run(0, ready, ids, counts, through=stop)
        if stop == self._last:
            self._verifier.predict(ready, newest(hidden, counts))
            return 1
        if stop > 0:
            for sequence in ready:
                sequence.blocked = True
            self._exit_or_continue(stop, ready, hidden, counts)
            return 1
        exiting = self._exit_step.evaluate(0, ready, newest(hidden, counts))
        for sequence in ready:
            sequence.blocked = sequence not in exiting
            sequence.waited = 0
        self._keep_pending(0, exiting, ready, hidden, counts)
        return 1

    def _unfed(self, sequence: DecodingSequence) -> int:
        """Tokens that no layer has been run for yet: the newest, and those forced before it."""
        return sequence.position + 1 - self._runner.cache.length(0, sequence.row)

    def _keep_pending(
        self,
        k: int,
        exiting: Sequence[DecodingSequence],
        rows: Sequence[DecodingSequence],
        hidden: Tensor,
        counts: Sequence[int],
    ) -> None:
        """Keeps ``hidden [R, M, d]`` as pending at exit `k`, where tokens are deferred."""
        passing = [sequence for sequence in exiting if not sequence.defers]
        if not passing:
            self._runner.add_pending(k, rows, hidden, counts)
            return
        self._runner.pass_by(k, passing, rows, hidden)
        stay = [place for place, sequence in enumerate(rows) if sequence not in passing]
        if stay:
            kept = [rows[place] for place in stay]
            self._runner.add_pending(k, kept, hidden[stay], [counts[place] for place in stay])

    def _look_up(self, lookup: DraftSource, sequence: DecodingSequence) -> None:
        """One full-depth pass over the newest token and the drafts after it."""
        runner, made = self._runner, len(sequence.records)
        start = sequence.position
        # Several where a constraint has forced tokens; their states, which drafts follow from, are
        # not known yet.
        fed = 1 if sequence.constraint is None else self._unfed(sequence)
        drafts = _proposed(lookup, sequence) if fed == 1 else []
        began = self._stopwatch.clock()
        multi_step = self._multi_step
        if (
            not drafts
            and fed == 1
            and lookup.cheap_pass
            and multi_step is not None
            and multi_step.possible(sequence, None)
        ):
            # Where a pass takes little more than the loop around it, several are one call.
            steps = multi_step.full_depth(sequence, _CHEAP_STEPS)
            lookup.note_single((self._stopwatch.clock() - began) / steps)
            return
        tokens = [record.token for record in sequence.records[-fed:]] + drafts
        for token in drafts:
            sequence.draft(token, 0, float("nan"), self._stopwatch.clock() - sequence.began)
        ids = torch.tensor([tokens], device=runner.backbone.device)
        hidden = runner.run(0, [sequence], ids, [len(tokens)], through=self._last)
        lookup.saw(start - fed + 1, hidden[0])
        if drafts:
            self._verifier.complete([sequence], hidden, [len(tokens)])
            agrees = map(
                lambda record, token: record.token == token, sequence.records[made:], drafts
            )
            accepted = len(list(itertools.takewhile(bool, agrees)))
            lookup.note_drafts(len(drafts), accepted, self._stopwatch.clock() - began)
        else:
            self._verifier.predict([sequence], hidden[:, -1])
            if fed == 1:
                lookup.note_single(self._stopwatch.clock() - began)

    def _look_up_together(self, rows: Sequence[DecodingSequence], counts: Sequence[int]) -> None:
        """One full-depth pass of several sequences, with the drafts of those that look them up.

        Nothing is drafted before a pass of so many has been timed without.

        Args:
            counts: tokens of each that no layer has been run for yet.
        """
        runner, work = self._runner, self._stopwatch.work
        single = self._full_passes.get(len(rows))
        if single is not None and not self._lookup_pays(single / len(rows)):
            single = None
        drafts = [
            _proposed(one.lookup, one)
            if one.lookup is not None and count == 1 and single is not None
            else []
            for one, count in zip(rows, counts, strict=True)
        ]
        before = [len(one.records) for one in rows]
        tokens = [
            [record.token for record in sequence.records[-count:]] + own
            for sequence, count, own in zip(rows, counts, drafts, strict=True)
        ]
        for sequence, own in zip(rows, drafts, strict=True):
            for token in own:
                sequence.draft(token, 0, float("nan"), self._stopwatch.clock() - sequence.began)
        began, sizes = work(), list(map(len, tokens))
        padded = [own + [0] * (max(sizes) - len(own)) for own in tokens]
        ids = torch.tensor(padded, device=runner.backbone.device)
        hidden = runner.run(0, rows, ids, sizes, through=self._last)
        drafted = [place for place, own in enumerate(drafts) if own]
        plain = [place for place, own in enumerate(drafts) if not own]
        if plain:
            self._verifier.predict([rows[one] for one in plain], newest(hidden, sizes)[plain])
        if drafted:
            ours = [rows[one] for one in drafted]
            self._verifier.complete(ours, hidden[drafted], [sizes[one] for one in drafted])
        seconds = work() - began
        if single is None or not drafted:
            if max(counts) == 1:
                usual = self._full_passes.get(len(rows), seconds)
                self._full_passes[len(rows)] = usual + _NEWEST * (seconds - usual)
                for sequence in rows:
                    if sequence.lookup is not None:
                        sequence.lookup.note_single(seconds / len(rows))
            return
        extra = max(0.0, seconds - single) / sum(map(len, drafts))
        self._extra += _NEWEST * (extra - self._extra) if self._drafted else extra
        if self._drafted > _MEMORY:
            self._drafted, self._accepted = self._drafted / 2, self._accepted / 2
        for place in drafted:
            sequence, own = rows[place], drafts[place]
            assert sequence.lookup is not None
            made = sequence.records[before[place] :]
            agrees = (record.token == token for record, token in zip(made, own, strict=False))
            accepted = len(list(itertools.takewhile(bool, agrees)))
            share = single / len(rows) + extra * len(own)
            self._drafted += len(own)
            self._accepted += accepted
            sequence.lookup.note_drafts(len(own), accepted, share)

    def _lookup_pays(self, share: float) -> bool:
        """Whether looked-up drafts are worth their time beside others, or one pass in 16 tries.

        A token is worth a sequence's `share` of a pass, in seconds.
        """
        if share < _CHEAP_SHARE:
            return False
        if self._drafted < _ENOUGH or self._accepted * share > self._drafted * self._extra:
            return True
        self._declined += 1
        return self._declined % _TRY_AGAIN == 0

    def _run_multi_step(self, sequence: DecodingSequence, stop: int) -> bool:
        """Lets the executor decode several tokens up to a boundary, if it can; whether it did."""
        full = stop == self._last
        multi_step = self._multi_step
        if multi_step is None or not multi_step.possible(sequence, None if full else stop):
            return False
        if full:
            multi_step.full_depth(sequence)
            return True
        if not sequence.defers or not sequence.is_enabled(stop):
            return False
        limit, threshold = sequence.pending_limit, sequence.thresholds[stop]
        if not multi_step.draft(sequence, stop, limit, threshold):
            return False
        if sequence.blocked and stop > 0:
            self._continue(stop + 1, [sequence], *self._runner.take_pending(stop, [sequence]))
        return True

    def deep(self, rows: Sequence[DecodingSequence]) -> None:
        """Runs the upper segments for these sequences and all that is pending of them."""
        rows = sorted(rows, key=lambda sequence: sequence.row)
        hidden, counts = self._runner.take_pending(0, rows)
        self._continue(1, rows, hidden, counts)

    def _continue(
        self, k: int, rows: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> None:
        """Runs ``hidden [R, M, d]`` through segment `k` and on, to the next stop or full depth."""
        stop = self._next_stop(k, rows)
        hidden = self._runner.run(k, rows, hidden, counts, through=stop)
        if stop == self._last:
            self._verifier.complete(rows, hidden, counts)
        else:
            self._exit_or_continue(stop, rows, hidden, counts)

    def _exit_or_continue(
        self, k: int, rows: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> None:
        """At exit `k`: some newest tokens exit, the others go on with what is pending there."""
        runner = self._runner
        candidates = [index for index, sequence in enumerate(rows) if sequence.blocked]
        states = newest(hidden, counts)
        chosen = [rows[index] for index in candidates]
        if len(candidates) < len(rows):
            states = states[candidates]
        exiting = self._exit_step.evaluate(k, chosen, states) if chosen else []
        for sequence in exiting:
            sequence.blocked = False
        if not exiting and not runner.has_pending(k, rows):
            self._continue(k + 1, rows, hidden, counts)
            return
        self._keep_pending(k, exiting, rows, hidden, counts)
        staying = [sequence for sequence in rows if sequence not in exiting]
        if staying:
            self._continue(k + 1, staying, *runner.take_pending(k, staying))

    def _next_stop(self, k: int, rows: Sequence[DecodingSequence]) -> int:
        """The first boundary from `k` on that is evaluated, has pending tokens, or is the last."""
        if any(sequence.settings.kv_mode is KVMode.SKIP for sequence in rows):
            return k  # each segment has holes of its own
        # Without exits nothing is ever pending of a sequence.
        own = [sequence for sequence in rows if sequence.settings.exits]
        if not own:
            return self._last
        runner = self._runner
        while k < self._last and not runner.has_pending(k, own):
            if any(sequence.is_enabled(k) for sequence in own):
                break
            k += 1
        return k


def _proposed(lookup: DraftSource, sequence: DecodingSequence) -> list[int]:
    """Drafts after the newest token of a sequence that may come next in its output."""
    # The last token of the output, and one that ends it, are chosen at full depth.
    left = sequence.settings.max_new_tokens - len(sequence.records) - 1
    # The prefix may begin with padding.
    known = sequence.ids(len(sequence.records))[-sequence.position - 1 :]
    drafts = lookup.propose(known, left) if left > 0 else []
    ends = sequence.settings.end_tokens
    drafts = drafts[: next((i for i, token in enumerate(drafts) if token in ends), None)]
    if drafts and sequence.constraint is not None:
        drafts = sequence.constraint.allowed(sequence.records, drafts)
    return drafts
