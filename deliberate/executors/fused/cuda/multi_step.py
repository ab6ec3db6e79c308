"""Several tokens of one sequence with token, position and choice left on the device.

A step is one graph: embedding, layers, an exit or the top, and the token it chose is the input of
the next. The host only learns, one step behind, whether to go on: the next step is launched while
the last one's answer travels. What is launched in vain lies behind the lengths of the cache, is
written over, and is counted as run.
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
from deliberate.executors.fused.cuda.reader import CudaReader, HeadDesk
from deliberate.executors.fused.cuda.workspaces import StackedCache, Step, Workspace, bucket
from deliberate.executors.fused.static_cache import StaticCache
from deliberate.kernels.native import Decoded
from deliberate.modeling.exit_heads import ExitReader

# Index of the top among the exits.
TOP = -1


class _Tape:
    """What steps leave behind: states ``[n, d]`` and, float64 ``[2, n]``, scores and tokens."""

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


class DeviceSteps:
    """Greedy decoding of one sequence by graphs of whole steps.

    What `Backbone.ahead` returns; see `deliberate.engine.multi_step.MultiStep` for who uses it.

    Args:
        backbone: the executor, a `CudaFusedBackbone` (which makes this, so it is not imported).
        reader: of its exits, or None.
    """

    def __init__(self, backbone: Any, reader: ExitReader | None) -> None:
        self._backbone = backbone
        self._reader = reader if isinstance(reader, CudaReader) else None
        self._desk = HeadDesk(1, backbone.gain, SegmentGraphs(backbone.captures))
        self._tapes: dict[int, _Tape] = {}
        # Graphs of a workspace are for the tapes and heads of this object alone.
        self._key = object()

    def asks(self, exit_index: int) -> bool:
        """Whether this exit can be asked: not where a gate decides before the head is read."""
        return self._reader is not None and not self._reader.measure.before_head

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
        asked: int,
        threshold: float,
        stops: Collection[int],
        stops_stand: bool,
    ) -> Decoded:
        """Decodes through layers 0..last-1, which hold `start` tokens each, a token at a time.

        The token chosen stands, and is fed next, where its score reaches the threshold and it is
        not one of `stops`, or where `stops_stand`. Ends after `steps` passes, at the first token
        that does not stand, and after a stop.

        Args:
            exit_index: which exit is asked; None for the top, whose score is its probability.
            token: fed first, at position `start`.
            asked: passes that ask; those after them only feed.
            threshold: least score of a token that stands; -inf for all.
            stops: tokens that end it.
        """
        assert isinstance(cache, StackedCache) and cache.batch == 1
        backbone = self._backbone
        backbone.launches.give_up()
        cache.reserve(start + steps)
        workspace = cache.workspace
        tape = self._tape(steps)
        step = workspace.step(1, "steps")
        asks = self._ready(workspace, step, tape, exit_index, last, True, token, start)
        feeds = asks
        if steps > asked:
            feeds = self._ready(workspace, step, tape, exit_index, last, False, token, start)
        self._begin(step, tape, token, start)
        # With nothing to stop at but the end of the output, one step in vain is all there can be.
        early = exit_index is None and threshold == -math.inf
        early = early or (exit_index is not None and backbone.launches.often_stands(exit_index))

        waits: list[Work] = []
        launched = 0

        def launch() -> None:
            nonlocal launched
            if launched < asked:
                asks()
                answer = tape.answers[launched % 2]
                waits.append(backbone.captures.device.post(tape.log, answer))
            else:
                feeds()
            launched += 1

        tokens: list[int] = []
        scores: list[float] = []
        standing = 0
        launch()
        while True:
            read = len(tokens)
            if read == asked:
                passes = read + 1  # the one that only feeds
                break
            if early and launched < steps and launched == read + 1:
                launch()
            waits.pop(0)()
            score, chosen = tape.answers[read % 2][:, read].tolist()
            tokens.append(int(chosen))
            scores.append(score)
            passes, stop = read + 1, int(chosen) in stops
            stands = score >= threshold and (stops_stand or not stop)
            if exit_index is not None:
                backbone.launches.stood(exit_index, stands)
            if not stands:
                break
            standing = passes
            if stop or passes == steps:
                break
            if launched == passes:
                launch()
        for vain in range(passes, launched):
            where = Launch(
                TOP if exit_index is None else exit_index, 0, last, (0,), (start + vain,),
                cache.version,
            )  # fmt: skip
            backbone.launches.discard(where)
        cache.extend(last, passes)
        return Decoded(tape.states[:passes].clone(), tokens, scores, standing)

    def _begin(self, step: Step, tape: _Tape, token: int, start: int) -> None:
        step.listed.positions[:1].fill_(start)
        step.listed.lengths[:1].fill_(start + 1)
        step.listed.rows[:1].fill_(0)
        step.listed.count.fill_(1)
        tape.token.fill_(token)
        tape.at.fill_(0)

    def _ready(
        self,
        workspace: Workspace,
        step: Step,
        tape: _Tape,
        exit_index: int | None,
        last: int,
        reads: bool,
        token: int,
        start: int,
    ) -> Work:
        """The graph of one step. What warming up writes to the cache lies from `start` on."""
        backbone, desk, listed = self._backbone, self._desk, step.listed
        embedding = backbone.embedding
        first, state = step.state(0), step.state(last)
        weights, shapes = backbone.layer_weights[:last], backbone.layer_shapes[:last]

        def work() -> None:
            first[:1].copy_(torch.nn.functional.embedding(tape.token, embedding))
            state.copy_(first)
            run_listed(
                state, weights, workspace.keys[:last], workspace.values[:last], shapes,
                workspace.cos, workspace.sin, listed,
            )  # fmt: skip
            tape.states.index_copy_(0, tape.at, state[:1])
            if reads:
                desk.hidden.copy_(state[:1])
                if exit_index is None:
                    desk.read(backbone.gain, backbone.eps, backbone.head)
                else:
                    assert self._reader is not None
                    self._reader.read(exit_index, desk)
                tape.token.copy_(desk.tokens)
                answer = torch.stack((desk.confidence.double(), desk.tokens.double()))
                tape.log.index_copy_(1, tape.at, answer)
            listed.positions.add_(1)
            listed.lengths.add_(1)
            tape.at.add_(1)

        # The object itself, not its id: a graph must not outlive what it reads and serve another.
        key = ("steps", self._key, exit_index, last, reads, tape.size)
        self._begin(step, tape, token, start)
        return workspace.graphs.ready(key, work)

    def _tape(self, steps: int) -> _Tape:
        size = bucket(steps + WARM_UP_RUNS)
        if size not in self._tapes:
            self._tapes[size] = _Tape(steps, self._backbone.gain, self._backbone)
        return self._tapes[size]
