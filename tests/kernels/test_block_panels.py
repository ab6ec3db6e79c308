"""Blocks laid out in panels of 16 rows: the same weights in another place."""

from __future__ import annotations

import pytest
import torch
from helpers.quantised import LAID_OUT, random_part
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.kernels import native_build
from deliberate.kernels.block_panels import in_panels
from deliberate.kernels.blocks import BlockFormat, BlockPart, BlockWeight
from deliberate.kernels.border import BorderError

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)
SMALL = list(LAID_OUT.values())


@given(
    chosen=st.sampled_from(SMALL),
    heads=st.integers(1, 9),
    rotary=st.sampled_from([0, 2, 8, 24]),
    k=st.integers(1, 200),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_every_weight_is_kept_to_the_bit_in_the_order_of_outputs(chosen, heads, rotary, k, seed):
    part = random_part(heads * (rotary or 7), k, chosen, seed=seed, rotary=rotary)
    before, after = BlockWeight((part,), k), BlockWeight((in_panels(part),), k)
    assert after.parts[0].format in LAID_OUT and after.parts[0].rotary == 0
    wide = before.widen()
    assert torch.equal(after.widen(), wide)
    assert torch.equal(after.widen([before.rows - 1, 0]), wide[[-1, 0]])


@pytest.mark.parametrize("chosen", SMALL)
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 6, 7, 12, 40])
def test_a_product_is_that_of_the_blocks_but_for_the_order_of_its_sum(chosen, rows):
    part, x = random_part(130, 576, chosen), torch.randn(rows, 576)
    before, after = BlockWeight((part,), 576), BlockWeight((in_panels(part),), 576)
    assert torch.allclose(after.multiply(x), before.multiply(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("chosen", [BlockFormat.Q4_K, BlockFormat.Q6_K])
def test_formats_without_panels_stay_as_they_are(chosen):
    part = random_part(20, 256, chosen)
    assert in_panels(part) is part


@pytest.mark.parametrize("chosen", LAID_OUT)
def test_rows_in_pairs_are_refused_in_panels(chosen):
    data = in_panels(random_part(16, 32, LAID_OUT[chosen])).data
    with pytest.raises(BorderError, match="rotary dimension"):
        BlockWeight((BlockPart(data, chosen, 4),), 32)
