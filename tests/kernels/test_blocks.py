"""Products with matrices in GGUF's blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.other_processors import PROCESSORS, built_for, multiplied
from helpers.quantised import LAID_OUT, random_blocks, random_part, rounded
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.kernels import native_build
from deliberate.kernels.blocks import FILE_FORMATS, BlockFormat, BlockPart, BlockWeight

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)
FORMATS = [*FILE_FORMATS, *LAID_OUT]


def close(product, weight: BlockWeight, x, bias=0.0) -> bool:
    """Whether a product is that of float64 with the same rounded activations, to a millionth of
    what the largest weight of a row would make; scale and minimum alone make up to about 1."""
    wide, x = weight.widen().double().T, rounded(x)
    most = (
        x.abs().sum(-1, keepdim=True) * wide.abs().amax(0).clamp(min=1.0)
        + torch.as_tensor(bias).abs()
    )
    return bool(((product - (x @ wide + bias)).abs() <= 1e-6 * most).all())


@pytest.mark.parametrize("chosen", FILE_FORMATS)
def test_widened_weights_are_bit_for_bit_those_of_the_package_gguf(chosen):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    for n, blocks in ((1, 1), (5, 3), (3, 9)):
        weight = random_blocks(n, blocks * chosen.weights, chosen, seed=n)
        theirs = gguf.dequantize(
            weight.parts[0].data.numpy(), gguf.GGMLQuantizationType(int(chosen))
        )
        assert np.array_equal(weight.widen().numpy(), theirs)
        assert np.array_equal(weight.widen([n - 1, 0]).numpy(), theirs[[n - 1, 0]])


@given(
    chosen=st.sampled_from(FORMATS),
    n=st.integers(1, 40),
    k=st.integers(1, 1100),
    rows=st.integers(1, 20),
    seed=st.integers(0, 999),
)
@settings(max_examples=120, deadline=None)
def test_a_product_is_that_of_float64_with_rounded_activations(chosen, n, k, rows, seed):
    weight = random_blocks(n, k, chosen, seed=seed)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    assert close(weight.multiply(x), weight, x)


@pytest.mark.parametrize("chosen", FORMATS)
def test_a_row_of_activations_gets_the_same_bits_whatever_is_beside_it(chosen):
    # Columns for whole steps and a part of one, see block_formats.h.
    weight = random_blocks(37, 672 if chosen.weights == 32 else 512, chosen)
    x = torch.randn(70, weight.columns)
    together = weight.multiply(x)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33):
        assert torch.equal(weight.multiply(x[-rows:].contiguous()), together[-rows:])
    assert torch.equal(weight.multiply(x, threads=2), together)
    if chosen.in_panels:
        return
    one = BlockPart(weight.parts[0].data[11:12].contiguous(), chosen)
    assert torch.equal(BlockWeight((one,), weight.columns).multiply(x)[:, 0], together[:, 11])


def test_parts_of_other_formats_lie_one_below_the_other_and_have_one_bias():
    parts = tuple(
        random_part(n, 256, chosen) for n, chosen in zip((6, 1, 9, 4, 3), FILE_FORMATS, strict=True)
    )
    bias = torch.randn(23)
    weight, x = BlockWeight(parts, 256, bias), torch.randn(3, 256)
    assert close(weight.multiply(x), weight, x, bias)
    alone = [BlockWeight((part,), 256) for part in parts]
    assert torch.equal(weight.widen(), torch.cat([one.widen() for one in alone]))
    apart = torch.cat([one.multiply(x) for one in alone], dim=1)
    assert torch.equal(weight.multiply(x), apart + bias)


@pytest.mark.parametrize("n", [8, 16, 40])
def test_rows_in_pairs_come_out_in_the_order_of_transformers(n):
    pairs = random_part(n, 64, BlockFormat.Q4_1, rotary=8)
    plain = BlockWeight((BlockPart(pairs.data, pairs.format),), 64)
    paired, x = BlockWeight((pairs,), 64), torch.randn(3, 64)
    # As transformers' reader turns the rows of queries and keys around.
    order = torch.arange(n).view(n // 8, 4, 2).transpose(1, 2).reshape(n)
    assert torch.equal(paired.multiply(x), plain.multiply(x)[:, order])
    assert torch.equal(paired.widen(), plain.widen()[order])


@pytest.mark.parametrize("chosen", FORMATS)
def test_a_row_that_is_not_finite_is_nan_and_harms_no_other(chosen):
    weight = random_blocks(9, 256, chosen)
    x = torch.randn(5, 256)
    before = weight.multiply(x)
    x[1, 40], x[3, 255] = float("nan"), float("inf")
    after = weight.multiply(x)
    assert after[[1, 3]].isnan().all()
    assert torch.equal(after[[0, 2, 4]], before[[0, 2, 4]])


@pytest.mark.parametrize("chosen", FORMATS)
def test_zeros_tiny_and_huge_activations_are_multiplied(chosen):
    weight = random_blocks(9, 256, chosen)
    x = torch.randn(4, 256) * torch.tensor([0.0, 1e-28, 1e30, 1e-38])[:, None]
    product = weight.multiply(x)
    assert not product[0].any() and not product[3].any()
    assert close(product[1:2], weight, x[1:2]) and close(product[2:3], weight, x[2:3])


@pytest.mark.parametrize("processor", PROCESSORS)
def test_processors_without_wide_instructions_multiply_the_same_numbers(processor, tmp_path):
    library = built_for(processor, tmp_path)
    for chosen in FORMATS:
        for n, k, rows in ((1, 32, 1), (13, 288, 6), (9, 512, 3), (21, 77, 4)):
            weight, x = random_blocks(n, k, chosen, seed=n), torch.randn(rows, k)
            out, wide = multiplied(library, weight, x)
            assert torch.equal(wide, weight.widen())
            assert close(out, weight, x)
