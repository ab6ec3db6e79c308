"""A cache in blocks gives what caches of each sequence's own give, by transformers' modules."""

from __future__ import annotations

import pytest
import torch
from fused_cases import close
from row_cases import Comparison, arbitrary_life
from tiny_models import VOCAB, random_ids, tiny_model

from deliberate.cache.block_cache import BlockCache
from deliberate.cache.kv_cache import OutOfBlocks, SegmentCache
from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError

ARCHITECTURES = ["llama", "qwen2, windows", "mistral", "gemma2", "gpt2"]


def backbone_of(name: str) -> Backbone:
    if name == "qwen2, windows":
        windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
        return Backbone(tiny_model("qwen2", layers=4, **windows))
    return Backbone(tiny_model(name, layers=4))


def comparison(name: str, blocks: int = 400, block_size: int = 4) -> Comparison:
    backbone = backbone_of(name)
    return Comparison(backbone, backbone.new_block_cache(blocks, block_size=block_size), close)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_rows_that_come_and_go_get_what_they_get_alone(name):
    for seed in range(3):
        arbitrary_life(comparison(name), seed)


@torch.inference_mode()
def test_eight_rows_share_a_beginning_and_run_only_what_follows_it():
    made = comparison("llama")
    prompt = random_ids(22)[0].tolist()
    first = made.open(prompt)
    made.new({first: 22}, last=2)
    held = made.cache.tables.allocators[0].used
    for _ in range(7):
        row = made.open(prompt)
        # 22 tokens in blocks of 4, and one is always run.
        assert made.cache.row_lengths(row) == [20] * 4
    assert made.cache.tables.allocators[0].used == held
    made.new(dict.fromkeys(range(1, 8), 2), last=2)
    assert made.cache.tables.allocators[0].used == held + 7
    made.new(dict.fromkeys(range(8), 5), last=2)
    made.check_states()


@torch.inference_mode()
def test_rows_that_diverge_from_a_fork_do_not_disturb_each_other():
    made = comparison("llama")
    row = made.open(random_ids(6)[0].tolist())
    made.new({row: 6}, last=2)
    forks = [made.fork(row) for _ in range(3)]
    for _ in range(3):
        made.new(dict.fromkeys([row, *forks], 1))
        made.deepen(1, [row])
        made.deepen(2, [row])
    made.deepen(1, forks)
    made.deepen(2, forks)
    made.check_states()


@torch.inference_mode()
def test_a_rollback_across_a_block_border_leaves_no_trace():
    made = comparison("qwen2, windows")
    row = made.open(random_ids(11)[0].tolist())
    made.new({row: 11}, last=2)
    made.new({row: 9}, last=1)
    made.crop(row, 11)
    made.new({row: 3}, last=2)
    made.check_states()


@torch.inference_mode()
def test_lossy_keys_serve_their_own_row_only():
    backbone = backbone_of("llama")
    block, plain = backbone.new_block_cache(50, block_size=4), SegmentCache(4)
    prompt = random_ids(9)[0].tolist()
    row = block.open_row(0, prompt)
    for cache in (block, plain):
        ctx = backbone.context(0, 5, device="cpu")
        ids = torch.tensor([prompt])
        backbone.run_layers(backbone.embed(ids[:, :5], ctx), 0, 4, ctx, cache)
        ctx = backbone.context(5, 4, device="cpu")
        hidden = backbone.run_layers(backbone.embed(ids[:, 5:], ctx), 0, 1, ctx, cache)
        backbone.fill_layers(hidden, 1, 4, ctx, cache)
    for layer in range(4):
        for mine, theirs in zip(block.states(layer, row), plain.states(layer), strict=True):
            assert close(mine, theirs)
    assert block.published_tokens(prompt) == 4
    block.skip(1, row, 9)
    assert block.row_lengths(row) == [9] * 4


@torch.inference_mode()
def test_slots_that_were_skipped_hold_zeros():
    backbone = backbone_of("llama")
    cache = backbone.new_block_cache(50, block_size=4)
    row = cache.open_row(0)
    ctx = backbone.context(0, 5, device="cpu")
    backbone.run_layers(backbone.embed(random_ids(5), ctx), 0, 4, ctx, cache)
    cache.crop(3, row)
    cache.skip(0, row, 6)
    for layer in range(4):
        for states in cache.states(layer, row):
            assert states.shape[2] == 6 and bool((states[:, :, 3:] == 0).all())
            assert bool((states[:, :, :3] != 0).any())


@torch.inference_mode()
def test_a_pass_without_blocks_is_refused_before_anything_changes():
    made = comparison("llama", blocks=5)
    row = made.open(random_ids(15)[0].tolist())
    made.new({row: 15}, last=2)
    other = made.open(random_ids(4, seed=1)[0].tolist())
    made.new({other: 3}, last=2)
    assert not made.cache.can_open(1)
    with pytest.raises(OutOfBlocks, match="close a row first"):
        made.block.run(0, 2, [row], [random_ids(3)])
    assert made.cache.row_lengths(row) == [15] * 4
    made.close(row)
    assert made.cache.can_open(16)
    made.new({other: 9}, last=2)
    made.check_states()


@torch.inference_mode()
def test_the_pools_take_little_more_than_the_tokens_that_are_held():
    backbone = backbone_of("llama")
    cache = backbone.new_block_cache(10_000, block_size=4)
    per_token = 4 * 2 * 2 * 8 * 8  # layers, keys and values, heads, dimension, bytes
    rows, tokens = [], 0
    for index in range(32):
        count = 5 + 7 * index % 90
        rows.append(cache.open_row(count))
        ids = torch.randint(VOCAB, (1, count))
        ctx = backbone.pass_context([rows[-1]], [0], [count], batch=cache.batch)
        backbone.run_layers(backbone.embed(ids, ctx), 0, 4, ctx, cache)
        tokens += count
    assert cache.bytes_allocated <= per_token * (1.1 * tokens + 4 * (len(rows) + 1))


def test_what_cannot_be_is_refused_in_one_line():
    cache = BlockCache([0, 0], 4, max_rows=1)
    for wrong in (
        lambda: cache.close_row(0),
        lambda: cache.crop(-1),
        lambda: cache.states(0, cache.open_row(3)),
    ):
        with pytest.raises(DeliberateError) as refused:
            wrong()
        assert "\n" not in str(refused.value)
    assert cache.batch == 1 and not cache.can_open(1)
    with pytest.raises(OutOfBlocks):
        cache.open_row(1)
