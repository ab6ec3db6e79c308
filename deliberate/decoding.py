"""The decode loop, batch 1, greedy: segments, exits, pending tokens, verification, rollback.

A decoder of L layers is cut into segments by its exits. The newest token runs segment by segment;
at each exit it may leave, and is then *pending* there: its hidden state is kept and the layers
above are not run. A later token that goes on takes every token pending at that exit along in one
causal pass, so per-layer KV lengths never rise with depth and all KV is computed by the layer it
belongs to ("defer"). At the top all riders have full-depth logits, which verify them in exact mode.

Self-speculative decoding (LayerSkip, arXiv:2404.16710; Draft & Verify, arXiv:2309.08168) is this
loop with one exit, a fixed draft length and nobody riding along half-way.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from deliberate.backbone import Backbone
from deliberate.cache import SegmentCache
from deliberate.config import Fidelity
from deliberate.exits import ExitReader
from deliberate.kernels.exit_head import top_probability
from deliberate.trace import GenerationTrace, TokenRecord


class DecodeLoop:
    """One generation.

    Iterating yields lists of tokens that stand: as they are chosen in dense and threshold mode, as
    they are verified in exact mode. `trace` is complete once iteration has ended.

    Args:
        backbone: the model's layers.
        reader: reads the exits; None for dense.
        exits: exit layers; empty for dense.
        thresholds: least confidence to leave, one per exit.
        fidelity: dense, exact or threshold.
        max_pending: tokens that may wait above an exit before a pass is forced.
        max_new_tokens: at least 1.
        end_tokens: ids that end the output.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        backbone: Backbone,
        reader: ExitReader | None,
        *,
        exits: Sequence[int],
        thresholds: Sequence[float],
        fidelity: Fidelity,
        max_pending: int,
        max_new_tokens: int,
        end_tokens: Collection[int],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if fidelity is Fidelity.DENSE:
            exits, thresholds = (), ()
        self.backbone = backbone
        self.reader = reader
        self.thresholds = tuple(thresholds)
        self.boundaries = (*exits, backbone.num_layers)
        self.fidelity = fidelity
        self.exact = fidelity is Fidelity.EXACT
        self.max_pending = max_pending
        self.max_new_tokens = max_new_tokens
        self.end_tokens = frozenset(end_tokens)
        self.clock = clock
        self.trace = GenerationTrace(backbone.num_layers, 0)
        self.cache: SegmentCache = backbone.new_cache()
        self._records: list[TokenRecord] = []
        # Hidden states [1, m, d] of the tokens pending at each exit, oldest first.
        self._pending: list[Tensor | None] = [None] * len(exits)
        self._segment_calls = [0] * len(self.boundaries)
        self._segment_positions = [0] * len(self.boundaries)
        self._prompt_tokens = 0
        self._began = 0.0

    # -- life of a generation ------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, prompt: Tensor) -> Iterator[list[int]]:
        """Decodes from prompt ids ``[1, n]``, n at least 1."""
        self._began = self.clock()
        self._prefill(prompt)
        finished = self._finished()
        handed = 0
        if not self.exact or self._all_verified():
            handed = len(self._records)
            yield [record.token for record in self._records]
        while not finished:
            self._step()
            finished = self._finished()
            if self._all_verified() or not self.exact:
                fresh = [record.token for record in self._records[handed:]]
                handed = len(self._records)
                yield fresh
        self._close()

    @property
    def records(self) -> Sequence[TokenRecord]:
        """The tokens so far; in exact mode those not yet verified may still be taken back."""
        return self._records

    def stop_at(self, count: int) -> None:
        """Ends the generation with its first `count` tokens (a stopping criterion held there)."""
        del self._records[count:]
        self.trace.finish = "stop"
        self._close()

    def _prefill(self, prompt: Tensor) -> None:
        backbone = self.backbone
        self._prompt_tokens = self.trace.prompt_tokens = prompt.shape[1]
        # Room for the whole answer at once, in steps that keep short generations small.
        self.cache = backbone.new_cache(self._prompt_tokens + min(self.max_new_tokens, 512))
        ctx = backbone.context(0, self._prompt_tokens, device=prompt.device)
        hidden = backbone.embed(prompt, ctx)
        hidden = backbone.run_layers(hidden, 0, backbone.num_layers, ctx, self.cache)
        self._choose_at_top(backbone.logits(hidden[:, -1]))
        self.trace.prefill_seconds = self._records[0].seconds

    def _step(self) -> None:
        """Feeds the newest token and chooses the one after it."""
        backbone = self.backbone
        position = self._prompt_tokens + len(self._records) - 1
        token = torch.tensor([[self._records[-1].token]], device=backbone.device)
        own = backbone.context(position, 1, device=backbone.device)
        hidden = backbone.embed(token, own)
        may_leave = self._may_leave(position)
        first = 0
        for k, boundary in enumerate(self.boundaries):
            rows = hidden.shape[1]
            ctx = own
            if rows > 1:
                ctx = backbone.context(position - rows + 1, rows, device=backbone.device)
            hidden = backbone.run_layers(hidden, first, boundary, ctx, self.cache)
            self._segment_calls[k] += 1
            self._segment_positions[k] += rows
            first = boundary
            if k == len(self._pending):
                break
            waiting = self._pending[k]
            everyone = hidden if waiting is None else torch.cat((waiting, hidden), dim=1)
            if may_leave and self.reader is not None:
                chosen, confidence = self.reader.read(k, hidden, self.thresholds[k])
                if chosen is not None and self.exact and chosen in self.end_tokens:
                    # An end token ends the output, so it is verified before it is believed.
                    may_leave, chosen = False, None
                if chosen is not None:
                    self._pending[k] = everyone
                    self._record(chosen, boundary, confidence, verified=False)
                    self.trace.drafted += 1
                    return
            self._pending[k] = None
            hidden = everyone
        self._arrive(hidden, position)

    def _may_leave(self, position: int) -> bool:
        """Whether the newest token may leave early at all."""
        if not self._pending:
            return False
        waiting = position - self.cache.length(self.backbone.num_layers - 1)
        if waiting >= self.max_pending:
            return False
        # In exact mode the last token of the output is the top's, so that nothing is unverified.
        return not (self.exact and len(self._records) + 1 >= self.max_new_tokens)

    def _arrive(self, hidden: Tensor, position: int) -> None:
        """At the top with ``hidden [1, m, d]`` of the m tokens up to `position`."""
        riders = hidden.shape[1] - 1
        if not self.exact or riders == 0:
            self._choose_at_top(self.backbone.logits(hidden[:, -1]))
            return
        logits = self.backbone.logits(hidden[0])
        answers = logits.argmax(dim=-1).tolist()
        # answers[j] was read at position - riders + j and speaks about the token after it.
        first = position - riders + 1 - self._prompt_tokens
        for j in range(riders):
            index = first + j
            if answers[j] != self._records[index].token:
                self._roll_back(index, logits[j : j + 1])
                return
            self._records[index] = dataclasses.replace(self._records[index], verified=True)
        self._choose_at_top(logits[-1:])

    def _roll_back(self, index: int, logits: Tensor) -> None:
        """Replaces the token at `index` by the top's choice and forgets all that followed."""
        self.trace.rejected += 1
        self.trace.discarded += len(self._records) - index
        del self._records[index:]
        self.cache.crop(self._prompt_tokens + index)
        self._pending = [None] * len(self._pending)
        self._choose_at_top(logits)

    # -- records -------------------------------------------------------------------------------

    def _choose_at_top(self, logits: Tensor) -> None:
        """Records the top's choice from logits ``[1, V]``."""
        if self._pending:
            token, probability = top_probability(logits)
            self._record(int(token), self.backbone.num_layers, float(probability), verified=True)
        else:
            chosen = int(logits.argmax(dim=-1))
            self._record(chosen, self.backbone.num_layers, float("nan"), verified=True)

    def _record(self, token: int, layer: int, confidence: float, *, verified: bool) -> None:
        seconds = self.clock() - self._began
        self._records.append(TokenRecord(token, layer, confidence, seconds, verified))

    def _all_verified(self) -> bool:
        return self._records[-1].verified

    def _finished(self) -> bool:
        last = self._records[-1]
        if last.token in self.end_tokens:
            self.trace.finish = "stop"
            return True
        return len(self._records) >= self.max_new_tokens

    def _close(self) -> None:
        trace = self.trace
        trace.records = self._records
        trace.seconds = self.clock() - self._began
        first = 0
        for boundary, calls, positions in zip(
            self.boundaries, self._segment_calls, self._segment_positions, strict=True
        ):
            for layer in range(first, boundary):
                trace.layer_calls[layer] = calls
                trace.layer_positions[layer] = positions
            first = boundary
