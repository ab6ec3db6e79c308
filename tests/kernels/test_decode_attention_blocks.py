"""Attention over block tables: to the bit what it is over rows, wherever the blocks lie."""

from __future__ import annotations

import math
import random

import kernel_cases as cases
import pytest
import torch
from torch import Tensor

from deliberate.kernels.ops.decode_attention import decode_attention, decode_attention_triton
from deliberate.utils.errors import DeliberateError

CAPACITY = 150
LENGTHS = [0, 1, 63, 64, 65, CAPACITY]
# An entry that no pass may use: it is far outside every pool.
WRONG = 1 << 30


def in_blocks(
    rows: Tensor, lengths: list[int], size: int, window: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(pool, table) of rows ``[B, kv, capacity, hd]``: blocks in any order, laid out as
    `BlockPools` does, ``[kv, slots, hd]`` seen as ``[blocks, kv, size, hd]``.

    What no row holds is NaN, and entries that no pass needs are `WRONG`.
    """
    batch, kv, capacity, hd = rows.shape
    width = -(-capacity // size)
    numbers = list(range(batch * width + 3))
    random.Random(seed).shuffle(numbers)
    pool = rows.new_full((kv, len(numbers) * size, hd), math.nan)
    table = torch.full((batch, width), WRONG, dtype=torch.int32)
    for row, length in enumerate(lengths):
        behind = max(0, length - window) // size if window else 0
        for i in range(behind, -(-length // size)):
            block = numbers.pop()
            table[row, i] = block
            end = min(length, (i + 1) * size)
            pool[:, block * size : block * size + end - i * size] = rows[row, :, i * size : end]
    return pool.view(kv, -1, size, hd).transpose(0, 1), table.to(rows.device)


def problem(draw: cases.Draw, heads: int, kv: int, hd: int) -> tuple[Tensor, Tensor, Tensor]:
    query = draw.normal(len(LENGTHS), heads, hd, scale=2.0)
    return query, *(draw.normal(len(LENGTHS), kv, CAPACITY, hd) for _ in range(2))  # type: ignore


def assert_same(backend: str, out: Tensor, expected: Tensor) -> None:
    """To the bit by the kernel; torch's attention may add up gathered keys in another order."""
    if backend == "triton":
        assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))
    else:
        cases.assert_close("out", expected, out, cases.RATIO[out.dtype])


@cases.backends
@cases.dtypes
@pytest.mark.parametrize("size", [16, 5, 64], ids=["16", "odd", "64"])
@pytest.mark.parametrize(("heads", "kv", "hd"), [(4, 2, 16), (3, 3, 10)], ids=["grouped", "each"])
@pytest.mark.parametrize("window", [0, 20])
def test_blocks_give_what_rows_give_to_the_bit(backend, dtype, size, heads, kv, hd, window):
    query, *caches = problem(cases.Draw(hd, dtype), heads, kv, hd)
    sizes = cases.integers(*LENGTHS)
    (keys, table), (values, _) = (in_blocks(one, LENGTHS, size, window) for one in caches)
    expected, out = torch.full_like(query, math.nan), torch.full_like(query, math.nan)
    with cases.running(backend):
        decode_attention(query, *caches, sizes, hd**-0.5, expected, window)
        decode_attention(query, keys, values, sizes, hd**-0.5, out, window, table=table)
    assert bool(out.isfinite().all())
    assert_same(backend, out, expected)


@pytest.mark.skipif(not cases.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("splits", [1, 3])
def test_where_blocks_lie_changes_nothing_however_they_are_split(splits):
    query, *caches = problem(cases.Draw(1), 4, 2, 16)
    sizes = cases.integers(*LENGTHS)
    results = []
    with cases.running("triton"):
        for seed in range(3):
            (keys, table), (values, _) = (in_blocks(one, LENGTHS, 16, 0, seed) for one in caches)
            results.append(torch.full_like(query, math.nan))
            decode_attention_triton(
                query, keys, values, sizes, 0.25, results[-1], 0, None, None, 1, table, splits
            )
    assert bool(results[0].isfinite().all())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@cases.backends
def test_rows_that_share_blocks_read_the_same_memory(backend):
    """Two rows with the same first 32 tokens, and one of another beginning."""
    draw = cases.Draw(2)
    query = draw.normal(3, 4, 16, scale=2.0)
    pools = [draw.normal(6, 2, 16, 16) for _ in range(2)]
    table = cases.integers(3, 1, 4, 3, 1, 0, 5, 2, WRONG).view(3, 3)
    lengths = cases.integers(40, 33, 30)
    out, expected = torch.empty_like(query), torch.empty_like(query)
    rows = [one[table.clamp(max=5).long()].transpose(1, 2).reshape(3, 2, 48, 16) for one in pools]
    with cases.running(backend):
        decode_attention(query, *pools, lengths, 0.25, out, table=table)
        decode_attention(query, *rows, lengths, 0.25, expected)
    assert_same(backend, out, expected)


@cases.backends
@cases.active
def test_inactive_rows_keep_what_they_held_and_their_tables_are_not_read(backend, active):
    rows, count, chosen = cases.listed(active)
    lengths = [3, 70, 12, 1, 40]
    draw = cases.Draw(3)
    query = draw.normal(5, 4, 16, scale=2.0)
    caches = [draw.normal(5, 2, CAPACITY, 16) for _ in range(2)]
    (keys, table), (values, _) = (in_blocks(one, lengths, 16) for one in caches)
    for row in set(range(5)) - set(chosen):
        table[row] = WRONG
    out, expected = torch.full_like(query, math.nan), torch.full_like(query, math.nan)
    with cases.running(backend):
        sizes = cases.integers(*lengths)
        decode_attention(query, keys, values, sizes, 0.25, out, 0, rows, count, table=table)
        decode_attention(query, *caches, sizes, 0.25, expected, 0, rows, count)
    assert_same(backend, out, expected)
    assert bool(out[chosen].isfinite().all())


@cases.backends
def test_several_tokens_of_a_sequence_see_their_own_lengths_of_one_table_row(backend):
    """A causal pass over three tokens of two sequences, the second one padded."""
    draw = cases.Draw(7)
    query = draw.normal(6, 4, 16, scale=2.0)
    caches = [draw.normal(2, 2, CAPACITY, 16) for _ in range(2)]
    (keys, table), (values, _) = (in_blocks(one, [70, 10], 16) for one in caches)
    sizes = cases.integers(68, 69, 70, 9, 10, 11)
    rows, count = cases.integers(0, 1, 2, 3, 4, 5), cases.integers(5)
    out, expected = torch.full_like(query, math.nan), torch.full_like(query, math.nan)
    with cases.running(backend):
        decode_attention(query, keys, values, sizes, 0.25, out, 0, rows, count, 3, table)
        decode_attention(query, *caches, sizes, 0.25, expected, 0, rows, count, 3)
    assert_same(backend, out[:5], expected[:5])
    assert bool(out[:5].isfinite().all())
    assert bool(out[5].isnan().all())


def test_tables_that_do_not_fit_are_one_line_errors():
    query, pool = torch.zeros(2, 4, 8), torch.zeros(7, 2, 16, 8)
    lengths, out = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 4, 8)
    whole = torch.zeros(2, 3, dtype=torch.int32)
    for table, match in (
        (whole.long(), "int32"),
        (whole[0], "table"),
        (torch.zeros(3, 3, dtype=torch.int32), r"with a table \(3, 3\)"),
        (torch.zeros(3, 2, dtype=torch.int32).t(), "contiguous"),
    ):
        with pytest.raises(DeliberateError, match=match) as raised:
            decode_attention(query, pool, pool, lengths, 1.0, out, table=table)
        assert "\n" not in str(raised.value)


@cases.backends
def test_is_a_torch_operator_that_compiles_without_a_break(backend):
    draw = cases.Draw(6)
    query = draw.normal(2, 4, 16)
    keys, values = (draw.normal(6, 2, 16, 16) for _ in range(2))
    sizes, table = cases.integers(9, 30), cases.integers(3, 0, 5, 1).view(2, 2)

    def step(q: Tensor) -> Tensor:
        out = torch.empty_like(q)
        decode_attention(q, keys, values, sizes, 0.25, out, table=table)
        return out * 2.0

    with cases.running(backend):
        given = (query, keys, values, sizes, 0.25, torch.zeros_like(query), 0, None, None, 1, table)
        torch.library.opcheck(decode_attention, given)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(query), step(query))
