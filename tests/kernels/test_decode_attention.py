"""Attention of one token per sequence: each sees its own length of the cache and no more."""

from __future__ import annotations

import math

import kernel_cases as cases
import pytest
import torch
from torch import Tensor

from deliberate.kernels.ops.decode_attention import (
    decode_attention,
    decode_attention_triton,
    shares,
)
from deliberate.utils.errors import DeliberateError

CAPACITY = 150


def exact_attention(
    query: Tensor, keys: Tensor, values: Tensor, length: int, window: int = 0
) -> Tensor:
    """One row ``[heads, hd]`` in float64, head by head."""
    heads, hd = query.shape
    group = heads // keys.shape[0]
    start = max(0, length - window) if window else 0
    rows = []
    for head in range(heads):
        k = keys[head // group, start:length].double()
        v = values[head // group, start:length].double()
        rows.append(torch.softmax(k @ query[head].double() * hd**-0.5, dim=0) @ v)
    return torch.stack(rows)


def problem(
    draw: cases.Draw, lengths: list[int], heads: int, kv: int, hd: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, caches that are poisoned past each row's length, and the lengths."""
    query = draw.normal(len(lengths), heads, hd, scale=2.0)
    caches = [draw.normal(len(lengths), kv, CAPACITY, hd) for _ in range(2)]
    for row, length in enumerate(lengths):
        for cache in caches:
            cache[row, :, length:] = math.nan
    return query, caches[0], caches[1], cases.integers(*lengths)


@cases.backends
@cases.dtypes
@pytest.mark.parametrize(
    ("heads", "kv", "hd"), [(4, 2, 16), (7, 1, 24), (3, 3, 10)], ids=["grouped", "one", "each"]
)
def test_each_row_attends_over_its_own_length(
    backend: str, dtype: torch.dtype, heads: int, kv: int, hd: int
) -> None:
    lengths = [1, 63, 64, 65, CAPACITY]
    query, keys, values, sizes = problem(cases.Draw(hd, dtype), lengths, heads, kv, hd)
    out = torch.full_like(query, math.nan)
    with cases.running(backend):
        decode_attention(query, keys, values, sizes, hd**-0.5, out)
    expected = torch.stack(
        [
            exact_attention(query[row], keys[row], values[row], length)
            for row, length in enumerate(lengths)
        ]
    )
    cases.assert_close("out", expected, out, cases.RATIO[dtype])


@pytest.mark.skipif(not cases.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [0, 20])
def test_splitting_the_cached_tokens_changes_nothing(splits: int, window: int) -> None:
    lengths = [0, 1, 70, CAPACITY]
    query, keys, values, sizes = problem(cases.Draw(1), lengths, 4, 2, 16)
    out = torch.full_like(query, math.nan)
    with cases.running("triton"):
        decode_attention_triton(
            query, keys, values, sizes, 0.25, out, window, None, None, splits=splits
        )
    assert bool((out[0] == 0.0).all())
    for row in (1, 2, 3):
        expected = exact_attention(query[row], keys[row], values[row], lengths[row], window)
        cases.assert_close("out", expected, out[row], 2e-6)


@cases.backends
def test_a_window_hides_what_is_older(backend: str) -> None:
    lengths = [5, 21, 100]
    query, keys, values, sizes = problem(cases.Draw(2), lengths, 4, 2, 16)
    keys[2, :, :80], values[2, :, :80] = math.nan, math.nan
    out = torch.empty_like(query)
    with cases.running(backend):
        decode_attention(query, keys, values, sizes, 0.25, out, 20)
    for row, length in enumerate(lengths):
        expected = exact_attention(query[row], keys[row], values[row], length, 20)
        cases.assert_close("out", expected, out[row], 2e-6)


@cases.backends
@cases.active
def test_inactive_rows_keep_what_they_held(backend: str, active: str) -> None:
    rows, count, chosen = cases.listed(active)
    lengths = [3, 70, 12, 1, 40]
    query, keys, values, sizes = problem(cases.Draw(3), lengths, 4, 2, 16)
    out = torch.full_like(query, math.nan)
    with cases.running(backend):
        decode_attention(query, keys, values, sizes, 0.25, out, 0, rows, count)
    expected = torch.full_like(out, math.nan, dtype=torch.float64)
    for row in chosen:
        expected[row] = exact_attention(query[row], keys[row], values[row], lengths[row])
    cases.assert_close("out", expected, out, 2e-6)


@cases.backends
def test_several_tokens_of_a_sequence_see_their_own_lengths_of_one_row(backend: str) -> None:
    """A causal pass over three tokens of two sequences, the second one padded."""
    draw = cases.Draw(7)
    lengths = [68, 69, 70, 9, 10, 11]
    query = draw.normal(6, 4, 16, scale=2.0)
    caches = [draw.normal(2, 2, CAPACITY, 16) for _ in range(2)]
    for cache in caches:
        cache[0, :, 70:], cache[1, :, 10:] = math.nan, math.nan
    out = torch.full_like(query, math.nan)
    rows, count = cases.integers(0, 1, 2, 3, 4, 5), cases.integers(5)
    with cases.running(backend):
        sizes = cases.integers(*lengths)
        decode_attention(query, *caches, sizes, 0.25, out, 0, rows, count, tokens=3)
    for i, length in enumerate(lengths[:5]):
        expected = exact_attention(query[i], caches[0][i // 3], caches[1][i // 3], length)
        cases.assert_close("out", expected, out[i], 2e-6)
    assert bool(out[5].isnan().all())


@cases.backends
def test_caches_of_the_layout_tokens_first_are_read_in_place(backend: str) -> None:
    query, keys, values, sizes = problem(cases.Draw(4), [9, 30], 4, 2, 16)
    tokens_first = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (keys, values)]
    out = torch.empty_like(query)
    with cases.running(backend):
        decode_attention(query, *tokens_first, sizes, 0.25, out)
    cases.assert_close("out", exact_attention(query[1], keys[1], values[1], 30), out[1], 2e-6)


@cases.backends
def test_a_row_that_is_not_finite_harms_no_other(backend: str) -> None:
    query, keys, values, sizes = problem(cases.Draw(5), [9, 30], 4, 2, 16)
    query[0, 1, 2] = math.nan
    out = torch.empty_like(query)
    with cases.running(backend):
        decode_attention(query, keys, values, sizes, 0.25, out)
    # Of such a row torch's attention makes zeros on a CPU and NaN on a GPU; the kernel makes NaN.
    assert backend == "torch" or bool(out[0, 1].isnan().all())
    cases.assert_close("out", exact_attention(query[1], keys[1], values[1], 30), out[1], 2e-6)


def test_shares_fill_the_processors_and_no_more() -> None:
    assert shares(1, 2, 4096, 132) == 32  # bounded by 128 tokens a share
    assert shares(64, 8, 4096, 132) == 1  # the batch fills the machine
    assert shares(1, 2, 64, 132) == 1
    assert shares(1, 1, 10**6, 132) == 64


def test_caches_that_do_not_fit_are_one_line_errors() -> None:
    query, cache = torch.zeros(2, 3, 8), torch.zeros(2, 2, 5, 8)
    lengths = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(DeliberateError, match="multiple of kv"):
        decode_attention(query, cache, cache.clone(), lengths, 1.0, torch.zeros_like(query))
    query = torch.zeros(2, 4, 8)
    with pytest.raises(DeliberateError, match="window -1"):
        decode_attention(query, cache, cache.clone(), lengths, 1.0, torch.zeros_like(query), -1)


@cases.backends
def test_is_a_torch_operator_that_compiles_without_a_break(backend: str) -> None:
    query, keys, values, sizes = problem(cases.Draw(6), [9, 30], 4, 2, 16)
    keys, values = keys.nan_to_num(0.0), values.nan_to_num(0.0)

    def step(q: Tensor) -> Tensor:
        out = torch.empty_like(q)
        decode_attention(q, keys, values, sizes, 0.25, out)
        return out * 2.0

    with cases.running(backend):
        arguments = (query, keys, values, sizes, 0.25, torch.zeros_like(query))
        # The reference reads the lengths on the host, which a trace cannot: the rest is checked.
        torch.library.opcheck(decode_attention, arguments)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(query), step(query))
