from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.cache.attention_metadata import ContextBuilder
from deliberate.cache.kv_cache import MIN_CAPACITY, OutOfBlocks, SegmentCache
from deliberate.utils.errors import DeliberateError

LAYERS, HEADS, DIM = 3, 2, 4

appends = st.tuples(st.integers(0, LAYERS - 1), st.integers(1, 90))
crops = st.tuples(st.just("crop"), st.integers(0, 200))


def tokens(count: int, generator: torch.Generator, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, HEADS, count, DIM, generator=generator, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(operations=st.lists(st.one_of(appends, crops), max_size=15), capacity=st.integers(0, 130))
def test_any_appends_and_crops_equal_concatenation(operations, capacity):
    generator = torch.Generator().manual_seed(0)
    cache = SegmentCache(LAYERS, capacity, batch=2)
    expected = [(tokens(0, generator), tokens(0, generator)) for _ in range(LAYERS)]
    for what, number in operations:
        if what == "crop":
            cache.crop(number)
            expected = [(k[:, :, :number], v[:, :, :number]) for k, v in expected]
        else:
            new = tokens(number, generator), tokens(number, generator)
            expected[what] = tuple(
                torch.cat([old, more], dim=2) for old, more in zip(expected[what], new, strict=True)
            )
            returned = cache.update(*new, what)
            assert all(torch.equal(a, b) for a, b in zip(returned, expected[what], strict=True))
        assert cache.lengths == [k.shape[2] for k, _ in expected]
    for layer, (keys, values) in enumerate(expected):
        assert cache.length(layer) == cache.get_seq_length(layer) == keys.shape[2]
        if keys.shape[2]:
            held_keys, held_values = cache.states(layer)
            assert torch.equal(held_keys, keys)
            assert torch.equal(held_values, values)


@given(lengths=st.lists(st.integers(0, 3), min_size=LAYERS, max_size=LAYERS))
def test_check_accepts_exactly_lengths_that_do_not_grow_with_depth(lengths):
    generator = torch.Generator().manual_seed(0)
    cache = SegmentCache(LAYERS, batch=2)
    for layer, length in enumerate(lengths):
        if length:
            cache.update(tokens(length, generator), tokens(length, generator), layer)
    if lengths == sorted(lengths, reverse=True):
        cache.check()
    else:
        with pytest.raises(RuntimeError, match="more than"):
            cache.check()


def test_appending_within_capacity_does_not_move_or_allocate():
    generator = torch.Generator().manual_seed(0)
    cache = SegmentCache(1, capacity=100, batch=2)
    first, _ = cache.update(tokens(1, generator), tokens(1, generator), 0)
    allocated = cache.bytes_allocated
    assert allocated == 2 * 2 * HEADS * 100 * DIM * 8  # keys and values, batch 2, 8 bytes
    for _ in range(99):
        keys, _ = cache.update(tokens(1, generator), tokens(1, generator), 0)
        assert keys.data_ptr() == first.data_ptr()
    assert cache.bytes_allocated == allocated
    cache.update(tokens(1, generator), tokens(1, generator), 0)
    assert cache.bytes_allocated == 2 * allocated


def test_a_layer_takes_its_dtype_from_its_first_update_and_untouched_layers_take_no_memory():
    cache = SegmentCache(2)
    states = torch.ones(1, HEADS, 3, DIM, dtype=torch.bfloat16)
    keys, _ = cache.update(states, states, 0)
    assert keys.dtype == torch.bfloat16
    assert cache.bytes_allocated == 2 * HEADS * MIN_CAPACITY * DIM * 2


def test_update_in_inference_mode_after_growth_keeps_earlier_views():
    with torch.inference_mode():
        cache = SegmentCache(1)
        ones = torch.ones(1, HEADS, MIN_CAPACITY, DIM)
        early, _ = cache.update(ones, ones, 0)
        cache.update(2 * ones, 2 * ones, 0)
        assert torch.equal(early, ones)


@pytest.mark.parametrize(
    "misuse",
    [
        lambda: SegmentCache(0),
        lambda: SegmentCache(2, capacity=-1),
        lambda: SegmentCache(2).crop(-1),
        lambda: SegmentCache(2).states(1),
    ],
)
def test_misuse_is_a_one_line_error(misuse):
    with pytest.raises(DeliberateError) as caught:
        misuse()
    assert "\n" not in str(caught.value)


def _ragged(rows, starts, counts, batch):
    builder = ContextBuilder(torch.nn.Embedding(3, 4).double(), None, rope_follows_length=False,
                             eager=False, window=None, learned_positions=None)  # fmt: skip
    return builder.ragged(rows, starts, counts, batch=batch, device="cpu")


def test_rows_of_different_lengths_keep_their_own_keys_through_growth_crop_and_removal():
    generator = torch.Generator().manual_seed(0)
    cache = SegmentCache(1, batch=3)
    held = [torch.zeros(HEADS, 0, DIM, dtype=torch.float64) for _ in range(3)]
    for rows, starts, counts in (
        ([0, 1, 2], [0, 0, 0], [5, 60, 2]),
        ([0, 2], [5, 2], [1, 1]),
        ([1], [60], [30]),  # grows the buffer, which one row only fills
    ):
        ctx = _ragged(rows, starts, counts, 3)
        cache.begin(ctx, 0, 1)
        new = tokens(max(counts), generator, batch=len(rows))
        keys, values = cache.update(new, -new, 0)
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            held[row] = torch.cat([held[row], new[index, :, :count]], dim=1)
            assert torch.equal(keys[index, :, : held[row].shape[1]], held[row])
        assert torch.equal(values, -keys) and keys.shape[2] == ctx.keys
        assert bool(torch.isfinite(keys).all())
    assert [cache.length(0, row) for row in range(3)] == [6, 90, 3]
    assert cache.states(0)[0].shape[2] == 90
    cache.crop(4)
    assert [cache.length(0, row) for row in range(3)] == [4, 4, 3]
    cache.keep([2, 1])
    for index, row in enumerate((2, 1)):
        assert torch.equal(cache.states(0, index)[0][0], held[row][:, : cache.length(0, index)])
    cache.crop(3)
    new = tokens(1, generator, batch=2)
    keys, _ = cache.update(new, new, 0)  # all rows alike again: no pass is announced
    assert keys.shape == (2, HEADS, 4, DIM) and torch.equal(keys[:, :, 3:], new)
    with pytest.raises(RuntimeError, match="position 3 of row 0"):
        cache.begin(_ragged([0], [3], [1], 2), 0, 1)


def test_a_buffer_starts_at_its_capacity_and_doubles():
    generator = torch.Generator().manual_seed(0)
    cache = SegmentCache(1, 100, batch=2)
    row = 2 * HEADS * DIM * 8 * 2  # bytes of one token: keys and values of two rows
    for count, expected in ((1, 100), (99, 100), (1, 200), (250, 400)):
        new = tokens(count, generator)
        cache.update(new, new, 0)
        assert cache.bytes_allocated == expected * row


def test_rows_are_opened_and_closed_and_their_numbers_used_again():
    cache = SegmentCache(2, batch=2)
    first, second = cache.open_row(10), cache.open_row(10, [1, 2])
    assert {first, second} == {0, 1} and cache.free_blocks == 0 and not cache.can_open(1)
    with pytest.raises(OutOfBlocks, match="close one first"):
        cache.open_row(1)
    cache.skip(0, first, 5)
    cache.close_row(first)
    assert cache.row_lengths(first) == [0, 0] and cache.can_open(1)
    with pytest.raises(DeliberateError, match="not open"):
        cache.close_row(first)
    assert cache.open_row(3) == first
