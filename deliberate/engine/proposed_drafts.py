"""Full-depth passes over drafts that were proposed: looked up in the text, or by a draft layer.

A lone sequence has a pass of its own. Beside others, what one more draft adds to the pass that they
share, and how many are accepted, are measured: where drafts do not pay, most passes have none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from deliberate.cache.kv_cache import SegmentCache
from deliberate.engine.layer_drafts import propose_together
from deliberate.engine.loop_settings import Stopwatch
from deliberate.engine.model_drafts import ModelDrafts
from deliberate.engine.multi_step import MultiStep
from deliberate.engine.ngram_drafts import DraftSource
from deliberate.engine.segment_runner import SegmentRunner
from deliberate.engine.sequence import DecodingSequence
from deliberate.engine.verifier import Verifier

# Weight of the newest time of a full-depth pass without drafts.
_NEWEST = 0.25
# Passes with drafts of so many sequences after which one without is timed again.
_REFRESH = 64
# Looked-up drafts beside others: share that is expected to be accepted, drafts that this counts
# as, after which older ones count half; of so many passes one has drafts where they do not pay; and
# seconds of a pass for each sequence below which looking up costs too large a part of them.
_EXPECTED = 0.5
# A further token of a pass that several share, against a token of a prefill: the head is evaluated
# for it, too, and few rows use the processor less well (SmolLM2: 1.3 in float32, 1.6 at 4 bits).
_BESIDE = 1.5
_ENOUGH, _MEMORY, _TRY_AGAIN, _CHEAP_SHARE = 16, 512, 16, 0.0005


class ProposedDrafts:
    """Passes of sequences without exits, whose drafts are proposed.

    Args:
        runner: runs the segments.
        verifier: verifies the drafts.
        multi_step: decodes several tokens in one call of the executor.
        stopwatch: reads the clock.
    """

    def __init__(
        self,
        runner: SegmentRunner,
        verifier: Verifier,
        multi_step: MultiStep | None,
        stopwatch: Stopwatch,
    ) -> None:
        self._runner = runner
        self._verifier = verifier
        self._multi_step = multi_step
        self._stopwatch = stopwatch
        self._last = len(runner.boundaries) - 1
        self._full_passes: dict[int, float] = {}
        self._since_full: dict[int, int] = {}
        # Of looked-up drafts beside others, and the seconds that one adds to a pass.
        self._drafted, self._accepted, self._extra, self._declined = 0.0, 0.0, 0.0, 0

    def alone(self, lookup: DraftSource, sequence: DecodingSequence) -> None:
        """One full-depth pass over the newest token and the drafts after it."""
        runner, made = self._runner, len(sequence.records)
        # Several where a constraint has forced tokens; their states, which drafts follow from, are
        # not known yet.
        fed = 1 if sequence.constraint is None else unfed(self._runner, sequence)
        multi_step = self._multi_step
        if fed > 1 or (multi_step is not None and not multi_step.possible(sequence, None)):
            multi_step = None
        if multi_step is not None and multi_step.drafted(sequence, lookup):
            return
        drafts = propose([sequence], runner.cache)[0] if fed == 1 else []
        began = self._stopwatch.work()
        if multi_step is not None and not drafts:
            steps = multi_step.full_depth(sequence, lookup.plain_passes)
            lookup.note_single((self._stopwatch.work() - began) / steps, steps)
            return
        tokens = sequence.newest_tokens(fed) + drafts
        for token in drafts:
            sequence.draft(token, 0, float("nan"), self._stopwatch.clock() - sequence.began)
        ids = torch.tensor([tokens], device=runner.backbone.device)
        hidden = runner.run(0, [sequence], ids, [len(tokens)], through=self._last)
        if drafts:
            self._verifier.complete([sequence], hidden, [len(tokens)])
            agrees = map(
                lambda record, token: record.token == token, sequence.records[made:], drafts
            )
            accepted = len(list(itertools.takewhile(bool, agrees)))
            lookup.note_drafts(len(drafts), accepted, self._stopwatch.work() - began)
        else:
            self._verifier.predict_after([sequence], hidden, [fed])
            if fed == 1:
                lookup.note_single(self._stopwatch.work() - began)

    def after_prompt(
        self, sequence: DecodingSequence, hidden: Tensor, drafts: Sequence[int]
    ) -> None:
        """Appends a sequence's first tokens: those that drafts in its prompt's pass agree with, and
        one more. What the cache holds of the other drafts is removed.

        Args:
            hidden: final states ``[1 + drafts, d]``, of the prompt's last token and of the drafts.
        """
        runner, verifier = self._runner, self._verifier
        reading = verifier.read([sequence], hidden, [len(hidden)])
        for index, token in enumerate(reading.tokens):
            confidence = reading.probabilities[index] if sequence.confident else float("nan")
            depth, seconds = runner.boundaries[-1], verifier.seconds_of(sequence)
            sequence.add(token, depth, confidence, seconds, verified=True)
            if index == len(drafts) or token != drafts[index] or sequence.is_complete():
                break
        sequence.verified = len(sequence.records)
        runner.cache.crop(sequence.position, sequence.row)

    def together(self, rows: Sequence[DecodingSequence], counts: Sequence[int]) -> None:
        """One full-depth pass of several sequences, with the drafts of those that look them up.

        Nothing is drafted before a pass of so many has been timed without.

        Args:
            counts: tokens of each that no layer has been run for yet.
        """
        runner, work = self._runner, self._stopwatch.work
        single = self._full_passes.get(len(rows))
        if self._since_full.get(len(rows), 0) >= _REFRESH:
            single = None  # it is timed without drafts again
        drafts = self._drafts_of(rows, counts, single)
        before = [len(one.records) for one in rows]
        tokens = [
            sequence.newest_tokens(count) + own
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
            final = hidden[plain] if drafted else hidden
            ours = [rows[one] for one in plain]
            self._verifier.predict_after(ours, final, [sizes[one] for one in plain])
        if drafted:
            ours = [rows[one] for one in drafted]
            self._verifier.complete(ours, hidden[drafted], [sizes[one] for one in drafted])
        seconds = work() - began
        if single is None or not drafted:
            if max(counts) == 1 and not drafted:
                self._since_full[len(rows)] = 0
                usual = self._full_passes.get(len(rows), seconds)
                self._full_passes[len(rows)] = usual + _NEWEST * (seconds - usual)
                for sequence in rows:
                    if sequence.lookup is not None:
                        sequence.lookup.note_single(seconds / len(rows))
            return
        self._since_full[len(rows)] = self._since_full.get(len(rows), 0) + 1
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

    def _drafts_of(
        self, rows: Sequence[DecodingSequence], counts: Sequence[int], single: float | None
    ) -> list[list[int]]:
        """Drafts of each sequence beside the others.

        Args:
            single: seconds of a pass of them without drafts; None: nothing is drafted.
        """
        if single is None:
            return [[] for _ in rows]
        if self._expected is not None:
            share = self._expected * len(rows) / single
            for sequence in rows:
                if sequence.lookup is not None:
                    sequence.lookup.expect_token(share)
        looked_up = [one.lookup is not None and not one.lookup.judges_load for one in rows]
        pays = any(looked_up) and self._lookup_pays(single / len(rows))
        asked = [
            place
            for place, (sequence, count) in enumerate(zip(rows, counts, strict=True))
            if sequence.lookup is not None and count == 1 and (pays or not looked_up[place])
        ]
        made = propose([rows[place] for place in asked], self._runner.cache)
        drafts: list[list[int]] = [[] for _ in rows]
        for place, own in zip(asked, made, strict=True):
            drafts[place] = own
        return drafts

    @property
    def _expected(self) -> float | None:
        """Seconds that one more token is expected to add to a pass; None where nothing is known."""
        token = self._runner.token_seconds
        return None if token is None else _BESIDE * token

    def _lookup_pays(self, share: float) -> bool:
        """Whether looked-up drafts are worth their time beside others, or one pass in 16 tries.

        A token is worth a sequence's `share` of a pass, in seconds. Before drafts were measured one
        is taken to cost what a token of a prefill does, and half of them to be accepted.
        """
        if share < _CHEAP_SHARE:
            return False
        extra = self._extra if self._drafted else (self._expected or 0.0)
        accepted = self._accepted + _EXPECTED * _ENOUGH
        if accepted * share > (self._drafted + _ENOUGH) * extra:
            return True
        self._declined += 1
        return self._declined % _TRY_AGAIN == 0


def unfed(runner: SegmentRunner, sequence: DecodingSequence) -> int:
    """Tokens that no layer has been run for yet: the newest, and those forced before it."""
    return sequence.position + 1 - runner.cache.length(0, sequence.row)


def propose(rows: Sequence[DecodingSequence], cache: SegmentCache) -> list[list[int]]:
    """Drafts after the newest token of each sequence that may come next in its output.

    Args:
        cache: in which the sequences' keys and values lie.
    """
    drafts: list[list[int]] = [[] for _ in rows]
    asked, places = [], []
    for place, sequence in enumerate(rows):
        # The last token of the output, and one that ends it, are chosen at full depth.
        left = sequence.settings.max_new_tokens - len(sequence.records) - 1
        if left > 0 and sequence.lookup is not None:
            # The prefix may begin with padding.
            known = sequence.ids(len(sequence.records))[-sequence.position - 1 :]
            if isinstance(sequence.lookup, ModelDrafts):
                sequence.lookup.place(cache, sequence.row)
            asked.append((sequence.lookup, known, left))
            places.append(place)
    for place, made in zip(places, propose_together(asked), strict=True):
        sequence, index = rows[place], len(rows[place].records)
        ends = (i for i, token in enumerate(made) if sequence.is_end(token, index + i))
        made = made[: next(ends, None)]
        if made and sequence.constraint is not None:
            made = sequence.constraint.allowed(sequence.records, made)
        drafts[place] = made
    return drafts
