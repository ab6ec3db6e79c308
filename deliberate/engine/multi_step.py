"""Several steps of one sequence in one call of the executor, where nothing else has a say in them.

Greedy drafting needs nothing from the decode loop but the exit's own answer, and whole passes need
not even that. Then the executor decodes on until a token is to go deeper, and the loop records
afterwards what was done: the same tokens, passes and counts as step by step. Seconds of tokens are
those at which the loop learned of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from deliberate.config import MOST_WHOLE
from deliberate.engine.draft_planner import DraftPlanner
from deliberate.engine.segment_runner import DepthRunner
from deliberate.engine.sequence import DecodingSequence
from deliberate.engine.verifier import FullDepth
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.exit_heads import ExitReader
from deliberate.trace import BatchTrace


class StepsAhead:
    """Runs steps of the only sequence of a batch ahead of the loop.

    Args:
        backbone, reader: asked what they can do.
        depth, top, batch: of the loop, told what was done.
        planner: exact mode: told as by single steps.
        exact: tokens that leave are drafts; an end token is never one.
        end_tokens: ids that end the output.
        max_new_tokens: of the output.
    """

    def __init__(
        self,
        backbone: Backbone,
        reader: ExitReader | None,
        depth: DepthRunner,
        top: FullDepth,
        batch: BatchTrace,
        planner: DraftPlanner | None,
        *,
        exact: bool,
        end_tokens: Collection[int],
        max_new_tokens: int,
    ) -> None:
        self._ahead = backbone.ahead(reader)
        self._depth = depth
        self._top = top
        self._batch = batch
        self._planner = planner
        self._exact = exact
        self._end_tokens = end_tokens
        self._max_new_tokens = max_new_tokens

    def possible(self, exit_index: int | None) -> bool:
        """Whether this exit, or the top, can be read without the loop."""
        if self._ahead is None or self._depth.cache.batch != 1:
            return False
        return exit_index is None or self._ahead.asks(exit_index)

    def whole(self, sequence: DecodingSequence) -> None:
        """Runs all layers for some tokens; all of them stand."""
        left = self._max_new_tokens - len(sequence.records)
        steps = min(MOST_WHOLE, left)
        if self._planner is not None:
            steps = max(1, min(steps, self._planner.rest))
        top = len(self._depth.boundaries) - 1
        decoded = self._depth.decode(
            self._ahead,
            sequence,
            top,
            steps=steps,
            asked=steps,
            threshold=-math.inf,
            stops=self._end_tokens,
            stops_stand=True,
        )
        self._fed(len(decoded.tokens))
        for token, score in zip(decoded.tokens, decoded.scores, strict=True):
            confidence = score if top else float("nan")
            self._top.record(
                sequence, token, self._depth.boundaries[top], confidence, verified=True
            )
        sequence.verified = len(sequence.records)

    def draft(self, sequence: DecodingSequence, k: int, allowed: int, threshold: float) -> bool:
        """Runs the layers below exit `k` for as many tokens as leave there, and one that does not.

        The states of all wait at the exit.

        Args:
            allowed: tokens that may wait above the exit, those included that do.

        Returns:
            Whether anything was done; not where the next token may not leave anyway.
        """
        room = allowed - self._depth.waiting(sequence)
        # In exact mode the last token of the output is the top's.
        left = self._max_new_tokens - len(sequence.records) - self._exact
        asked = min(room, left)
        if asked < 1:
            return False
        # The token after the last that may leave is fed too, unless the output ends before it.
        more = self._exact or room < left
        decoded = self._depth.decode(
            self._ahead,
            sequence,
            k,
            steps=asked + more,
            asked=asked,
            threshold=threshold,
            stops=self._end_tokens,
            stops_stand=not self._exact,
        )
        passes = len(decoded.states)
        self._fed(passes)
        layer = self._depth.boundaries[k]
        for index, (token, score) in enumerate(zip(decoded.tokens, decoded.scores, strict=True)):
            leaves = index < decoded.standing
            self._batch.reads.append((k, 1))
            if leaves:
                self._top.record(sequence, token, layer, score, verified=False)
                sequence.trace.drafted += 1
            if self._planner is not None:
                self._planner.asked(k, leaves)
        sequence.blocked, sequence.waited = decoded.standing < passes, 0
        self._depth.wait(k, [sequence], decoded.states.unsqueeze(0), [passes])
        return True

    def _fed(self, tokens: int) -> None:
        """The loop has told the planner of the first token already."""
        for _ in range(tokens - 1 if self._planner is not None else 0):
            assert self._planner is not None
            self._planner.token()
