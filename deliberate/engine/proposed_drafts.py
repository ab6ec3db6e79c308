"""Full-depth passes over drafts that were proposed: looked up in the text, or by a draft layer.

A lone sequence has a pass of its own. Beside others, what one more draft adds to the pass that they
share, and how many are accepted, are measured: where drafts do not pay, most passes have none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from deliberate.engine.loop_settings import Stopwatch
from deliberate.engine.multi_step import MultiStep
from deliberate.engine.ngram_drafts import DraftSource
from deliberate.engine.row_states import newest
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
        # Of looked-up drafts beside others, and the seconds that one adds to a pass.
        self._drafted, self._accepted, self._extra, self._declined = 0.0, 0.0, 0.0, 0

    def alone(self, lookup: DraftSource, sequence: DecodingSequence) -> None:
        """One full-depth pass over the newest token and the drafts after it."""
        runner, made = self._runner, len(sequence.records)
        start = sequence.position
        # Several where a constraint has forced tokens; their states, which drafts follow from, are
        # not known yet.
        fed = 1 if sequence.constraint is None else unfed(self._runner, sequence)
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

    def together(self, rows: Sequence[DecodingSequence], counts: Sequence[int]) -> None:
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


def unfed(runner: SegmentRunner, sequence: DecodingSequence) -> int:
    """Tokens that no layer has been run for yet: the newest, and those forced before it."""
    return sequence.position + 1 - runner.cache.length(0, sequence.row)


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
