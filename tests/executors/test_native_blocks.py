"""The C++ kernels through block tables give to the bit what they give through a row's buffer."""

from __future__ import annotations

import pytest
import torch
from fused_cases import FAMILIES
from row_cases import Comparison, arbitrary_life
from tiny_models import VOCAB, random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.cache.layer_groups import FREED
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec
from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.executors.fused.native_blocks import slot_runs
from deliberate.kernels import native_build
from deliberate.kernels.native_pools import SlotRun
from deliberate.utils.errors import DeliberateError

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)
ODD = {"hidden_size": 36, "intermediate_size": 51, "head_dim": 10}


def native(name: str, **overrides) -> FusedBackbone:
    architecture, settings = FAMILIES[name]
    model = tiny_model(architecture, dtype=torch.float32, **(settings | overrides))
    return FusedBackbone(model, engine="native")


def comparison(name: str, block_size: int = 4, **overrides) -> Comparison:
    backbone = native(name, **overrides)
    return Comparison(backbone, backbone.new_block_cache(400, block_size=block_size), torch.equal)


@pytest.mark.parametrize("shape", [{}, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("block_size", [4, 5, 16])
@pytest.mark.parametrize("name", ["llama", "qwen2, windows", "mistral", "qwen3"])
def test_rows_that_come_and_go_get_to_the_bit_what_they_get_alone(name, block_size, shape):
    with torch.inference_mode():
        for seed in range(4):
            arbitrary_life(comparison(name, block_size, **shape), seed, steps=40)


@torch.inference_mode()
def test_long_passes_over_scattered_blocks_give_what_one_buffer_gives():
    made = comparison("qwen2, windows", 16, max_position_embeddings=512)
    rows = [made.open([]) for _ in range(3)]
    for counts in ({0: 40, 1: 70, 2: 3}, {0: 60}, {1: 1, 2: 130}, {0: 17, 1: 90, 2: 1}):
        made.new({rows[row]: count for row, count in counts.items()}, last=2)
    assert len(made.cache.runs(0).end) == 2
    made.check_states()


@torch.inference_mode()
def test_a_shared_beginning_is_run_once_and_read_by_eight_rows():
    backbone, counted = native("llama"), []
    cache = backbone.new_block_cache(400, block_size=4)
    run = backbone._layers.layers.run
    backbone._layers.layers.run = lambda *a, **k: (counted.append(a[5]), run(*a, **k))[1]
    prompt = random_ids(33)[0].tolist()
    made = Comparison(backbone, cache, torch.equal)
    with torch.inference_mode():
        for _ in range(8):
            row = cache.open_row(64, prompt)
            held = cache.length(0, row)
            made.block.run(0, 2, [row], [torch.tensor([prompt[held:]])])
    tokens = [sum(span.count for span in spans) for spans in counted]
    assert tokens == [33] + [1] * 7
    # 33 tokens once, and one block of each row for the last token.
    assert cache.tables.allocators[0].used == 9 + 7


@torch.inference_mode()
def test_several_steps_in_one_call_read_and_write_blocks():
    backbone = native("qwen2, windows")
    steps = backbone.multi_step(None)
    how = {"steps": 21, "requested": 21, "threshold": -1.0, "stops": (), "accept_stops": False}
    ids = random_ids(6)
    plain = backbone.new_cache()
    ctx = backbone.context(0, 6, device="cpu")
    backbone.run_layers(backbone.embed(ids, ctx), 0, 4, ctx, plain)
    expected = steps.decode(None, 4, 5, 6, plain, **how)
    cache = backbone.new_block_cache(100, block_size=4)
    others = [cache.open_row(0) for _ in range(2)]
    row = cache.open_row(0)
    for one in (*others, row):
        ctx = backbone.pass_context([one], [0], [6], batch=cache.batch)
        backbone.run_layers(backbone.embed(ids, ctx), 0, 4, ctx, cache)
    made = steps.decode(None, 4, 5, 6, cache, row=row, **how)
    assert made.tokens == expected.tokens and torch.equal(made.states, expected.states)
    assert cache.row_lengths(row) == [27] * 4 and cache.row_lengths(others[0]) == [6] * 4


def test_blocks_of_rising_numbers_are_one_run():
    assert slot_runs([0, 1, 2], 4) == [SlotRun(0, 4, 12)]
    assert slot_runs([FREED, FREED, 7, 8, 3], 4) == [SlotRun(8, 32, 8), SlotRun(16, 16, 4)]
    assert slot_runs([5, 4], 4) == [SlotRun(0, 24, 4), SlotRun(4, 20, 4)]


@torch.inference_mode()
def test_what_is_filled_lossily_equals_a_row_of_its_own_and_is_never_shared():
    backbone = native("llama")
    cache, plain = backbone.new_block_cache(50, block_size=4), backbone.new_cache()
    prompt = torch.randint(VOCAB, (9,)).tolist()
    row, ids = cache.open_row(0, prompt), torch.tensor([prompt])
    for one in (cache, plain):
        ctx = backbone.context(0, 5, device="cpu")
        backbone.run_layers(backbone.embed(ids[:, :5], ctx), 0, 4, ctx, one)
        ctx = backbone.context(5, 4, device="cpu")
        hidden = backbone.run_layers(backbone.embed(ids[:, 5:], ctx), 0, 1, ctx, one)
        backbone.fill_layers(hidden, 1, 4, ctx, one)
    for layer in range(4):
        for mine, theirs in zip(cache.states(layer, row), plain.states(layer), strict=True):
            assert torch.equal(mine, theirs)
    assert cache.published_tokens(prompt) == 4


def test_other_implementations_refuse_blocks_by_name():
    backbone = FusedBackbone(tiny_model("llama", dtype=torch.float32), engine="eager")
    with pytest.raises(DeliberateError, match=r"engine=.eager"):
        backbone.new_block_cache(10)


@pytest.mark.parametrize("kv_mode", ["defer", "propagate", "skip"])
@pytest.mark.parametrize("executor", ["fused", "generic"])
def test_requests_through_blocks_get_the_tokens_that_generate_chooses(executor, kv_mode):
    model = AdaptiveModel(
        tiny_model("llama", layers=5, dtype=torch.float32), [1, 2], executor=executor
    )
    ids = random_ids(7, batch=3)
    spec = DecodingSpec(
        fidelity="exact" if kv_mode == "defer" else "threshold", thresholds=0.06, kv_mode=kv_mode
    )
    expected = model.generate(ids, spec=spec, max_new_tokens=20)[:, 7:]
    cache = model.backbone_for(2).new_block_cache(200, block_size=4, max_rows=3)
    engine = model.engine(max_running=3, cache=cache)
    numbers = [engine.add(Request(row, 20, spec=spec, end_tokens=())) for row in ids.tolist()]
    made: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.unfinished:
        for output in engine.step():
            made[output.id] += output.tokens
    assert list(made.values()) == expected.tolist()
