"""The engine: requests that come and go, decoded in shared passes.

Requests join and leave between steps. A step prefills chunks of prompts, runs one shallow pass for
the sequences that can go on, and a deep pass for those that wait for one; the scheduler says which
(`deliberate.engine.scheduler`). Everything that a request chose is its own, so two requests may
differ in all of it, and a request's output does not depend on the others: every layer computes a
token from its own sequence only, an exit is taken by the sequence's own thresholds, noise is a
function of the request's seed, and full depth verifies what exact mode drafted. What is shared are
weights, passes, and the draft planner's estimates, which change the speed of exact mode only.

When the cache is full, a sequence is preempted: its row is closed, its accepted tokens stay, and
later its keys and values are computed again (`deliberate.engine.prefill`). Which requests
wait and which run is kept by `deliberate.engine.roster`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from deliberate.cache.block_cache import BlockCache
from deliberate.cache.kv_cache import OutOfBlocks, SegmentCache
from deliberate.engine.admitted import Admitted, EngineStats, StepOutput
from deliberate.engine.decode_step import DecodeStep
from deliberate.engine.deliberation import GateRunner
from deliberate.engine.exit_step import ExitStep
from deliberate.engine.held_rows import HeldRows, Resolve
from deliberate.engine.loop_settings import Stopwatch
from deliberate.engine.multi_step import MultiStep
from deliberate.engine.prefill import Chunk, Prefill
from deliberate.engine.request import Request
from deliberate.engine.request_limits import check_fits
from deliberate.engine.scheduler import Scheduler, SchedulerSettings
from deliberate.engine.segment_runner import SegmentRunner
from deliberate.engine.sequence import DecodingSequence
from deliberate.engine.strict import NearTies
from deliberate.engine.verifier import Verifier
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.deliberation_gate import DeliberationGate
from deliberate.modeling.exit_heads import ExitReader
from deliberate.trace import BatchTrace
from deliberate.utils.errors import DeliberateError


class Engine(HeldRows):
    """Decodes any number of requests on one model.

    Threads may add and abort requests while another one steps.

    Args:
        backbone: the model's layers.
        reader: reads the exits.
        exits: number of layers below each exit, ascending.
        resolve: how a request is decoded. Requests' settings have these exits, or none.
        max_running: most requests that have a cache row at a time.
        cache: with rows that are opened and closed, at least `max_running`; None for a new one.
        scheduler: plans the steps; None for one with the default limits.
        max_pending: most tokens that are expected to be pending at an exit.
        clock: seconds, monotonic.
        reuse_key: within the same key, as of their opening, rows share beginnings in blocks.
        turn: what a step holds while it runs, where the executor has one set of buffers.
        gate: the deliberation gate that requests may be decoded with.
        stopwatch: reads the clock; None for a new one that reads `clock`.
        trace: of what it runs; None for one that every step empties.

    Raises:
        DeliberateError: a limit that is not allowed.
    """

    def __init__(
        self,
        backbone: Backbone,
        reader: ExitReader | None,
        exits: Sequence[int],
        resolve: Resolve,
        *,
        max_running: int = 16,
        cache: SegmentCache | None = None,
        scheduler: Scheduler | None = None,
        max_pending: int = 8,
        clock: Callable[[], float] = time.perf_counter,
        reuse_key: Callable[[], str | None] = lambda: None,
        turn: Callable[[], AbstractContextManager[Any]] = nullcontext,
        gate: DeliberationGate | None = None,
        stopwatch: Stopwatch | None = None,
        trace: BatchTrace | None = None,
    ) -> None:
        if max_running < 1:
            raise DeliberateError(f"max_running {max_running}: it must be at least 1")
        if cache is None:
            cache = backbone.new_cache(0, max_running)
        if cache.batch < max_running:
            raise DeliberateError(
                f"max_running {max_running} with a cache of {cache.batch} rows: give one row each"
            )
        self._backbone = backbone
        self._resolve = resolve
        self._turn = turn
        self._scheduler = scheduler or Scheduler(SchedulerSettings(max_running=max_running))
        self._deep = self._scheduler.settings.deep
        self._blocks = cache.free_blocks
        if stopwatch is None:
            stopwatch = Stopwatch(clock, on_cpu=torch.device(backbone.device).type == "cpu")
        self._trace = (
            BatchTrace([], layer_calls=[0] * backbone.num_layers) if trace is None else trace
        )
        self._clock, self._work = stopwatch.clock, stopwatch.work
        rounds = self._trace.deliberation_rounds
        deliberation = None if gate is None else GateRunner(gate, backbone, rounds)
        runner = SegmentRunner(backbone, exits, self._trace, stopwatch, deliberation)
        runner.attach(cache, max_pending)
        super().__init__(runner, max_running, reuse_key)
        self._verifier = Verifier(self._runner, stopwatch, self._near_ties)
        exit_step = ExitStep(reader, self._runner, stopwatch)
        multi_step = MultiStep(reader, self._runner, stopwatch, any_row=cache.batch > 1)
        self._decode = DecodeStep(
            self._runner, exit_step, self._verifier, multi_step, self._deep, stopwatch
        )
        self._prefill = Prefill(self._runner)
        self._next = 0

    # -- requests ------------------------------------------------------------------------------

    def add(self, request: Request) -> int:
        """Takes a request; returns its number, by which its outputs are named.

        Raises:
            DeliberateError: something of it that this model or the engine cannot do, by name.
        """
        self._check_hold(request.hold)
        request, called = self._take_up(request)
        running = min(self._max_running, self.unfinished + 1)
        decoding = self._decoding(self._resolve, request, running)
        settings = decoding.settings
        if settings.exits and settings.exits != self._runner.boundaries[:-1]:
            raise DeliberateError(
                f"exits {list(settings.exits)} of a request in an engine with exits "
                f"{list(self._runner.boundaries[:-1])}: an engine has one model's exits"
            )
        windows = isinstance(self._cache, BlockCache) and self._backbone.window is not None
        if windows and settings.strict is not None:
            raise DeliberateError(
                "strict with a cache in blocks and a sliding window: tokens are run again from "
                "before it, where blocks are free; leave strict out, or use a cache of rows"
            )
        with self._lock:
            number, self._next = self._next, self._next + 1
            bounds = self._runner.boundaries
            entry = Admitted(number, request, decoding, bounds, called)
            if self._backbone.rope_follows_length:
                entry.refill.drafts = []
            if settings.strict is not None:
                near_ties = NearTies(self._backbone, self._runner, settings.strict)
                self._near_ties[number] = entry.near_ties = near_ties
            if not self._take_over(entry):
                self._waiting[number] = entry
            self._stats.added += 1
        return number

    def _take_up(self, request: Request) -> tuple[Request, float]:
        """A request that was checked, and when it was asked for, by the clock."""
        called = self._clock()
        return check_fits(request, self._backbone, self._cache, self._blocks), called

    def stats(self) -> EngineStats:
        """What the engine has done so far, and has to do (a copy)."""
        with self._lock:
            free = self._cache.free_blocks
            return self._stats.copied(len(self._running), len(self._waiting), free)

    # -- steps ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """One step of all requests that the scheduler chooses; nothing where there are none.

        Returns:
            One output of each request that has new tokens or is finished.
        """
        with self._lock, self._turn():
            if not self.unfinished:
                return []
            began = self._clock()
            running, alone = list(self._running.values()), self._alone
            self._recovery.begin(running)
            try:
                plan = self._scheduler.plan(
                    began,
                    self._waiting_views(),
                    [
                        entry.running_view(self._runner, self._block_size, alone=alone)
                        for entry in running
                    ],
                    self._cache.free_blocks if self._block_size else None,
                )
            except DeliberateError as error:
                self._make_room(error)
                return []
            for number in plan.preempt:
                self._preempt(self._running[number])
            fresh = self._run_prefill(plan.prefill)
            self._share_work()
            decoding_began, rows = self._work(), self._running
            for entry in rows.values():
                entry.plan_drafts(len(rows))
            shallow = [rows[number].sequence for number in plan.shallow if number in rows]
            self._step_policies(shallow)
            self._runner.planners = tuple(
                {id(p): p for one in rows.values() if (p := one.sequence.planner)}.values()
            )
            try:
                self._run_passes(
                    shallow, [rows[number].sequence for number in plan.deep if number in rows]
                )
            except OutOfBlocks as error:
                self._make_room(error)
            now = self._clock()
            for entry in rows.values():
                entry.note_blocked(now)
            self._runner.count_discarded([entry.sequence for entry in rows.values()])
            self._share_work()
            outputs = self._outputs(decoding_began, fresh)
            self._stats.note_step(self._trace, outputs, self._clock() - began)
            return outputs

    def _share_work(self) -> None:
        """Shows the requests that measure time what was run since the last call, for whomever."""
        for entry in self._running.values():
            entry.policy_run.note_work(self._trace)
        self._trace.prefills.clear()
        self._trace.deliberation_rounds.clear()

    def _step_policies(self, shallow: Sequence[DecodingSequence]) -> None:
        """Tells exit policies that may change of the next step of their sequences."""
        policies = [self._running[sequence.index].policy_run for sequence in shallow]
        runs = {id(run): run for run in policies if run.changes}
        if runs:
            now, running = self._clock(), len(self._running)
            for run in runs.values():
                run.step(now, running)

    def _run_prefill(self, chunks: Sequence[tuple[int, int, int]]) -> set[int]:
        """Admits requests and runs chunks of their prompts; those that got their first token."""
        work: list[tuple[Admitted, int, int]] = []
        for number, _, count in chunks:
            entry = self._waiting.get(number)
            if entry is not None:
                try:
                    self._open(entry)
                except OutOfBlocks:
                    continue
            elif number not in self._running:
                continue
            entry = self._running[number]
            first = self._cache.length(0, entry.sequence.row)
            prompt = entry.sequence.prompt_tokens
            whole = entry.near_ties is not None
            end = self._prefill.last_of_chunk(entry.refill, first, count, prompt, whole=whole)
            work.append((entry, first, end))
        if not work:
            return set()
        work.sort(key=lambda one: one[0].sequence.row)
        parts = [
            Chunk(entry.sequence, entry.refill, first, end, alone=entry.near_ties is not None)
            for entry, first, end in work
        ]
        try:
            states = self._prefill.run(parts)
        except OutOfBlocks as error:
            self._make_room(error)
            return set()
        self._stats.prefilled += sum(end - first for _, first, end in work)
        ended = []
        for place, (entry, _, end) in enumerate(work):
            if end == len(entry.refill.tokens):
                entry.prefilled(self._runner)
                if entry.refill.new:
                    ended.append(place)
        self._begin_answers([(work[place][0], states[place]) for place in ended])
        return {work[place][0].number for place in ended}

    def _begin_answers(self, ended: Sequence[tuple[Admitted, torch.Tensor | None]]) -> None:
        """Chooses the first tokens of requests from the states after their prompts and drafts."""
        plain, rows = [], []
        for entry, states in ended:
            assert states is not None  # a prompt goes through all layers
            if entry.refill.drafts:
                self._decode.proposed.after_prompt(entry.sequence, states, entry.refill.drafts)
            else:
                plain.append(states)
                rows.append(entry.sequence)
        if rows:
            self._verifier.predict(rows, torch.cat(plain))
        for entry, _ in ended:
            entry.sequence.trace.prefill_seconds = entry.sequence.records[0].seconds

    def _run_passes(
        self, shallow: list[DecodingSequence], deep: Sequence[DecodingSequence]
    ) -> None:
        """The shallow pass of sequences that can go on, then the deep pass.

        A deep pass that the next step's plan would have is run too.
        """
        decoding = [one.sequence for one in self._running.values() if not one.prefilling]
        blocked = [sequence for sequence in decoding if sequence.blocked]
        passes = 1
        if self._backbone.rope_switch is not None and self._decode.recomputed(shallow):
            shallow = [sequence for sequence in shallow if not sequence.is_complete()]
        if shallow:
            # Alone, a sequence may take several steps in one call of the executor.
            first, alone = shallow[0], self._alone
            self._decode.lone = alone
            first.multi_step = alone and self._running[first.index].steady
            if not alone:
                shallow.sort(key=lambda sequence: sequence.row)
            # A prompt that is being prefilled waits for one pass at most.
            several = len(decoding) == len(self._running) and self._deep.max_seconds == math.inf
            passes = self._decode.shallow(shallow, decoding if several else ())
        for sequence in blocked:
            sequence.waited += passes if sequence not in deep else 0
        if not deep and decoding:
            if all(sequence.blocked for sequence in decoding):
                deep = decoding  # nobody could go on
            elif passes > 1:
                deep = self._decode.due(decoding)
        if deep:
            try:
                self._decode.deep(deep)
            except OutOfBlocks as error:
                # What was pending of them is lost: they are run again.
                if len(self._running) < 2:
                    raise error
                for sequence in deep:
                    self._preempt(self._running[sequence.index])

    def _outputs(self, decoding: float, fresh: Collection[int]) -> list[StepOutput]:
        """What the running requests have made; closes those that are complete.

        Args:
            decoding: when the passes began, by `Stopwatch.work`: the planner compares ways to
                decode, and prefill is none of them.
            fresh: requests whose first token the prefill has chosen.
        """
        outputs = self._recovery.outputs
        gained = dict.fromkeys(map(id, self._runner.planners), 0)
        for entry in list(self._running.values()):
            output = None if entry.prefilling else entry.output(self._clock())
            if output is None:
                continue
            outputs.append(output)
            if entry.sequence.planner is not None:
                made = len(output.tokens) - (entry.number in fresh)
                gained[id(entry.sequence.planner)] += made
            if output.finished is not None:
                self._end(entry)
        for planner in self._runner.planners:
            planner.progress(self._work() - decoding, gained[id(planner)])
        return outputs
