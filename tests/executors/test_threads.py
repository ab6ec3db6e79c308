"""Threads that decode with one model at once get what each would get alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.executors.fused.cuda.backbone import CudaFusedBackbone
from deliberate.kernels import native_build
from deliberate.modeling.exit_config import ExitConfig

THREADS = 8
needs_native = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)


@pytest.fixture(autouse=True)
def restless():
    """Python changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Runs jobs in eight threads that begin at once."""
    barrier = threading.Barrier(THREADS)

    def work(mine: list[Callable[[], Any]]) -> list[Any]:
        barrier.wait()
        return [job() for job in mine]

    with ThreadPoolExecutor(THREADS) as pool:
        made = list(pool.map(work, [jobs[start::THREADS] for start in range(THREADS)]))
    results: list[Any] = [None] * len(jobs)
    for start, own in enumerate(made):
        results[start::THREADS] = own
    return results


MODES: tuple[dict[str, Any], ...] = (
    {"fidelity": "exact", "thresholds": 0.05},
    {"fidelity": "dense"},
    {"fidelity": "exact", "thresholds": 0.2},
    {"fidelity": "threshold", "thresholds": 0.05},
    {"fidelity": "exact", "thresholds": 0.05, "do_sample": True, "seed": 3},
    {"fidelity": "threshold", "thresholds": 0.05, "kv_mode": "propagate"},
    {"fidelity": "threshold", "thresholds": 0.05, "kv_mode": "skip"},
)


def jobs_of(models: list[AdaptiveModel], count: int, tokens: int) -> list[Callable[[], Any]]:
    """Generations of all modes, alone and in batches, by these models in turn."""

    def job(index: int) -> Callable[[], Any]:
        model, how = models[index % len(models)], MODES[index % len(MODES)]
        ids = random_ids(4 + index % 9, seed=index, batch=1 + 2 * (index % 3 == 2))
        return lambda: model.generate(ids, max_new_tokens=tokens, **how).tolist()

    return [job(index) for index in range(count)]


@needs_native
def test_eight_threads_of_mixed_modes_and_executors_get_no_wrong_token():
    base = tiny_model("llama", layers=5, dtype=torch.float32, vocab_size=4000)
    models = [
        AdaptiveModel(base, [1, 2, 3], executor="fused", engine="native"),
        AdaptiveModel(base, [1, 2, 3], executor="generic"),
        AdaptiveModel(base, [1, 2, 3], executor="fused", engine="native", weights="int8"),
        AdaptiveModel(base, [1, 2, 3], executor="fused", engine="eager"),
    ]
    models[:0] = models[:1] * 3  # mostly one model
    jobs = jobs_of(models, 15 * THREADS, 12)
    expected = [job() for job in jobs]
    assert together(jobs) == expected


@needs_native
@pytest.mark.parametrize("measure", ["max_prob", "gate"])
def test_readers_and_heads_are_shared_by_threads(measure):
    exits = ExitConfig.build(4, [1, 2], measure=measure, translator="low_rank", rank=3)
    model = AdaptiveModel(
        tiny_model("llama", dtype=torch.float32, vocab_size=4000), exits, executor="fused"
    )
    states = [torch.randn(1 + index % 5, 32) for index in range(40 * THREADS)]

    def job(index: int) -> Callable[[], Any]:
        def compare() -> Any:
            reading = model.reader().evaluate(index % 2, states[index], 0.0)
            top = model.backbone.read_full_depth(states[index])
            rows = range(len(states[index]))
            return [(reading.token(r), reading.confidences[r], top.tokens[r]) for r in rows]

        return compare

    jobs = [job(index) for index in range(len(states))]
    expected = [job() for job in jobs]
    assert together(jobs) == expected


def test_generations_by_buffers_of_fixed_address_take_turns():
    base = tiny_model("llama", layers=5, dtype=torch.float32)
    model = AdaptiveModel(base, [1, 2, 3])
    model.backbone = CudaFusedBackbone(base, boundaries=(1, 2, 3), ops=True, prefetch=True)
    jobs = jobs_of([model], 3 * THREADS, 8)
    expected = [job() for job in jobs]
    assert together(jobs) == expected


@pytest.mark.parametrize("executor", ["generic", pytest.param("fused", marks=needs_native)])
def test_threads_whose_texts_differ_in_length_do_not_share_rotary_frequencies(executor):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    base = tiny_model("llama", dtype=torch.float32, rope_scaling=rope, max_position_embeddings=16)
    model = AdaptiveModel(base, [1, 2], executor=executor)

    def job(index: int) -> Callable[[], Any]:
        ids = random_ids(4 + 5 * (index % 8), seed=index)
        return lambda: model.generate(ids, max_new_tokens=8, fidelity="dense").tolist()

    jobs = [job(index) for index in range(4 * THREADS)]
    expected = [job() for job in jobs]
    assert together(jobs) == expected


def test_a_dense_block_is_of_its_own_thread():
    model = AdaptiveModel(tiny_model("llama", dtype=torch.float32), [1, 2])
    inside, go = threading.Event(), threading.Event()

    def other() -> None:
        with model.dense():
            inside.set()
            go.wait(120)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(120)
    assert model.fidelity == "exact"
    with model.dense():
        assert model.fidelity == "dense"
        go.set()
        thread.join()
        assert model.fidelity == "dense"
    assert model.fidelity == "exact"
