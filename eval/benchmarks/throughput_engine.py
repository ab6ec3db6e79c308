"""The engine as a server of `deliberate bench throughput`."""

from __future__ import annotations

import dataclasses

from deliberate.api.model import AdaptiveModel
from deliberate.cache.kv_cache import SegmentCache
from deliberate.engine.engine import Engine
from deliberate.engine.request import Request
from deliberate.engine.scheduler import Scheduler, SchedulerSettings
from deliberate.engine.spec import DecodingSpec
from deliberate.eval.benchmarks.throughput_load import Call, Load
from deliberate.eval.benchmarks.throughput_servers import Arrivals, Served

# Sequences for which the model chooses its executor: any number that shares passes.
_SHARED = 2


class EngineServer:
    """Adds requests to an engine as they arrive, and steps it while any is unfinished.

    Args:
        model: whose engine it is.
        spec: how every request is decoded.
        block_tokens: tokens of a block of its cache, as many blocks as the load needs, and shared
            beginnings; None for a cache with a row of slots for each request.
    """

    def __init__(
        self, model: AdaptiveModel, spec: DecodingSpec, block_tokens: int | None = None
    ) -> None:
        self._model = model
        self._spec = spec
        self._block_tokens = block_tokens

    def serve(self, load: Load) -> Served:
        """By a new engine, whose making is not timed."""
        engine, cache = self._engine(load)
        served = Served.empty(load)
        held = most_held = 0
        served.layers = [0.0] * len(load.calls)
        numbers: dict[int, int] = {}
        arrivals = Arrivals(load)
        while not arrivals.over or engine.unfinished:
            if not engine.unfinished:
                arrivals.sleep()
            for index in arrivals.take():
                numbers[engine.add(self._request(load.calls[index]))] = index
            for output in engine.step():
                index = numbers[output.id]
                if not served.tokens[index]:
                    held += len(load.calls[index].prompt)
                held += len(output.tokens)
                served.tokens[index] += output.tokens
                served.times[index] += [arrivals.seconds] * len(output.tokens)
                if output.trace is not None:
                    served.layers[index] = output.trace.layers_per_token
                    closed = len(load.calls[index].prompt) + len(served.tokens[index])
                    most_held, held = max(most_held, held), held - closed
        served.processor = arrivals.processor
        stats = engine.stats()
        served.prefilled = stats.prefilled
        served.kv_bytes, served.kv_tokens = cache.bytes_allocated, most_held
        served.notes = {
            "steps": stats.steps,
            "preempted": stats.preempted,
            "passes": {str(segment): count for segment, count in stats.passes.items()},
            "rows_per_pass": {
                str(segment): stats.rows[segment] / count for segment, count in stats.passes.items()
            },
        }
        return served

    def _engine(self, load: Load) -> tuple[Engine, SegmentCache]:
        running = min(load.at_a_time, len(load.calls))
        settings = SchedulerSettings(max_running=running)
        backbone = self._model.backbone_for(_SHARED)
        if self._block_tokens is None:
            cache = backbone.new_cache(0, running)
        else:
            settings = dataclasses.replace(settings, block_tokens=self._block_tokens)
            size = self._block_tokens
            blocks = sum(-(-(len(c.prompt) + c.answer) // size) + 2 for c in load.calls)
            cache = backbone.new_block_cache(blocks, block_size=size, max_rows=running)
        scheduler = Scheduler(settings)
        return self._model.engine(max_running=running, scheduler=scheduler, cache=cache), cache

    def _request(self, call: Call) -> Request:
        return Request(call.prompt, call.answer, spec=self._spec, end_tokens=())
