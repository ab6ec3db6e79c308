"""Measured times that the prior of a draft layer starts from."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from deliberate.executors.draft_executor import DraftExecutor
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.exit_heads import ExitReader

# Tokens of context of a measured pass, tokens of the longer pass, and repetitions.
_CONTEXT, _MORE, _TRIES = 128, 4, 7


@torch.inference_mode()
def pass_seconds(backbone: Backbone) -> tuple[float, float]:
    """Seconds of a full-depth pass over one token, and of one more token in it."""
    cache = backbone.new_cache(_CONTEXT + _MORE + 1)
    depth, device = backbone.num_layers, backbone.device

    def run(count: int) -> None:
        cache.crop(_CONTEXT)
        start = cache.length(depth - 1)
        ctx = backbone.pass_context([0], [start], [count], batch=1)
        ids = torch.ones((1, count), dtype=torch.int64, device=device)
        hidden = backbone.run_layers(backbone.embed(ids, ctx), 0, depth, ctx, cache)
        _ = backbone.read_full_depth(hidden[0]).tokens

    run(_CONTEXT)
    single = _median(lambda: run(1))
    return single, max(0.0, _median(lambda: run(1 + _MORE)) - single) / _MORE


@torch.inference_mode()
def head_seconds(backbone: Backbone) -> float:
    """Seconds of choosing one token from its state after the last layer."""
    state = torch.randn(1, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device)
    return _median(lambda: backbone.read_full_depth(state).tokens)


@torch.inference_mode()
def read_seconds(reader: ExitReader, backbone: Backbone, exits: int) -> float:
    """Seconds of evaluating one exit, the mean over the exits, each after a full-depth pass.

    Alone and again and again, a small head stays in the processor's cache, which a pass empties.
    """
    cache, depth = backbone.new_cache(_TRIES + 2), backbone.num_layers
    state = torch.randn(1, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device)
    ids = torch.ones((1, 1), dtype=torch.int64, device=backbone.device)
    tries: list[list[float]] = [[] for _ in range(exits)]
    for turn in range(_TRIES + 1):
        for index, own in enumerate(tries):
            cache.crop(0)
            ctx = backbone.pass_context([0], [0], [1], batch=1)
            hidden = backbone.run_layers(backbone.embed(ids, ctx), 0, depth, ctx, cache)
            _ = backbone.read_full_depth(hidden[0]).tokens
            began = time.perf_counter()
            reader.evaluate(index, state, 1.0)
            if turn:  # the first allocates
                own.append(time.perf_counter() - began)
    return sum(map(statistics.median, tries)) / exits


@torch.inference_mode()
def draft_seconds(executor: DraftExecutor, hidden_size: int) -> float:
    """Seconds of one draft."""
    cache = executor.new_cache()
    state = torch.randn(1, hidden_size, dtype=executor.dtype, device=executor.device)

    def draft() -> None:
        cache.crop(_CONTEXT)
        executor.read(executor.extend(cache, state, [1]))

    executor.extend(cache, state.expand(_CONTEXT, -1), [1] * _CONTEXT)
    return _median(draft)


def _median(run: Callable[[], object]) -> float:
    run()
    tries = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        run()
        tries.append(time.perf_counter() - began)
    return statistics.median(tries)
