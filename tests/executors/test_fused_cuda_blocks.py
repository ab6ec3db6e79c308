"""The CUDA executor over block tables: rows that come and go get what is theirs."""

from __future__ import annotations

import kernel_cases as kernels
import pytest
import torch
from cuda_cases import DTYPE, adaptive, by_ops, cpu_only
from fused_cases import close, family
from row_cases import Comparison, arbitrary_life
from tiny_models import VOCAB, random_ids

from deliberate.api.model import AdaptiveModel
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec
from deliberate.executors.fused.cuda.block_cache import CudaBlockCache
from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError


def comparison(name: str, block_size: int) -> Comparison:
    backbone = by_ops(family(name, dtype=torch.float64))
    cache = backbone.new_block_cache(400, block_size=block_size, max_rows=6)
    assert isinstance(cache, CudaBlockCache)
    return Comparison(backbone, cache, close)


@cpu_only
@pytest.mark.parametrize("block_size", [4, 5])
@pytest.mark.parametrize("name", ["llama", "qwen2, windows", "qwen3"])
@torch.inference_mode()
def test_rows_that_come_and_go_get_what_they_get_alone(name, block_size):
    for seed in range(2):
        made = comparison(name, block_size)
        arbitrary_life(made, seed)
        assert made.backbone.captures.reason is None


@cpu_only
@torch.inference_mode()
def test_long_passes_gather_and_short_ones_read_the_same_blocks():
    made = comparison("qwen2, windows", 16)
    rows = [made.open([]) for _ in range(3)]
    for counts in ({0: 40, 1: 70, 2: 3}, {0: 20}, {1: 1, 2: 90}, {0: 17, 1: 30, 2: 1}):
        made.new({rows[row]: count for row, count in counts.items()}, last=2)
    made.check_states()


@cpu_only
def test_keys_that_are_filled_in_equal_the_generic_executors():
    model, ids = family("qwen3", dtype=torch.float64), random_ids(9)
    state = torch.randn(1, 1, 32, dtype=torch.float64)
    held = []
    for backbone in (Backbone(model), by_ops(model)):
        with torch.inference_mode():
            cache = backbone.new_block_cache(40, block_size=4, max_rows=2)
            row = cache.open_row(9)
            ctx = backbone.pass_context([row], [0], [9], batch=cache.batch)
            backbone.run_layers(backbone.embed(ids, ctx), 0, 4, ctx, cache)
            ctx = backbone.pass_context([row], [9], [1], batch=cache.batch)
            backbone.run_layers(backbone.embed(ids[:, :1], ctx), 0, 2, ctx, cache)
            backbone.fill_layers(state, 2, 4, ctx, cache)
            assert cache.row_lengths(row) == [10] * 4
            held.append([part for layer in range(4) for part in cache.states(layer, row)])
    for mine, other in zip(*held, strict=True):
        assert close(mine, other)


@cpu_only
@torch.inference_mode()
def test_one_graph_serves_every_row_table_and_position():
    backbone = by_ops(family("llama", dtype=torch.float64))
    cache = backbone.new_block_cache(60, block_size=4, max_rows=3)
    for turn in range(3):
        rows = [cache.open_row(0) for _ in range(3)]
        for start in range(9):
            chosen = rows if start % 2 else rows[turn : turn + 1] or rows
            starts = [cache.length(0, row) for row in chosen]
            ctx = backbone.pass_context(chosen, starts, [1] * len(chosen), batch=cache.batch)
            hidden = backbone.embed(torch.randint(VOCAB, (len(chosen), 1)), ctx)
            backbone.run_layers(hidden, 0, 4, ctx, cache)
        for row in rows:
            cache.close_row(row)
    assert len(cache.workspace.graphs) == 1


SPECS = (
    DecodingSpec(fidelity="dense"),
    DecodingSpec(fidelity="exact", thresholds=(0.2, 0.3)),
    DecodingSpec(fidelity="threshold", thresholds=(0.2, 0.3)),
    DecodingSpec(fidelity="threshold", thresholds=(0.2, 0.3), kv_mode="propagate"),
    DecodingSpec(fidelity="threshold", thresholds=(0.2, 0.3), kv_mode="skip"),
)


def test_an_engine_over_blocks_gives_each_request_what_generate_gives():
    """Requests of every fidelity, more than fit at once. On a GPU: compiled kernels, graphs."""
    base = family("llama", dtype=DTYPE).to(kernels.DEVICE)
    plain, model = AdaptiveModel(base, [1, 2], executor="generic"), adaptive(base, [1, 2])
    ours = model.backbone
    prompts = [random_ids(3 + 5 * i, seed=i)[0].tolist() for i in range(10)]
    cache = ours.new_block_cache(60, block_size=4, max_rows=3)
    engine = model.engine(max_running=3, cache=cache)
    requests = [
        Request(prompt, 9, spec=SPECS[i % len(SPECS)], end_tokens=())
        for i, prompt in enumerate(prompts)
    ]
    made: dict[int, list[int]] = {}
    numbers = [engine.add(one) for one in requests]
    while engine.unfinished:
        for output in engine.step():
            made.setdefault(output.id, []).extend(output.tokens)
    assert len(cache.workspace.graphs) > 1 and cache.free_blocks == 60
    assert ours.captures.reason is None
    for number, one in zip(numbers, requests, strict=True):
        ids = torch.tensor([one.prompt_ids]).to(kernels.DEVICE)
        expected = plain.generate(ids, max_new_tokens=9, spec=one.spec)[0, len(one.prompt_ids) :]
        assert made[number] == expected.tolist(), one.spec


@cpu_only
@pytest.mark.skipif(not kernels.HAS_TRITON, reason="Triton is not installed")
@torch.inference_mode()
def test_the_triton_kernels_read_and_write_the_same_blocks():
    model, ids = family("qwen2", dtype=torch.float32, layers=2), random_ids(7, batch=2)
    states = []
    for backend in ("torch", "triton"):
        backbone = by_ops(model)
        cache = backbone.new_block_cache(9, block_size=4, max_rows=2)
        rows = [cache.open_row(0) for _ in range(2)]
        with kernels.running(backend):
            for starts, counts in (((0, 0), (5, 3)), ((5, 3), (1, 2))):
                ctx = backbone.pass_context(rows, starts, counts, batch=2)
                part = torch.stack([ids[row, s : s + max(counts)] for row, s in enumerate(starts)])
                hidden = backbone.run_layers(backbone.embed(part, ctx), 0, 2, ctx, cache)
        states.append((hidden[0, :1], hidden[1], *cache.states(1)))
    for mine, other in zip(*states, strict=True):
        assert close(mine.double(), other.double())


def test_the_number_of_rows_must_be_said():
    with pytest.raises(DeliberateError, match="max_rows=0") as raised:
        by_ops(family("llama", dtype=DTYPE)).new_block_cache(9)
    assert "\n" not in str(raised.value)


@cpu_only
def test_keys_and_values_in_8_bits_are_refused():
    backbone = by_ops(family("llama", dtype=torch.float64))
    with pytest.raises(DeliberateError, match="storage='int8' of a cache in blocks: the C"):
        backbone.new_block_cache(8, max_rows=1, storage="int8")
    with pytest.raises(DeliberateError, match="kv_storage='int8' with a fused executor that reads"):
        backbone.new_int8_cache(8)
