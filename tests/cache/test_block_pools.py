"""Pools of blocks take the memory of the blocks in use, however many they may come to hold."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.cache.block_pools import BlockPools
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec

STATM = Path("/proc/self/statm")
BLOCK = 16


def resident() -> int:
    """Pages of this process that are backed by memory."""
    return int(STATM.read_text().split()[1])


@pytest.mark.skipif(not STATM.is_file(), reason="needs Linux's count of resident pages")
def test_a_pool_for_very_many_blocks_takes_the_memory_of_those_written():
    pools, like = BlockPools(4, BLOCK), torch.empty(1, 4, 0, 64)
    page, before = 4096, resident()
    for layer in range(4):
        pools.require(layer, like, like)
        pools.fit(layer, 100, 50_000)
        for pool in pools.of(layer):
            assert pool.shape[1] == 50_001 * BLOCK  # 6.5 GB in all
            pool[:, BLOCK : 101 * BLOCK] = 1.0
    written = 4 * 2 * 4 * 101 * BLOCK * 64 * 4
    assert pools.nbytes == written
    assert (resident() - before) * page < 1.1 * written + (1 << 21)


def test_a_pool_stays_where_it_is_while_blocks_come_into_use():
    pools, like = BlockPools(1, BLOCK), torch.empty(1, 2, 0, 8)
    pools.require(0, like, like)
    pools.fit(0, 1, 300)
    first, made = pools.of(0)[0].data_ptr(), pools.generation
    for blocks in range(2, 301, 7):
        pools.fit(0, blocks, 300)
    assert pools.of(0)[0].data_ptr() == first and pools.generation == made
    assert bool((pools.of(0)[0][:, :BLOCK] == 0).all())


def test_32_running_requests_of_unequal_lengths_take_little_more_than_their_tokens():
    model = AdaptiveModel(tiny_model("llama", dtype=torch.float32), [1])
    backbone = model.backbone_for(2)
    cache = backbone.new_block_cache(2_000, block_size=BLOCK, max_rows=32)
    engine = model.engine(max_running=32, cache=cache)
    source = random.Random(0)
    prompts: dict[int, int] = {}
    for _ in range(48):
        prompt = [source.randrange(VOCAB) for _ in range(source.randint(3, 90))]
        spec = DecodingSpec(fidelity="dense")
        request = Request(prompt, source.randint(2, 40), spec=spec, end_tokens=())
        prompts[engine.add(request)] = len(prompt)
    allocator, most_tokens, most_blocks = cache.tables.allocators[0], 0, 0
    while engine.unfinished:
        engine.step()
        rows = cache.tables.open_rows
        tokens = sum(cache.length(0, row) for row in rows)
        assert allocator.used * BLOCK <= 1.1 * tokens + len(rows) * BLOCK
        most_tokens = max(most_tokens, tokens)
        # Those of finished requests are kept for later ones with the same beginning.
        most_blocks = max(most_blocks, allocator.used + allocator.cached)
    held = [part for layer in range(4) for part in cache.pools.of(layer)]
    per_block = BLOCK * sum(pool.shape[0] * pool.shape[2] * 4 for pool in held)
    assert most_tokens > 32 * 30
    # The first block is nobody's; in a step, each row may take one that is free after it.
    assert cache.bytes_allocated <= per_block * (1 + most_blocks + 32)
