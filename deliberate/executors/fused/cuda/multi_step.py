"""Several tokens of one sequence with token, position and choice left on the device.

A step is one graph: embedding, layers, an exit head or the model's own, and the token it chose is
the input of the next. The host learns one step later whether to continue: the next step is launched
while the result of the last one is copied. What a discarded launch wrote lies behind the lengths of
the cache, is overwritten, and is counted as run.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from deliberate.executors.fused.cuda.graphs import WARM_UP_RUNS, SegmentGraphs, Work
from deliberate.executors.fused.cuda.layers import run_listed
from deliberate.executors.fused.cuda.prefetch import Launch
from deliberate.executors.fused.cuda.reader import CudaReader, HeadBuffers
from deliberate.executors.fused.cuda.workspaces import StackedCache, Step, Workspace, bucket
from deliberate.executors.fused.static_cache import StaticCache
from deliberate.kernels.native_drafts import Decoded
from deliberate.modeling.exit_heads import ExitReader

# Index of full depth among the exits.
TOP = -1


class _StepOutputs:
    """What steps write: states ``[n, d]`` and, float64 ``[2, n]``, scores and tokens."""

    def __init__(self, steps: int, like: Tensor, backbone: Any) -> None:
        device = like.device
        # Warming up runs past the end.
        self.size = bucket(steps + WARM_UP_RUNS)
        with torch.inference_mode(False):
            self.token = torch.zeros(1, dtype=torch.int64, device=device)
            self.at = torch.zeros(1, dtype=torch.int64, device=device)
            self.states = like.new_zeros((self.size, like.shape[-1]))
            self.log = torch.zeros((2, self.size), dtype=torch.float64, device=device)
        # Two copies may be on their way at once.
        self.answers = [backbone.captures.device.host_buffer(self.log) for _ in range(2)]


class CudaMultiStep:
    """Greedy decoding of one sequence by graphs of whole steps.

    What `Backbone.multi_step` returns; `deliberate.engine.multi_step.MultiStep` uses it.

    Args:
        backbone: the executor, a `CudaFusedBackbone` (which makes this, so it is not imported).
        reader: of its exits, or None.
    """

    def __init__(self, backbone: Any, reader: ExitReader | None) -> None:
        self._backbone = backbone
        self._reader = reader if isinstance(reader, CudaReader) else None
        self._head_buffers = HeadBuffers(1, backbone.gain, SegmentGraphs(backbone.captures))
        self._step_outputs: dict[int, _StepOutputs] = {}
        # Graphs of a workspace are for the outputs and heads of this object alone.
        self._key = object()

    def can_evaluate(self, exit_index: int) -> bool:
        """Whether this exit can be evaluated: not where a gate decides before the head runs."""
        return self._reader is not None and not self._reader.measure.before_head

    def serves(self, cache: Any) -> bool:
        """Whether it decodes over this cache: not over blocks, since warming up writes past the
        tokens that have any."""
        return isinstance(cache, StackedCache)

    @torch.inference_mode()
    def decode(
        self,
        exit_index: int | None,
        last: int,
        token: int,
        start: int,
        cache: StaticCache,
        *,
        steps: int,
        requested: int,
        threshold: float,
        stops: Collection[int],
        accept_stops: bool,
    ) -> Decoded:
        """Decodes through layers 0..last-1, which hold `start` tokens each, a token at a time.

        The token chosen is accepted, and is fed next, where its score reaches the threshold and it
        is not one of `stops`, or where `accept_stops`. Ends after `steps` passes, at the first
        token that is not accepted, and after a stop.

        Args:
            exit_index: which exit is evaluated; None for full depth, whose score is a probability.
            token: fed first, at position `start`.
            asked: passes that evaluate the head; those after them only feed.
            threshold: least score of a token that is accepted; -inf for all.
            stops: tokens that end it.
        """
        assert isinstance(cache, StackedCache) and cache.batch == 1
        backbone = self._backbone
        cache.flight.give_up()
        cache.flight.last_pass = None
        cache.reserve(start + steps)
        workspace = cache.workspace
        outputs = self._outputs_for(steps)
        step = workspace.step(1, "steps")
        evaluates = self._ready(workspace, step, outputs, exit_index, last, True, token, start)
        feeds = evaluates
        if steps > requested:
            feeds = self._ready(workspace, step, outputs, exit_index, last, False, token, start)
        self._begin(step, outputs, token, start)
        # Where only the end of the output can stop it, at most one step is discarded.
        early = exit_index is None and threshold == -math.inf
        early = early or (exit_index is not None and backbone.launches.often_accepted(exit_index))

        waits: list[Work] = []
        launched = 0

        def launch() -> None:
            nonlocal launched
            if launched < requested:
                evaluates()
                answer = outputs.answers[launched % 2]
                waits.append(backbone.captures.device.post(outputs.log, answer))
            else:
                feeds()
            launched += 1

        tokens: list[int] = []
        scores: list[float] = []
        accepted = 0
        launch()
        while True:
            read = len(tokens)
            if read == requested:
                passes = read + 1  # the one that only feeds
                break
            if early and launched < steps and launched == read + 1:
                launch()
            waits.pop(0)()
            score, chosen = outputs.answers[read % 2][:, read].tolist()
            tokens.append(int(chosen))
            scores.append(score)
            passes, stop = read + 1, int(chosen) in stops
            accept = score >= threshold and (accept_stops or not stop)
            if exit_index is not None:
                backbone.launches.record_accepted(exit_index, accept)
            if not accept:
                break
            accepted = passes
            if stop or passes == steps:
                break
            if launched == passes:
                launch()
        for discarded in range(passes, launched):
            where = Launch(
                TOP if exit_index is None else exit_index, 0, last, (0,), (start + discarded,),
                cache.version,
            )  # fmt: skip
            cache.flight.discard(where)
        cache.extend(last, passes)
        return Decoded(outputs.states[:passes].clone(), tokens, scores, accepted)

    def _begin(self, step: Step, outputs: _StepOutputs, token: int, start: int) -> None:
        step.listed.positions[:1].fill_(start)
        step.listed.lengths[:1].fill_(start + 1)
        step.listed.rows[:1].fill_(0)
        step.listed.count.fill_(1)
        outputs.token.fill_(token)
        outputs.at.fill_(0)

    def _ready(
        self,
        workspace: Workspace,
        step: Step,
        outputs: _StepOutputs,
        exit_index: int | None,
        last: int,
        reads: bool,
        token: int,
        start: int,
    ) -> Work:
        """The graph of one step. What warming up writes to the cache lies from `start` on."""
        backbone, buffers, listed = self._backbone, self._head_buffers, step.listed
        embedding = backbone.embedding
        first, state = step.state(0), step.state(last)
        weights, shapes = backbone.layer_weights[:last], backbone.layer_shapes[:last]

        def work() -> None:
            first[:1].copy_(torch.nn.functional.embedding(outputs.token, embedding))
            state.copy_(first)
            run_listed(
                state, weights, workspace.keys[:last], workspace.values[:last], shapes,
                workspace.cos, workspace.sin, listed,
            )  # fmt: skip
            outputs.states.index_copy_(0, outputs.at, state[:1])
            if reads:
                buffers.hidden.copy_(state[:1])
                if exit_index is None:
                    buffers.read(backbone.gain, backbone.eps, backbone.head)
                else:
                    assert self._reader is not None
                    self._reader.read(exit_index, buffers)
                outputs.token.copy_(buffers.tokens)
                answer = torch.stack((buffers.confidence.double(), buffers.tokens.double()))
                outputs.log.index_copy_(1, outputs.at, answer)
            listed.positions.add_(1)
            listed.lengths.add_(1)
            outputs.at.add_(1)

        # The object itself, not its id: a graph must not outlive what it reads and serve another.
        key = ("steps", self._key, exit_index, last, reads, outputs.size)
        self._begin(step, outputs, token, start)
        return workspace.graphs.ready(key, work)

    def _outputs_for(self, steps: int) -> _StepOutputs:
        size = bucket(steps + WARM_UP_RUNS)
        if size not in self._step_outputs:
            self._step_outputs[size] = _StepOutputs(steps, self._backbone.gain, self._backbone)
        return self._step_outputs[size]
