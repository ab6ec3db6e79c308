"""The decode loop: one generation of a batch, from prompts to accepted tokens.

A decoder of L layers is cut into segments by its exits. Each sequence's newest token runs segment
by segment; at each exit it may exit early. Its hidden state is then *pending* there, and the layers
above are not run. A later token of the sequence that does not exit is run together with all tokens
pending at that exit in one causal pass, so per-layer KV lengths never rise with depth and every key
and value is computed by the layer it belongs to ("defer"). At full depth all of them have logits,
which verify them in exact mode.

In a batch every sequence has its own depth, its own pending tokens and its own accepted length;
`deliberate.engine.decode_step` says which sequences a pass serves.

Self-speculative decoding (LayerSkip, arXiv:2404.16710; Draft & Verify, arXiv:2309.08168) is this
loop with one sequence, one exit and a fixed draft length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from deliberate.cache.kv_cache import SegmentCache
from deliberate.engine.constraints import LogitConstraint
from deliberate.engine.decode_step import DecodeStep
from deliberate.engine.deliberation import GateRunner
from deliberate.engine.draft_planner import DraftPlanner
from deliberate.engine.exit_policy import ExitPolicy, FixedPolicy, check_policy
from deliberate.engine.exit_step import ExitStep
from deliberate.engine.long_text import LongTextWatch
from deliberate.engine.loop_settings import LoopSettings, Stopwatch
from deliberate.engine.multi_step import MultiStep
from deliberate.engine.ngram_drafts import DraftSource, NgramDrafts
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.segment_runner import SegmentRunner
from deliberate.engine.sequence import DecodingSequence
from deliberate.engine.strict import NearTies
from deliberate.engine.verifier import Verifier
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.deliberation_gate import DeliberationGate
from deliberate.modeling.exit_heads import ExitReader
from deliberate.trace import BatchTrace, GenerationTrace, TokenRecord


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
        self._chooser = chooser or TokenChooser()
        self.backbone = backbone
        self.settings = settings
        self.planner = planner
        self.drafts = drafts
        policy = FixedPolicy(settings.thresholds) if exit_policy is None else exit_policy
        check_policy(policy, len(settings.exits) or len(policy.thresholds or ()))
        self.exit_policy = policy
        self.stopwatch = Stopwatch(clock, on_cpu=torch.device(backbone.device).type == "cpu")
        self.batch = BatchTrace([], layer_calls=[0] * backbone.num_layers)
        rounds = self.batch.deliberation_rounds
        self.gate = None if gate is None else GateRunner(gate, backbone, rounds)
        self.watch = None if settings.long_text is None else LongTextWatch(settings.long_text)
        self.runner = SegmentRunner(backbone, settings.exits, self.batch, self.stopwatch, self.gate)
        self.runner.planners = () if planner is None else (planner,)
        near_ties: dict[int, NearTies] = {}
        if settings.strict is not None:
            near_ties[0] = NearTies(backbone, self.runner, settings.strict)
        self.verifier = Verifier(self.runner, self.stopwatch, near_ties)
        fixed = policy.constant and policy.thresholds is not None
        unchanged = settings.long_text is None and gate is None and not settings.keep_scores
        unchanged = unchanged and not constraints
        self._single_calls = not (fixed and self._chooser.plain and unchanged)
        self.step = DecodeStep(
            self.runner,
            ExitStep(reader, self.runner, self.stopwatch),
            self.verifier,
            None if self._single_calls else MultiStep(reader, self.runner, self.stopwatch),
            settings.schedule,
            self.stopwatch,
        )
        self._constraints = tuple(constraints)
        self._sequences: list[DecodingSequence] = []
        self._active: list[DecodingSequence] = []
        self._verified = 0
        self._keep_rows = False
        self._closed = False

    @torch.inference_mode()
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
        self._keep_rows = keep_rows
        rows = list(prompts)
        known = prefixes or [row.tolist() for row in rows]
        self._sequences = [
            self._sequence(index, prefix, len(row))
            for index, (row, prefix) in enumerate(zip(rows, known, strict=True))
        ]
        self._active = list(self._sequences)
        self.batch.sequences = [sequence.trace for sequence in self._sequences]
        longest = max(map(len, rows))
        began = self.stopwatch.began if called is None else called
        self.exit_policy.begin(began, longest, self.settings.max_new_tokens, self.batch)
        self._set_gate_threshold()
        saw = None if self.drafts is None else self.drafts.saw
        last = self.runner.prefill(rows, cache, self.settings, saw)
        self.verifier.predict(self._sequences, last)
        for sequence in self._sequences:
            sequence.trace.prefill_seconds = sequence.records[0].seconds
        self._verified = len(rows)
        yield self._accepted()
        clock = self.stopwatch.work
        while self._active:
            before = clock() if self.planner is not None else 0.0
            if not self.exit_policy.constant:
                self._step_policy(self.exit_policy)
            if not self._keep_rows:
                self.runner.compact(self._active)
            self.step.run(self._active)
            self.runner.count_discarded(self._active)
            if self.planner is not None:
                verified = sum(sequence.verified for sequence in self._sequences)
                self.planner.progress(clock() - before, verified - self._verified)
                self._verified = verified
            yield self._accepted()
        self._close()

    def _sequence(self, index: int, prefix: list[int], prompt_tokens: int) -> DecodingSequence:
        drafts, lookup = self.drafts, self.settings.lookup_tokens
        if drafts is None and lookup:
            drafts = NgramDrafts(lookup)
        sequence = DecodingSequence(
            index,
            prefix,
            prompt_tokens,
            self.backbone.num_layers,
            self.settings,
            chooser=self._chooser,
            planner=self.planner,
            policy=self.exit_policy,
            watch=self.watch,
            lookup=drafts,
            constraint=self._constraints[index] if self._constraints else None,
            gate_threshold=None if self.gate is None else self.gate.threshold,
            began=self.stopwatch.began,
        )
        sequence.multi_step = not self._single_calls
        return sequence

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Layers below each exit, then the number of layers."""
        return self.runner.boundaries

    @property
    def exact(self) -> bool:
        """Whether drafts are verified."""
        return self.settings.exact

    @property
    def cache(self) -> SegmentCache:
        """Keys and values of the running sequences; there is one from the prompt's pass on."""
        return self.runner.cache

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
        stopped = self._sequences[sequence]
        del stopped.records[count:]
        del stopped.scores[count:]
        stopped.trace.finish = "stop"
        if not stopped.finished:
            self._finish(stopped)

    @torch.inference_mode()
    def catch_up(self) -> None:
        """After the end: runs the upper layers for all pending tokens, so that KV is complete."""
        for index, near_ties in self.verifier.near_ties.items():
            near_ties.finish(self._sequences[index])
        self.runner.catch_up(self._sequences)

    def _accepted(self) -> list[list[int]]:
        """Removes finished sequences from the batch; newly accepted tokens of every sequence."""
        for sequence in list(self._active):
            if sequence.is_complete():
                self._finish(sequence)
        return [sequence.take_accepted() for sequence in self._sequences]

    def _finish(self, sequence: DecodingSequence) -> None:
        sequence.finished = True
        sequence.trace.seconds = self.stopwatch.seconds()
        self._active.remove(sequence)

    def _close(self) -> None:
        if self.watch is not None:
            self.watch.close(self._sequences)
        self.runner.count_discarded(self._sequences, final=True)
        now = self.stopwatch.clock()
        self.batch.seconds = now - self.stopwatch.began
        if not self._closed:
            self.exit_policy.end(now, max(len(sequence.records) for sequence in self._sequences))
        self._closed = True
        self.batch.cache_bytes = self.runner.cache.bytes_allocated

    def _step_policy(self, policy: ExitPolicy) -> None:
        """Tells the policy of the next step, and takes its thresholds."""
        tokens = max(len(sequence.records) for sequence in self._active)
        policy.on_step(self.stopwatch.clock(), tokens)
        if policy.thresholds is not None and self.settings.exits:
            thresholds = tuple(policy.thresholds)
            for sequence in self._active:
                sequence.thresholds = thresholds
        self._set_gate_threshold()

    def _set_gate_threshold(self) -> None:
        """Takes the policy's gate threshold; exact mode keeps the one that dense has."""
        threshold = self.exit_policy.gate_threshold
        if self.gate is not None and threshold is not None and not self.exact:
            for sequence in self._active:
                sequence.gate_threshold = threshold
