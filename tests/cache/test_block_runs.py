"""A row's blocks follow one another where that costs no memory; others may get those set aside."""

from __future__ import annotations

import random

import pytest

from deliberate.cache.block_allocator import AHEAD, BlockAllocator
from deliberate.cache.block_tables import BlockTables
from deliberate.cache.kv_cache import OutOfBlocks
from deliberate.cache.layer_groups import LayerGroup
from deliberate.executors.fused.native_blocks import slot_runs

BLOCK = 16
ONE = (LayerGroup((0,)),)


def grow(tables: BlockTables, row: int, tokens: int) -> None:
    start = tables.lengths(row)[0]
    tables.prepare(row, start, start + tokens, 0, 1)
    tables.advance(row, start + tokens, 0, 1)


def runs(tables: BlockTables, row: int) -> int:
    return len(slot_runs(tables.table(row, 0), BLOCK))


def test_rows_that_grow_in_turn_keep_their_blocks_together_within_the_memory_of_their_tokens():
    source = random.Random(0)
    tables = BlockTables(ONE, BLOCK, 4_000)
    allocator, found, blocks = tables.allocators[0], 0, 0
    lengths = {tables.open(): source.randint(200, 600) for _ in range(32)}
    for row in lengths:
        grow(tables, row, source.randint(20, 180))
    most = 0
    for _ in range(1_500):
        for row, length in list(lengths.items()):
            if tables.lengths(row)[0] < length:
                grow(tables, row, 1)
                continue
            found, blocks = found + runs(tables, row), blocks + len(tables.table(row, 0))
            tables.close(row)
            del lengths[row]
            new = tables.open()
            lengths[new] = source.randint(200, 600)
            grow(tables, new, source.randint(20, 180))
        tokens = sum(tables.lengths(row)[0] for row in lengths)
        most = max(most, tokens)
        assert allocator.peak * BLOCK <= 1.1 * most + len(lengths) * BLOCK
    tables.check()
    # A block for itself each time would be nearly as many runs as blocks.
    assert found < blocks / 4


def test_others_get_blocks_that_are_set_aside_before_any_row_is_refused():
    tables = BlockTables(ONE, BLOCK, 24)
    first = tables.open()
    grow(tables, first, 16 * BLOCK)
    tables.crop(first, BLOCK)
    grow(tables, first, BLOCK)  # one block, and as many set aside as follow it
    second = tables.open()
    grow(tables, second, 22 * BLOCK)
    tables.check()
    assert tables.allocators[0].free == 0
    with pytest.raises(OutOfBlocks, match="close a row first"):
        tables.prepare(first, 2 * BLOCK, 3 * BLOCK, 0, 1)
    tables.close(second)
    grow(tables, first, 22 * BLOCK)
    tables.check()


def test_blocks_set_aside_are_free_for_others_once_their_row_is_closed():
    allocator = BlockAllocator(40)
    for block in allocator.take(30, owner=1):
        allocator.release(block)
    allocator.give_up(1)
    allocator.take(1, owner=2)
    assert allocator.take(1, owner=3) == [1 + AHEAD]
    allocator.give_up(2)
    assert set(allocator.take(38, owner=4)) == {*range(40)} - {0, 1 + AHEAD}
    assert allocator.free == 0
    allocator.check()
