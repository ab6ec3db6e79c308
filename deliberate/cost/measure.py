"""Measuring a `CostModel` on the device at hand.

A made-up decode is run and timed segment by segment: steps of all depths with all numbers of
deferred tokens, so that segments push each other's weights out of the processor's cache as in use.
The same steps are repeated in rounds, so a change of the machine's speed hits every size alike.
Coefficients are the non-negative least-squares fit (Lawson & Hanson, 1974) of relative errors to
the medians.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deliberate.cache.kv_cache import SegmentCache
from deliberate.config import MAX_CALL_STEPS
from deliberate.cost import probe
from deliberate.cost.cache import device_facts, fingerprint, keep, recall
from deliberate.cost.fit import TimedPart, best_fit, fit_multi_step
from deliberate.cost.gate import measure_rounds
from deliberate.cost.grid import Grid
from deliberate.cost.model import CostModel
from deliberate.kernels.ops.exit_head import top_probability
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.deliberation_gate import DeliberationGate
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.exit_heads import ExitReader
from deliberate.modeling.measures import measure_named
from deliberate.utils.devices import synchronize

# Rounds that are run however long they take; steps of each script by which the length of a round is
# estimated; and the fewest that a round of a slow model has.
_LEAST_ROUNDS, _PILOT_STEPS, _FEWEST_STEPS = 3, 6, 12


def cached_cost(
    backbone: Backbone,
    reader: ExitReader,
    exits: ExitConfig,
    *,
    gate: DeliberationGate | None = None,
    folder: Path | None = None,
    refresh: bool = False,
    grid: Grid | None = None,
    between: Callable[[int], None] | None = None,
) -> CostModel:
    """The cost model of this model here: read from the cache, or measured and kept.

    One that says of itself that the machine was busy is measured again, where it is not busy still.
    One from the cache is compared with a few steps: where these are much faster than it says, its
    times are corrected by their ratio.

    Args:
        gate: the model's deliberation gate, which is part of what is measured.
        folder: of the cache; by default ``$DELIBERATE_CACHE``, else the platform's own.
        refresh: measure even where a cached model exists.
        between: see `measure`.
    """
    found = None if refresh else recall(fingerprint(backbone, exits, gate), folder)
    attempts = 0
    # Models without facts were not measured here, but given.
    if found is not None and "measured" in found.facts:
        attempts = int(found.facts.get("attempts", 1))
        ratio = probe.probe(found, backbone)
        again = probe.is_noisy(found.facts) and attempts < probe.ATTEMPTS
        if (
            not again or ratio > 1.0 / probe.FASTER
        ):  # busy still: no better measurement can be made now
            return probe.scaled(found, ratio) if ratio < probe.FASTER else found
    elif found is not None:
        return found
    cost = measure(backbone, reader, exits, gate=gate, grid=grid, between=between)
    cost = replace(cost, facts=dict(cost.facts) | {"attempts": attempts + 1})
    keep(cost, folder)
    return cost


@torch.inference_mode()
def measure(
    backbone: Backbone,
    reader: ExitReader,
    exits: ExitConfig,
    *,
    gate: DeliberationGate | None = None,
    grid: Grid | None = None,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
    between: Callable[[int], None] | None = None,
) -> CostModel:
    """Times the parts of decoding and fits a cost model; the model's weights are only read.

    Args:
        reader: of the same model's exits.
        gate: its deliberation gate, if it has one.
        grid: sizes to measure; those beyond the model's context are cut to it.
        clock: seconds, monotonic.
        seed: of the made-up decode and of its hidden states, whose values do not change the time.
        between: called with its number after every round, for timing something else in the same
            conditions.
    """
    grid = (grid or Grid()).within(backbone.max_positions)
    stopwatch = _Stopwatch(backbone, reader, exits, grid, clock, seed)
    stopwatch.run(between)
    cost = stopwatch.fit(exits)
    if gate is None:
        return cost
    middle = sorted(grid.contexts)[len(grid.contexts) // 2]
    deliberation = measure_rounds(gate, backbone, context=middle, clock=clock)
    return replace(cost, deliberation=deliberation, fingerprint=fingerprint(backbone, exits, gate))


@dataclass(frozen=True)
class _Step:
    """A step of the made-up decode: the segments it runs, and tokens per sequence in each."""

    batch: int
    context: int
    tokens: tuple[int, ...]
    verifies: bool


class _Stopwatch:
    """Runs the made-up decode and keeps the time of every part of it, in seconds."""

    def __init__(
        self,
        backbone: Backbone,
        reader: ExitReader,
        exits: ExitConfig,
        grid: Grid,
        clock: Callable[[], float],
        seed: int,
    ) -> None:
        self.backbone = backbone
        self.reader = reader
        self.grid = grid
        self.clock = clock
        self.boundaries = (*exits.layers, backbone.num_layers)
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = next(backbone.model.parameters()).dtype
        self.rounds = 0
        # In the order in which a round runs them.
        self.timed: list[TimedPart] = []
        self._next = 0
        self.multi_step = backbone.multi_step(reader)
        # Calls with one step and with several, in the order in which a round runs them.
        self.calls: tuple[list[TimedPart], list[TimedPart]] = ([], [])
        self._caches: dict[tuple[int, int], SegmentCache] = {}

    def run(self, between: Callable[[int], None] | None = None) -> None:
        """All rounds, after one that is not counted: first calls allocate and choose kernels."""
        grid = self.grid
        scripts: list[list[_Step]] = []
        for batch in grid.batches:
            for context in grid.contexts:
                self._caches[batch, context] = self._filled(batch, context)
                scripts.append(self._script(batch, context))
        scripts = self._affordable(scripts)
        began = self.clock()
        for count in range(grid.rounds):
            if count >= _LEAST_ROUNDS and self.clock() - began > grid.seconds:
                break
            self._round(scripts)
            self.rounds += 1
            if between is not None:
                between(count)

    def _affordable(self, scripts: list[list[_Step]]) -> list[list[_Step]]:
        """The scripts after a round that is not counted, cut where rounds would take too long.

        A model of 100 M weights takes 20 s a round; its steps are long and few of them do.
        """
        began = self.clock()
        pilot = [script[:_PILOT_STEPS] for script in scripts]
        self._round(pilot)
        longest = max(map(len, scripts))
        expected = (self.clock() - began) * longest / min(longest, _PILOT_STEPS)
        most = self.grid.seconds / 2 / _LEAST_ROUNDS
        self.timed.clear()
        self.calls = ([], [])
        if expected > most:
            steps = max(_FEWEST_STEPS, int(longest * most / expected))
            return [script[:steps] for script in scripts]
        self._round(scripts)
        for timed in (*self.timed, *self.calls[0], *self.calls[1]):
            timed.samples.clear()
        return scripts

    def _round(self, scripts: Sequence[Sequence[_Step]]) -> None:
        self._next = 0
        for length in self.grid.prompts:
            self._prompt(length)
        for script in scripts:
            for step in script:
                self._step(step)
        if self.multi_step is not None and 1 in self.grid.batches:
            self._calls()

    def fit(self, exits: ExitConfig) -> CostModel:
        """The cost model of the samples, with the memory that explains them best."""
        best = best_fit(self.timed, self.boundaries)
        multi_step = None
        if self.calls[0]:
            multi_step = fit_multi_step(best.steps_alone(), *self.calls)
        facts = device_facts(self.backbone) | {
            "measured": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "rounds": self.rounds,
            "noise": round(probe.noise_of(self.timed), 3),
            **probe.conditions_now(self.backbone.device),
            "points": len(best.errors),
        }
        return CostModel(
            layers=exits.layers,
            num_layers=self.backbone.num_layers,
            segments=best.segments,
            reads=best.reads,
            head=best.head,
            step=best.step,
            memory=best.memory,
            multi_step=multi_step,
            gated=measure_named(exits.measure).before_head,
            fit_error=float(np.median(best.errors)),
            fit_error_p90=float(np.quantile(best.errors, 0.9)),
            fingerprint=fingerprint(self.backbone, exits),
            facts=facts,
        )

    # -- what is timed -------------------------------------------------------------------------

    def _time(
        self, part: str, index: int, sizes: tuple[int, int, int], run: Callable[[], Tensor]
    ) -> Tensor:
        synchronize(self.backbone.device)
        began = self.clock()
        result = run()
        synchronize(self.backbone.device)
        seconds = self.clock() - began
        if self._next == len(self.timed):
            self.timed.append(TimedPart(part, index, *sizes))
        self.timed[self._next].samples.append(seconds)
        self._next += 1
        return result

    def _hidden(self, batch: int, tokens: int) -> Tensor:
        values = torch.randn(batch, tokens, self.backbone.hidden_size, generator=self.generator)
        return values.to(device=self.backbone.device, dtype=self.dtype)

    def _filled(self, batch: int, context: int) -> SegmentCache:
        cache = self.backbone.new_cache(context + max(self.grid.tokens), batch)
        ctx = self.backbone.context(0, context, device=self.backbone.device)
        hidden = self._hidden(batch, context)
        self.backbone.run_layers(hidden, 0, self.backbone.num_layers, ctx, cache)
        return cache

    def _script(self, batch: int, context: int) -> list[_Step]:
        """Runs of tokens that exit at the first exit, a deeper one after each, dense stretches."""
        top = len(self.boundaries)
        depths: list[int] = []
        while len(depths) < self.grid.steps:
            depths += [1] * self.random.choice((0, 1, 2, 4, 8))
            depths.append(self.random.randint(min(2, top), top))
            if self.random.random() < 0.3:
                depths += [top] * 4
        steps = []
        for number, depth in enumerate(depths[: self.grid.steps]):
            tokens = [1]
            for _ in range(1, depth):
                more = [m for m in self.grid.tokens if m >= tokens[-1]]
                alone = number % 3 == 0 or depths[number - 1] == top
                tokens.append(1 if alone else self.random.choice(more))
            steps.append(_Step(batch, context, tuple(tokens), verifies=number % 4 < 2))
        return steps

    def _step(self, step: _Step) -> None:
        """One step; the sequences of a batch differ in length, as in use."""
        backbone, batch = self.backbone, step.batch
        cache = self._caches[batch, step.context]
        lengths = [max(1, step.context - row) for row in range(batch)]
        for row, length in enumerate(lengths):
            cache.crop(length, row)
        rows, top = list(range(batch)), len(self.boundaries) - 1
        ids = [[1]] * batch
        own = backbone.context(step.context, 1, device=backbone.device)
        hidden = self._time(
            "step",
            0,
            (batch, 1, 0),
            lambda: backbone.embed(torch.tensor(ids, device=backbone.device), own),
        )
        first = 0
        for k, (tokens, last) in enumerate(zip(step.tokens, self.boundaries, strict=False)):
            if tokens != hidden.shape[1]:
                hidden = hidden[:, :1].expand(-1, tokens, -1).contiguous()

            def run(
                hidden: Tensor = hidden, tokens: int = tokens, first: int = first, last: int = last
            ) -> Tensor:
                ctx = backbone.pass_context(rows, lengths, [tokens] * batch, batch=batch)
                return backbone.run_layers(hidden, first, last, ctx, cache)

            hidden = self._time("segment", k, (batch, tokens, step.context), run)
            first = last
            newest = hidden[:, -1]
            if k < top:

                def read(k: int = k, newest: Tensor = newest) -> Tensor:
                    self.reader.evaluate(k, newest, float("inf"))
                    return newest

                self._time("read", k, (batch, 1, 0), read)
        if len(step.tokens) > top:
            chosen = hidden.reshape(-1, hidden.shape[-1]) if step.verifies else hidden[:, -1]
            self._time("head", 0, (len(chosen), 1, 0), lambda: self._choose(chosen))

    def _calls(self) -> None:
        """Calls of steps ahead to every boundary, behind a pass of the layers that such calls find
        run before them: those above, for what waited there."""
        top, count = len(self.boundaries) - 1, 0
        for context in self.grid.contexts:
            cache = self._caches[1, context]
            cache.crop(context, 0)
            for k, last in enumerate(self.boundaries):
                if k < top and not self.multi_step.can_evaluate(k):
                    continue
                for parts, steps in zip(self.calls, (1, MAX_CALL_STEPS), strict=True):
                    if k < top:
                        self._above(cache, last, context)
                    synchronize(self.backbone.device)
                    began = self.clock()
                    self.multi_step.decode(
                        None if k == top else k, last, 1, context, cache,
                        steps=steps, requested=steps, threshold=-math.inf, stops=(),
                        accept_stops=True,
                    )  # fmt: skip
                    synchronize(self.backbone.device)
                    seconds = self.clock() - began
                    cache.crop(context, 0)
                    if count == len(parts):
                        parts.append(TimedPart("ahead", k, 1, steps, context))
                    parts[count].samples.append(seconds)
                count += 1

    def _above(self, cache: SegmentCache, first: int, context: int) -> None:
        """A catch-up pass of the layers above an exit; the cache is as it was."""
        tokens = self.grid.tokens[len(self.grid.tokens) // 2]
        ctx = self.backbone.pass_context([0], [context], [tokens], batch=1)
        hidden = self._hidden(1, tokens)
        self.backbone.run_layers(hidden, first, self.backbone.num_layers, ctx, cache)
        cache.crop(context, 0)

    def _choose(self, hidden: Tensor) -> Tensor:
        token, probability = top_probability(self.backbone.logits(hidden))
        token.tolist()
        probability.tolist()
        return hidden

    def _prompt(self, length: int) -> None:
        backbone, hidden = self.backbone, self._hidden(1, length)
        cache, first = backbone.new_cache(length), 0
        for k, last in enumerate(self.boundaries):

            def run(hidden: Tensor = hidden, first: int = first, last: int = last) -> Tensor:
                ctx = backbone.context(0, length, device=backbone.device)
                return backbone.run_layers(hidden, first, last, ctx, cache)

            hidden = self._time("prompt", k, (1, length, length), run)
            first = last
