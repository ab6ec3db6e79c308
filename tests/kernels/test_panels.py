"""Products with bfloat16 and int8 matrices in panels of 16 rows."""

from __future__ import annotations

import pytest
import torch
from helpers.other_processors import PROCESSORS, built_for, multiplied
from helpers.quantised import random_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.kernels import native_build
from deliberate.kernels.blocks import BlockFormat, BlockPart, BlockWeight
from deliberate.kernels.border import BorderError
from deliberate.kernels.panels import bfloat16_panels, int8_panels

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)
FORMATS = [BlockFormat.BF16_PANELS, BlockFormat.INT8_PANELS]
panels = pytest.mark.parametrize("chosen", FORMATS, ids=lambda one: one.name)


def close(product, weight: BlockWeight, x) -> bool:
    """Whether a product is that of float64 with activations rounded to bfloat16, up to the rounding
    of sums in float32."""
    wide, x = weight.widen().double().T, x.bfloat16().double()
    return bool(((product - x @ wide).abs() <= 2e-6 * (x.abs() @ wide.abs()) + 1e-30).all())


@pytest.mark.parametrize("n, k", [(1, 1), (16, 4), (33, 7), (48, 64), (5, 6)])
def test_a_matrix_is_widened_to_what_it_was_made_of(n, k):
    weight = torch.randn(n, k)
    assert torch.equal(bfloat16_panels(weight).widen(), weight.bfloat16().float())
    whole = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scale = torch.rand(n)
    made = int8_panels(whole, scale)
    assert torch.equal(made.widen(), whole.float() * scale[:, None])
    assert torch.equal(made.widen([n - 1, 0]), made.widen()[[n - 1, 0]])
    assert made.nbytes == n * (-(-k // 4) * 4 + 4)


def test_int8_that_has_no_size_in_seven_bits_is_refused():
    with pytest.raises(BorderError, match="in int8 is -128: it must be from -127"):
        int8_panels(torch.full((2, 3), -128, dtype=torch.int8), torch.ones(2))


@panels
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 150), k=st.integers(1, 300), rows=st.integers(1, 40), seed=st.integers(0, 999)
)
def test_a_product_is_that_of_float64_with_rounded_activations(chosen, n, k, rows, seed):
    weight = random_blocks(n, k, chosen, seed=seed)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    assert close(weight.multiply(x), weight, x)


@panels
@pytest.mark.parametrize("n", [37, 128])
def test_a_row_of_activations_gets_the_same_bits_whatever_is_beside_it(chosen, n):
    weight = random_blocks(n, 102, chosen)
    x = torch.randn(70, weight.columns)
    together = weight.multiply(x)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 18, 19, 33):
        assert torch.equal(weight.multiply(x[-rows:].contiguous()), together[-rows:])
    assert torch.equal(weight.multiply(x, threads=3), together)


@panels
@pytest.mark.parametrize("size", [1e-30, 1e28])
def test_small_and_large_activations_are_multiplied_as_others_are(chosen, size):
    weight = random_blocks(40, 102, chosen)
    # Powers of two and numbers of few bits: products and their sums stay away from the borders.
    x = torch.randn(13, weight.columns).bfloat16().float()
    factor = 2.0 ** torch.tensor(size).log2().round().item()
    for rows in (1, 3, 13):
        plain = weight.multiply(x[:rows].contiguous())
        assert torch.equal(weight.multiply(x[:rows] * factor), plain * factor)


@panels
def test_parts_lie_one_below_the_other_and_have_one_bias(chosen):
    made = [random_blocks(n, 50, chosen, seed=n) for n in (20, 1, 64)]
    bias, x = torch.randn(85), torch.randn(3, 50)
    weight = BlockWeight(tuple(one.parts[0] for one in made), 50, bias)
    apart = torch.cat([one.multiply(x) for one in made], dim=1)
    if chosen is BlockFormat.BF16_PANELS:
        assert torch.equal(weight.multiply(x), apart + bias)
    assert torch.allclose(weight.multiply(x), apart + bias, rtol=1e-5, atol=1e-5)
    assert torch.equal(weight.widen(), torch.cat([one.widen() for one in made]))


@panels
def test_a_row_that_is_not_finite_harms_no_other(chosen):
    weight, x = random_blocks(40, 70, chosen), torch.randn(5, 70)
    before = weight.multiply(x)
    x[1, 40], x[3, 69] = float("nan"), float("inf")
    after = weight.multiply(x)
    assert after[1].isnan().all() and not after[3].isfinite().any()
    assert torch.equal(after[[0, 2, 4]], before[[0, 2, 4]])


@panels
def test_rows_in_pairs_are_refused(chosen):
    data = random_blocks(8, 6, chosen).parts[0].data
    with pytest.raises(BorderError, match="rotary dimension"):
        BlockWeight((BlockPart(data, chosen, 4),), 6)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_processors_without_bfloat16_products_multiply_the_same_numbers(processor, tmp_path):
    library = built_for(processor, tmp_path)
    for chosen in FORMATS:
        for n, k, rows in ((1, 3, 1), (69, 70, 7), (128, 66, 3), (80, 33, 25)):
            weight, x = random_blocks(n, k, chosen, seed=n), torch.randn(rows, k)
            out, wide = multiplied(library, weight, x)
            assert torch.equal(wide, weight.widen())
            assert close(out, weight, x)
