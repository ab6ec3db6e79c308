"""The decode loop: one generation of a batch, from prompts to accepted tokens.

A decoder of L layers is cut into segments by its exits. Each sequence's newest token runs segment
by segment; at each exit it may exit early. Its hidden state is then *pending* there, and the layers
above are not run. A later token of the sequence that does not exit is run together with all tokens
pending at that exit in one causal pass, so per-layer KV lengths never rise with depth and every key
and value is computed by the layer it belongs to ("defer"). At full depth all of them have logits,
which verify them in exact mode.

In a batch every sequence has its own depth, its own pending tokens and its own accepted length.
The rows are requests of an engine of their own (`deliberate.engine.closed_engine`), which decides
what each step runs; here they are added, stepped until all are done, and handed out.

Self-speculative decoding (LayerSkip, arXiv:2404.16710; Draft & Verify, arXiv:2309.08168) is this
loop with one sequence, one exit and a fixed draft length.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from deliberate.cache.kv_cache import SegmentCache
from deliberate.engine.closed_engine import ClosedEngine
from deliberate.engine.constraints import LogitConstraint
from deliberate.engine.draft_planner import DraftPlanner
from deliberate.engine.exit_policy import ExitPolicy, FixedPolicy, check_policy
from deliberate.engine.loop_settings import LoopSettings, Stopwatch
from deliberate.engine.ngram_drafts import DraftSource
from deliberate.engine.policy_run import PolicyRun
from deliberate.engine.request import BatchRow, Decoding, Request
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.scheduler import Scheduler, SchedulerSettings
from deliberate.engine.sequence import DecodingSequence
from deliberate.engine.spec import DecodingSpec
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.deliberation_gate import DeliberationGate
from deliberate.modeling.exit_heads import ExitReader
from deliberate.trace import BatchTrace, GenerationTrace, TokenRecord

# Of requests whose decoding is given.
_RESOLVED = DecodingSpec()
# A cache has room for so many new tokens at once; longer answers make it grow.
_ROOM = 512


class DecodeLoop:
    """One generation of a batch.

    Iterating over `run` yields, for each sequence, the tokens accepted since last time: as they are
    chosen in dense and threshold mode, as they are verified in exact mode. `traces` are complete
    once iteration has ended.

    Args:
        backbone: the model's layers.
        reader: reads the exits; None for dense.
        settings: what is asked for.
        chooser: how logits become tokens; greedy by default.
        planner: exact mode: which exits are worth evaluating; None evaluates all of them always.
        exit_policy: decides which tokens exit; by default the thresholds of `settings`.
        drafts: exact mode of one sequence without exits: where its drafts come from, instead of
            the lookup that the settings ask for.
        gate: adds deliberation rounds for tokens that are uncertain at full depth; in every mode
            the full depth's prediction is then the one after them.
        constraints: one of each sequence, at its beginning; empty: every token may come next.
        clock: seconds, monotonic.

    Attributes:
        batch: what all sequences did together.
    """

    def __init__(
        self,
        backbone: Backbone,
        reader: ExitReader | None,
        settings: LoopSettings,
        *,
        chooser: TokenChooser | None = None,
        planner: DraftPlanner | None = None,
        exit_policy: ExitPolicy | None = None,
        drafts: DraftSource | None = None,
        gate: DeliberationGate | None = None,
        constraints: Sequence[LogitConstraint] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.backbone = backbone
        self.settings = settings
        policy = FixedPolicy(settings.thresholds) if exit_policy is None else exit_policy
        check_policy(policy, len(settings.exits) or len(policy.thresholds or ()))
        self.exit_policy = policy
        self.gate = gate
        self.stopwatch = Stopwatch(clock, on_cpu=torch.device(backbone.device).type == "cpu")
        self.batch = BatchTrace([], layer_calls=[0] * backbone.num_layers)
        self._reader = reader
        self._chooser = chooser
        self._constraints = tuple(constraints)
        threshold = None if gate is None else gate.config.think_below
        self._decoding = Decoding(settings, planner, None, drafts, threshold)
        self._engine: ClosedEngine | None = None
        self._sequences: list[DecodingSequence] = []

    def run(
        self,
        prompts: Tensor | Sequence[Tensor],
        *,
        prefixes: Sequence[list[int]] | None = None,
        cache: SegmentCache | None = None,
        called: float | None = None,
        keep_rows: bool = False,
    ) -> Iterator[list[list[int]]]:
        """Decodes from prompt ids, ``[B, n]`` or one ``[n_i]`` each, none empty.

        Args:
            prefixes: what logits processors see before the generated tokens; the prompts.
            cache: already holds the beginning of every prompt, at least one token less than it.
            called: when the caller asked, by the clock; an exit policy counts from there, not from
                the first pass.
            keep_rows: finished sequences keep their cache rows, to be returned to the caller.
        """
        self.stopwatch.start()
        settings, ids = self.settings, [row.tolist() for row in prompts]
        # A cache has keys and values, not the final states that the gate attends to.
        held = cache is not None and self.gate is None
        policy = PolicyRun(self.exit_policy, len(settings.exits), self.batch)
        known = ids if prefixes is None else prefixes
        rows = [
            BatchRow(place, prefix, policy, place if held else None)
            for place, (prefix, _) in enumerate(zip(known, ids, strict=True))
        ]
        engine = self._engine = self._new_engine(ids, rows, cache if held else None, keep_rows)
        for place, prompt in enumerate(ids):
            request = Request(
                prompt,
                settings.max_new_tokens,
                _RESOLVED,
                sampling=self._chooser,
                end_tokens=settings.end_tokens,
                constraint=self._constraints[place] if self._constraints else None,
            )
            engine.add(request)
        self._sequences = policy.sequences
        self.batch.sequences = [sequence.trace for sequence in self._sequences]
        began = self.stopwatch.began if called is None else called
        policy.begin(began, max(map(len, ids)), settings.max_new_tokens)
        while engine.unfinished:
            engine.advance()
            yield [sequence.take_accepted() for sequence in self._sequences]
        engine.close(self._sequences)
        now = self.stopwatch.clock()
        self.batch.seconds = now - self.stopwatch.began
        policy.end(now)
        self.batch.cache_bytes = engine.cache.bytes_allocated

    def _new_engine(
        self,
        ids: Sequence[list[int]],
        rows: Sequence[BatchRow],
        cache: SegmentCache | None,
        keep_rows: bool,
    ) -> ClosedEngine:
        """An engine whose requests are these rows, in this order."""
        settings, longest = self.settings, max(map(len, ids))
        room = longest + min(settings.max_new_tokens, _ROOM)
        if cache is None:
            cache = self.backbone.cache_maker(settings.kv_storage)(room, len(ids))
        decodings = iter([dataclasses.replace(self._decoding, batch_row=row) for row in rows])
        return ClosedEngine(
            self.backbone,
            self._reader,
            settings.exits,
            lambda _request, _running: next(decodings),
            max_running=len(ids),
            cache=cache,
            scheduler=Scheduler(SchedulerSettings(max_running=len(ids), deep=settings.schedule)),
            max_pending=min(settings.max_pending, settings.max_new_tokens),
            gate=self.gate,
            stopwatch=self.stopwatch,
            trace=self.batch,
            keep_rows=keep_rows,
        )

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Layers below each exit, then the number of layers."""
        return (*self.settings.exits, self.backbone.num_layers)

    @property
    def exact(self) -> bool:
        """Whether drafts are verified."""
        return self.settings.exact

    @property
    def cache(self) -> SegmentCache:
        """Keys and values of the running sequences; there is one once `run` has begun."""
        assert self._engine is not None
        return self._engine.cache

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
        """Of the first sequence; in exact mode those not yet verified may still be rolled back."""
        return self._sequences[0].records

    def stop_at(self, count: int, sequence: int = 0) -> None:
        """Ends a sequence with its first `count` tokens (a stopping criterion held there)."""
        assert self._engine is not None
        self._sequences[sequence].stop_at(count)
        self._engine.finish(sequence)

    def catch_up(self) -> None:
        """After the end: runs the upper layers for all pending tokens, so that KV is complete."""
        assert self._engine is not None
        self._engine.catch_up(self._sequences)
