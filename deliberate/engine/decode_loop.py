"""The decode loop: segments, exits, pending tokens, verification, rollback, for ragged batches.

A decoder of L layers is cut into segments by its exits. Each sequence's newest token runs segment
by segment; at each exit it may leave, and is then *pending* there: its hidden state is kept and the
layers above are not run. A later token of the sequence that goes on takes every token pending at
that exit along in one causal pass, so per-layer KV lengths never rise with depth and all KV is
computed by the layer it belongs to ("defer"). At the top all riders have full-depth logits, which
verify them in exact mode.

In a batch every sequence has its own depth, its own pending tokens and its own accepted length. The
first segment runs for those that can go on shallow; one that cannot is *blocked* until a deep pass,
which is run when enough are blocked, or one has waited long enough, and serves all of them at once.

Self-speculative decoding (LayerSkip, arXiv:2404.16710; Draft & Verify, arXiv:2309.08168) is this
loop with one sequence, one exit, a fixed draft length and nobody riding along half-way.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from deliberate.cache.kv_cache import SegmentCache
from deliberate.config import Fidelity, KVMode
from deliberate.engine.deliberation import GateRunner
from deliberate.engine.draft_planner import DraftPlanner
from deliberate.engine.exit_policy import ExitPolicy
from deliberate.engine.exit_step import Decision, Leaving
from deliberate.engine.long_text import LongTextConfig, LongTextWatch
from deliberate.engine.multi_step import StepsAhead
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.scheduler import DeepSchedule
from deliberate.engine.segment_runner import DepthRunner, newest
from deliberate.engine.sequence import DecodingSequence
from deliberate.engine.strict import NearTies
from deliberate.engine.verifier import FullDepth
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.deliberation_gate import DeliberationGate
from deliberate.modeling.exit_heads import ExitReader
from deliberate.trace import BatchTrace, GenerationTrace, TokenRecord
from deliberate.utils.errors import DeliberateError


class DecodeLoop:
    """One generation of a batch.

    Iterating yields, for each sequence, the tokens that stand since last time: as they are chosen
    in dense and threshold mode, as they are verified in exact mode. `traces` are complete once
    iteration has ended.

    Args:
        backbone: the model's layers.
        reader: reads the exits; None for dense.
        exits: exit layers; empty for dense.
        thresholds: least confidence to leave, one per exit.
        fidelity: dense, exact or threshold.
        max_pending: tokens of a sequence that may wait above an exit before a pass is forced.
        max_new_tokens: at least 1.
        end_tokens: ids that end the output.
        clock: seconds, monotonic.
        kv_mode: what layers that a token skips get of it; exact mode needs "defer".
        chooser: how logits become tokens; plain greedy by default.
        schedule: when deep passes are run in a batch.
        planner: exact mode: which exits are worth asking; None asks all of them always.
        exit_policy: sets the thresholds before each step, from the time that has gone.
        decide: replaces the comparison with the thresholds.
        keep_scores: keep the processed scores of every token.
        monitor: called with (agreed, seen) for tokens that left early, whenever a deep pass of
            threshold mode has looked at them again; that costs the head of every
            `monitor_every`-th deep pass, beginning with number `monitor_offset`.
        gate: thinks again about tokens that are uncertain at the top; in every mode the full
            depth's answer is then the one after it.
        long_text: re-weighs the full depth's answers where the text goes round.
        strict: exact mode of one sequence: gap up to which dense's own passes choose a token; see
            `deliberate.engine.strict`.
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
        kv_mode: KVMode = KVMode.DEFER,
        chooser: TokenChooser | None = None,
        schedule: DeepSchedule | None = None,
        planner: DraftPlanner | None = None,
        exit_policy: ExitPolicy | None = None,
        decide: Decision | None = None,
        keep_scores: bool = False,
        monitor: Callable[[int, int], None] | None = None,
        monitor_every: int = 8,
        monitor_offset: int = 0,
        gate: DeliberationGate | None = None,
        long_text: LongTextConfig | None = None,
        strict: float | None = None,
    ) -> None:
        if fidelity is Fidelity.DENSE:
            exits, thresholds = (), ()
        if fidelity is Fidelity.EXACT and kv_mode is not KVMode.DEFER:
            raise DeliberateError(f"kv_mode {kv_mode} is lossy: exact mode needs 'defer'")
        self.backbone = backbone
        self.boundaries = (*exits, backbone.num_layers)
        self.fidelity = fidelity
        self.exact = fidelity is Fidelity.EXACT
        self.kv_mode = kv_mode
        self.max_new_tokens = max_new_tokens
        self.end_tokens = frozenset(end_tokens)
        self.clock = clock
        self.chooser = chooser or TokenChooser()
        self.schedule = schedule or DeepSchedule()
        self.planner = planner
        self.exit_policy = exit_policy
        # When the caller asked, by the clock: a budget counts from there, not from the first pass.
        self.called: float | None = None
        self.keep_rows = False  # finished sequences keep their cache rows, to be handed over
        self.batch = BatchTrace([], layer_calls=[0] * backbone.num_layers)
        runner = None if gate is None else GateRunner(gate, backbone, self.batch.thoughts)
        self.gate = runner
        self.watch = None if long_text is None else LongTextWatch(long_text)
        self.depth = DepthRunner(
            backbone, self.boundaries, kv_mode, max_pending, self.batch, planner, clock, runner
        )
        self.top = FullDepth(
            backbone,
            self.depth,
            self.chooser,
            exact=self.exact,
            planner=planner,
            keep_scores=keep_scores,
            monitor=monitor,
            monitor_every=monitor_every,
            monitor_offset=monitor_offset,
            seconds=_since(weakref.ref(self)),
            gate=runner,
            watch=self.watch,
            near_ties=None if strict is None else NearTies(backbone, self.depth, strict),
        )
        self.leaving = Leaving(
            reader,
            self.depth,
            self.top,
            self.batch,
            self.chooser,
            thresholds=thresholds,
            exact=self.exact,
            kv_mode=kv_mode,
            max_pending=max_pending,
            max_new_tokens=max_new_tokens,
            end_tokens=self.end_tokens,
            planner=planner,
            decide=decide,
            keep_scores=keep_scores,
            watch=self.watch,
        )
        self._ahead: StepsAhead | None = None
        alone = long_text is None and (
            exit_policy is None or getattr(exit_policy, "constant", False)
        )
        if alone and decide is None and gate is None and self.chooser.plain and not keep_scores:
            self._ahead = StepsAhead(
                backbone,
                reader,
                self.depth,
                self.top,
                self.batch,
                planner,
                exact=self.exact,
                end_tokens=self.end_tokens,
                max_new_tokens=max_new_tokens,
            )
        self._sequences: list[DecodingSequence] = []
        self._active: list[DecodingSequence] = []
        self._verified = 0
        self._began = 0.0
        self._closed = False

    @torch.inference_mode()
    def run(
        self,
        prompts: Tensor | Sequence[Tensor],
        *,
        prefixes: Sequence[list[int]] | None = None,
        cache: SegmentCache | None = None,
    ) -> Iterator[list[list[int]]]:
        """Decodes from prompt ids, ``[B, n]`` or one ``[n_i]`` each, none empty.

        Args:
            prefixes: what logits processors see before the generated tokens; the prompts.
            cache: already holds the beginning of every prompt, at least one token less than it.
        """
        self._began = self.clock()
        rows = list(prompts)
        known = prefixes or [row.tolist() for row in rows]
        self._sequences = [
            DecodingSequence(index, prefix, len(row), self.backbone.num_layers)
            for index, (row, prefix) in enumerate(zip(rows, known, strict=True))
        ]
        self._active = list(self._sequences)
        self.batch.sequences = [sequence.trace for sequence in self._sequences]
        if self.exit_policy is not None:
            longest = max(map(len, rows))
            called = self._began if self.called is None else self.called
            self.exit_policy.begin(called, longest, self.max_new_tokens)
            self._set_band()
        last = self.depth.prefill(rows, self.max_new_tokens, cache)
        self.top.answer(self._sequences, last)
        for sequence in self._sequences:
            sequence.trace.prefill_seconds = sequence.records[0].seconds
        self._verified = len(rows)
        yield self._settle()
        while self._active:
            before = self.clock() if self.planner is not None else 0.0
            self._advance()
            self.depth.count_vain(self._active)
            if self.planner is not None:
                verified = sum(sequence.verified for sequence in self._sequences)
                self.planner.progress(self.clock() - before, verified - self._verified)
                self._verified = verified
            yield self._settle()
        self._close()

    @property
    def cache(self) -> SegmentCache:
        """Keys and values of the running sequences."""
        return self.depth.cache

    @property
    def traces(self) -> list[GenerationTrace]:
        """One per sequence."""
        return self.batch.sequences

    @property
    def trace(self) -> GenerationTrace:
        """Of the first sequence, the only one of a batch of 1."""
        return self.batch.sequences[0]

    @property
    def sequences(self) -> Sequence[DecodingSequence]:
        """In the order of the prompts."""
        return self._sequences

    @property
    def records(self) -> Sequence[TokenRecord]:
        """Of the first sequence; in exact mode those not yet verified may still be taken back."""
        return self._sequences[0].records

    def stop_at(self, count: int, sequence: int = 0) -> None:
        """Ends a sequence with its first `count` tokens (a stopping criterion held there)."""
        stopped = self._sequences[sequence]
        del stopped.records[count:]
        del stopped.scores[count:]
        stopped.trace.finish = "stop"
        if not stopped.finished:
            self._finish(stopped)

    @torch.inference_mode()
    def catch_up(self) -> None:
        """After the end: runs the upper layers for whatever still waits, so that KV is complete."""
        if self.top.near_ties is not None:
            self.top.near_ties.finish(self._sequences[0])
        self.depth.catch_up(self._sequences)

    def _settle(self) -> list[list[int]]:
        """Takes finished sequences out and collects what stands."""
        for sequence in list(self._active):
            if sequence.conclude(self.max_new_tokens, self.end_tokens):
                self._finish(sequence)
        return [sequence.fresh(self.exact) for sequence in self._sequences]

    def _finish(self, sequence: DecodingSequence) -> None:
        sequence.finished = True
        sequence.trace.seconds = self.clock() - self._began
        self._active.remove(sequence)

    def _close(self) -> None:
        if self.watch is not None:
            self.watch.close(self._sequences)
        self.depth.count_vain(self._sequences, final=True)
        now = self.clock()
        self.batch.seconds = now - self._began
        if self.exit_policy is not None and not self._closed:
            self.exit_policy.end(now, max(len(sequence.records) for sequence in self._sequences))
        self._closed = True
        self.batch.cache_bytes = self.depth.cache.bytes_allocated

    # -- passes --------------------------------------------------------------------------------

    def _advance(self) -> None:
        """One scheduling decision: a shallow pass for who is ready, a deep one for who is not."""
        if self.exit_policy is not None:
            tokens = max(len(sequence.records) for sequence in self._active)
            self.leaving.thresholds = tuple(self.exit_policy.thresholds(self.clock(), tokens))
            self._set_band()
        if not self.keep_rows:
            self.depth.compact(self._active)
        switch = self.backbone.rope_switch
        if switch is not None:
            restarting = [one for one in self._active if one.position == switch]
            for sequence in restarting:
                if self.top.near_ties is not None:
                    self.top.near_ties.begin(switch + 1)  # dense runs the same pass
                self.top.answer([sequence], self.depth.restart(sequence))
            if restarting:
                return
        ready = [sequence for sequence in self._active if not sequence.blocked]
        if ready and not self.schedule.is_due(self._active):
            for sequence in self._active:
                sequence.waited += sequence.blocked
            self._shallow(ready)
            ready = [sequence for sequence in self._active if not sequence.blocked]
            if ready:
                return
        blocked = [sequence for sequence in self._active if sequence.blocked]
        if blocked:
            self._deep(blocked + [sequence for sequence in ready if self._joins(sequence)])

    def _set_band(self) -> None:
        """The gate's band at the exit_policy's price; exact mode keeps the one that dense has."""
        band = getattr(self.exit_policy, "gate_threshold", None)
        if self.gate is not None and band is not None and not self.exact:
            self.gate.think_below = band

    def _joins(self, sequence: DecodingSequence) -> bool:
        """Whether a sequence that could go on shallow has its drafts looked at now."""
        enough = self.depth.waiting(sequence) >= self.schedule.join * self.leaving.allowed()
        return enough and self.depth.drafts(sequence) > 0

    def _shallow(self, ready: Sequence[DecodingSequence]) -> None:
        """Feeds the newest tokens to the first segment; each then leaves or is blocked."""
        tokens = [[sequence.records[-1].token] for sequence in ready]
        ids = torch.tensor(tokens, device=self.backbone.device)
        ones = [1] * len(ready)
        if self.planner is not None:
            for _ in ready:
                self.planner.token()
        stop = self._next_stop(0, ready)
        if len(ready) == 1 and self._run_ahead(ready[0], stop):
            return
        hidden = self.depth.run(0, ready, ids, ones, through=stop)
        if stop == len(self.boundaries) - 1:
            self.top.answer(ready, hidden[:, -1])
            return
        if stop > 0:
            for sequence in ready:
                sequence.blocked = True
            self._leave_or_rise(stop, ready, hidden, ones)
            return
        leavers = self.leaving.ask(0, ready, hidden[:, -1])
        for sequence in ready:
            sequence.blocked = sequence not in leavers
            sequence.waited = 0
        if self.kv_mode is KVMode.DEFER:
            self.depth.wait(0, ready, hidden, ones)
            return
        self.depth.leave_behind(0, leavers, ready, hidden)
        stay = [index for index, sequence in enumerate(ready) if sequence.blocked]
        if stay:
            self.depth.wait(0, [ready[i] for i in stay], hidden[stay], [1] * len(stay))

    def _run_ahead(self, sequence: DecodingSequence, stop: int) -> bool:
        """Lets the executor decode on by itself up to a stop, if it can; whether it did."""
        top = stop == len(self.boundaries) - 1
        if self._ahead is None or not self._ahead.possible(None if top else stop):
            return False
        if top:
            self._ahead.whole(sequence)
            return True
        if self.kv_mode is not KVMode.DEFER or not self.leaving.asks(stop):
            return False
        if not self._ahead.draft(
            sequence, stop, self.leaving.allowed(), self.leaving.thresholds[stop]
        ):
            return False
        if sequence.blocked and stop > 0:
            self._rise(stop + 1, [sequence], *self.depth.take(stop, [sequence]))
        return True

    def _deep(self, riders: Sequence[DecodingSequence]) -> None:
        """Runs the upper segments for these sequences and all that is pending of them."""
        riders = sorted(riders, key=lambda sequence: sequence.row)
        hidden, counts = self.depth.take(0, riders)
        self._rise(1, riders, hidden, counts)

    def _rise(
        self, k: int, riders: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> None:
        """Takes ``hidden [R, M, d]`` through segment `k` and on, to the next stop or the top."""
        stop = self._next_stop(k, riders)
        hidden = self.depth.run(k, riders, hidden, counts, through=stop)
        if stop == len(self.boundaries) - 1:
            self.top.arrive(riders, hidden, counts)
        else:
            self._leave_or_rise(stop, riders, hidden, counts)

    def _leave_or_rise(
        self, k: int, riders: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
    ) -> None:
        """At exit `k`: who may leaves, the others go on with what waits there."""
        asking = [index for index, sequence in enumerate(riders) if sequence.blocked]
        states = newest(hidden, counts)
        chosen = [riders[index] for index in asking]
        if len(asking) < len(riders):
            states = states[asking]
        leavers = self.leaving.ask(k, chosen, states) if chosen else []
        for sequence in leavers:
            sequence.blocked = False
        stay = [index for index, sequence in enumerate(riders) if sequence not in leavers]
        staying = [riders[index] for index in stay]
        if self.kv_mode is KVMode.DEFER:
            if not leavers and not self.depth.waits(k, riders):
                self._rise(k + 1, riders, hidden, counts)
                return
            self.depth.wait(k, riders, hidden, counts)
        else:
            self.depth.leave_behind(k, leavers, riders, hidden)
            if stay:
                self.depth.wait(k, staying, hidden[stay], [1] * len(stay))
        if stay:
            self._rise(k + 1, staying, *self.depth.take(k, staying))

    def _next_stop(self, k: int, rows: Sequence[DecodingSequence]) -> int:
        """The first boundary from `k` on where an exit is asked, something waits, or the top is."""
        top = len(self.boundaries) - 1
        if self.kv_mode is KVMode.SKIP:
            return k
        while k < top and not self.leaving.asks(k) and not self.depth.waits(k, rows):
            k += 1
        return k


def _since(loop: weakref.ref[DecodeLoop]) -> Callable[[], float]:
    """Seconds since a loop began. Not bound to it: a loop that is part of a cycle keeps its cache
    until the collector comes by."""

    def seconds() -> float:
        alive = loop()
        return 0.0 if alive is None else alive.clock() - alive._began

    return seconds
