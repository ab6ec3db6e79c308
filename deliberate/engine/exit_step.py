"""Who leaves at an exit: asking it, and what it takes to be let go."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from deliberate.config import KVMode
from deliberate.engine.draft_planner import DraftPlanner
from deliberate.engine.long_text import LongTextWatch
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.segment_runner import DepthRunner
from deliberate.engine.sequence import DecodingSequence
from deliberate.engine.verifier import FullDepth
from deliberate.modeling.exit_heads import ExitReader, Reading
from deliberate.trace import BatchTrace

# Exit index, sequence index, confidence -> whether the token leaves there.
Decision = Callable[[int, int, float], bool]


class Leaving:
    """The exits of one generation.

    Args:
        reader: asked; None where nobody ever leaves.
        depth, top, batch: of the generation, told what was decided.
        chooser: how logits become tokens.
        exact: drafts are verified, so the last token and end tokens are the top's.
        kv_mode, max_pending: how many tokens may wait.
        max_new_tokens, end_tokens: of the output.
        planner: which exits are worth asking; None asks all of them always.
        decide: replaces the comparison with the thresholds.
        keep_scores: keep the processed scores of every token.
        watch: nobody leaves while it re-weighs.

    Attributes:
        thresholds: least confidence to leave, one per exit; a exit_policy may change them.
    """

    def __init__(
        self,
        reader: ExitReader | None,
        depth: DepthRunner,
        top: FullDepth,
        batch: BatchTrace,
        chooser: TokenChooser,
        *,
        thresholds: Sequence[float],
        exact: bool,
        kv_mode: KVMode,
        max_pending: int,
        max_new_tokens: int,
        end_tokens: Collection[int],
        planner: DraftPlanner | None,
        decide: Decision | None,
        keep_scores: bool,
        watch: LongTextWatch | None,
    ) -> None:
        self.reader = reader
        self.depth = depth
        self.top = top
        self.batch = batch
        self.chooser = chooser
        self.thresholds = tuple(thresholds)
        self.exact = exact
        self.kv_mode = kv_mode
        self.max_pending = max_pending
        self.max_new_tokens = max_new_tokens
        self.end_tokens = end_tokens
        self.planner = planner
        self.decide = decide
        self.keep_scores = keep_scores
        self.watch = watch

    def allowed(self) -> int:
        """Tokens of a sequence that may wait above an exit."""
        return self.max_pending if self.planner is None else self.planner.cap

    def _may_leave(self, sequence: DecodingSequence) -> bool:
        """Whether the newest token may leave early at all."""
        if self.watch is not None and self.watch.active(sequence):
            return False  # an exit knows nothing of the re-weighing
        if self.kv_mode is KVMode.DEFER and self.depth.waiting(sequence) >= self.allowed():
            return False
        if sequence.position + 1 == self.depth.backbone.rope_switch:
            return False  # everything is computed anew next, so nothing may be pending then
        # In exact mode the last token of the output is the top's, so that nothing is unverified.
        return not (self.exact and len(sequence.records) + 1 >= self.max_new_tokens)

    def asks(self, k: int) -> bool:
        """Whether exit `k` is asked at all now."""
        if self.planner is not None and not self.planner.asks(k):
            return False
        # Where nobody can leave, not asking is what full depth costs.
        return self.decide is not None or self.thresholds[k] < math.inf

    def ask(
        self, k: int, rows: Sequence[DecodingSequence], hidden: Tensor
    ) -> list[DecodingSequence]:
        """Asks exit `k` about newest tokens with states ``[R, d]``; records who leaves."""
        reader = self.reader
        if reader is None or not self.asks(k):
            return []
        able = [index for index, sequence in enumerate(rows) if self._may_leave(sequence)]
        if not able:
            return []
        if len(able) < len(rows):
            hidden = hidden[able]
        plain = self.chooser.plain
        self.batch.reads.append((k, len(able)))
        reading = reader.look(k, hidden, self.thresholds[k], keep_logits=not plain)
        willing = []
        for place, index in enumerate(able):
            sequence, confidence = rows[index], reading.confidences[place]
            if self.decide is not None:
                leaves = self.decide(k, sequence.index, confidence)
            else:
                leaves = confidence >= self.thresholds[k]
            if leaves:
                willing.append(place)
        tokens, scores = self._tokens(reading, willing, [rows[able[place]] for place in willing])
        leavers = []
        for place, index in enumerate(able):
            sequence = rows[index]
            # An end token ends the output, so exact mode verifies it before it is believed.
            leaves = place in tokens and not (self.exact and tokens[place] in self.end_tokens)
            if leaves:
                self.top.record(
                    sequence,
                    tokens[place],
                    self.depth.boundaries[k],
                    reading.confidences[place],
                    verified=False,
                )
                if self.keep_scores:
                    sequence.scores.append(scores[place])
                sequence.trace.drafted += 1
                leavers.append(sequence)
            if self.planner is not None:
                self.planner.asked(k, leaves)
        return leavers

    def _tokens(
        self, reading: Reading, places: Sequence[int], rows: Sequence[DecodingSequence]
    ) -> tuple[dict[int, int], dict[int, Tensor]]:
        """The tokens that an exit would choose at these places, and their scores ``[1, V]``."""
        if self.chooser.plain and not self.keep_scores:
            return {place: reading.token(place) for place in places}, {}
        if not places:
            return {}, {}
        made = [len(sequence.records) for sequence in rows]
        ids = self.chooser.needs_ids
        tokens, scores = self.chooser.choose_rows(
            torch.stack([reading.logits(place) for place in places]),
            [
                (sequence.index, count, sequence.ids(count) if ids else [])
                for sequence, count in zip(rows, made, strict=True)
            ],
        )
        return (
            dict(zip(places, tokens, strict=True)),
            dict(zip(places, scores.split(1), strict=True)),
        )
