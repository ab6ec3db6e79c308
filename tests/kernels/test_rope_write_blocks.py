"""Keys and values written through a block table: to the bit those of a row, and nothing else."""

from __future__ import annotations

import math

import kernel_cases as cases
import pytest
import torch

from deliberate.kernels.ops.rope_write import rope_write
from deliberate.utils.errors import DeliberateError

SIZE, WIDTH, KV, HEADS, HD = 4, 5, 2, 6, 10
# An entry that no pass may use: it is far outside every pool.
WRONG = 1 << 30


def call(draw: cases.Draw, total: int) -> dict:
    angle = torch.rand(SIZE * WIDTH, HD // 2, generator=draw.generator) * 6.0
    angle = torch.cat((angle, angle), dim=1).to(draw.dtype).to(cases.DEVICE)
    return {
        "qkv": draw.normal(total, (HEADS + 2 * KV) * HD),
        "bias": draw.normal((HEADS + 2 * KV) * HD),
        "query_gain": draw.gain(HD),
        "key_gain": draw.gain(HD),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "eps": 1e-6,
    }


def written(given: dict, positions, table, tokens: int = 1, **listed):
    """(queries, keys, values) of pools that held NaN, laid out as those of `BlockPools`."""
    dtype, device = given["qkv"].dtype, given["qkv"].device
    total = len(positions)
    if table is None:
        shape = (total // tokens, KV, SIZE * WIDTH, HD)
        caches = [torch.full(shape, math.nan, dtype=dtype, device=device) for _ in range(2)]
    else:
        shape = (KV, 20 * SIZE, HD)
        caches = [
            torch.full(shape, math.nan, dtype=dtype, device=device)
            .view(KV, -1, SIZE, HD)
            .transpose(0, 1)
            for _ in range(2)
        ]
    query = torch.full((total, HEADS, HD), math.nan, dtype=dtype, device=device)
    rope_write(
        **given, positions=positions, key_cache=caches[0], value_cache=caches[1], query=query,
        tokens=tokens, table=table, **listed,
    )  # fmt: skip
    return query, *caches


@cases.backends
@cases.dtypes
def test_tokens_go_to_the_slots_that_the_table_names_and_nowhere_else(backend, dtype):
    given = call(cases.Draw(1, dtype), 4)
    at = [3, 0, 17, 8]
    table = torch.full((4, WIDTH), WRONG, dtype=torch.int32)
    for row, (position, block) in enumerate(zip(at, (19, 0, 7, 3), strict=True)):
        table[row, position // SIZE] = block
    table = table.to(cases.DEVICE)
    positions = cases.integers(*at)
    with cases.running(backend):
        expected = written(given, positions, None)
        found = written(given, positions, table)
    assert torch.equal(found[0], expected[0])
    for pool, rows in zip(found[1:], expected[1:], strict=True):
        for row, position in enumerate(at):
            block = int(table[row, position // SIZE])
            own = pool[block, :, position % SIZE]
            assert bool(own.isfinite().all()) and torch.equal(own, rows[row, :, position])
        assert int(pool.isfinite().sum()) == 4 * KV * HD


@cases.backends
def test_several_tokens_of_a_sequence_cross_from_one_block_to_another(backend):
    given = call(cases.Draw(2), 6)
    table = torch.full((2, WIDTH), WRONG, dtype=torch.int32)
    table[0, :2], table[1, 4] = torch.tensor([11, 5]), 2
    positions = cases.integers(2, 3, 4, 17, 18, 19)
    rows, count = cases.integers(0, 1, 2, 3, 4, 5), cases.integers(5)
    with cases.running(backend):
        expected = written(given, positions, None, 3, rows=rows, count=count)
        found = written(given, positions, table.to(cases.DEVICE), 3, rows=rows, count=count)
    for pool, held in zip(found[1:], expected[1:], strict=True):
        for row, position, block in ((0, 2, 11), (0, 3, 11), (0, 4, 5), (1, 17, 2), (1, 18, 2)):
            assert torch.equal(pool[block, :, position % SIZE], held[row, :, position])
        assert int(pool.isfinite().sum()) == 5 * KV * HD
    assert bool(found[0][5].isnan().all())


@cases.backends
def test_a_token_without_a_block_or_past_the_table_is_not_written(backend):
    given = call(cases.Draw(3), 3)
    table = torch.tensor([[1, 2, 3, 4, 5], [6, -1, 7, 8, 9], [0, 0, 0, 0, 0]], dtype=torch.int32)
    positions = cases.integers(1, 5, SIZE * WIDTH)
    with cases.running(backend):
        query, *pools = written(given, positions, table.to(cases.DEVICE))
    assert bool(query[:2].isfinite().all())
    for pool in pools:
        assert int(pool.isfinite().sum()) == KV * HD and bool(pool[1, :, 1].isfinite().all())


def test_tables_that_do_not_fit_are_one_line_errors():
    given = call(cases.Draw(4), 2)
    for table, match in (
        (torch.zeros(2, WIDTH), "int32"),
        (torch.zeros(3, WIDTH, dtype=torch.int32), r"a table \(3, 5\)"),
    ):
        with pytest.raises(DeliberateError, match=match) as raised:
            written(given, cases.integers(0, 1), table.to(cases.DEVICE))
        assert "\n" not in str(raised.value)
