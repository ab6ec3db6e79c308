"""Linear layers with int8 weights: the rounding is bounded, the product of what is stored exact."""

from __future__ import annotations

import math

import kernel_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.kernels.ops.int8_linear import int8_linear, quantise
from deliberate.kernels.registry import KERNELS, KernelRequest
from deliberate.utils.errors import DeliberateError

BACKENDS = [*cases.BACKENDS]
if cases.DEVICE == "cpu":
    BACKENDS.append("torch_packed")
backends = pytest.mark.parametrize("backend", BACKENDS)


@backends
@cases.dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 123, 123), (5, 123, 123), (4, 64, 97), (1, 48, 9), (70, 33, 17)], ids=str
)
def test_equals_the_product_with_the_stored_weights(
    backend: str, dtype: torch.dtype, bias: bool, shape: tuple[int, int, int]
) -> None:
    rows, width, outputs = shape
    draw = cases.Draw(rows, dtype)
    x = draw.normal(rows, width)
    weight, scale = quantise(draw.normal(outputs, width))
    added = draw.normal(outputs) if bias else None
    expected = x.double() @ (weight.double() * scale.double()[:, None]).T
    if added is not None:
        expected = expected + added.double()
    with cases.running(backend):
        out = int8_linear(x, weight, scale, added)
    assert out.dtype == dtype
    rounded = torch.bfloat16 if backend == "torch_packed" else dtype
    cases.assert_close("out", expected, out, cases.RATIO[rounded])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_an_element_is_off_by_at_most_half_a_step_of_its_row(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 7, generator=generator) * size
    stored, scale = quantise(weight)
    off = (stored.double() * scale.double()[:, None] - weight.double()).abs()
    assert bool((off <= 0.5 * scale.double()[:, None] * (1 + 1e-5)).all())
    assert stored.abs().amax(dim=1).tolist() == [127] * 4


def test_a_row_of_zeros_stays_zero() -> None:
    stored, scale = quantise(torch.zeros(2, 3))
    assert stored.count_nonzero() == 0
    assert scale.tolist() == [1.0, 1.0]


@backends
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_harms_no_other(backend: str, bad: float) -> None:
    draw = cases.Draw(1)
    x = draw.normal(3, 64)
    weight, scale = quantise(draw.normal(32, 64))
    x[1, 4] = bad
    with cases.running(backend):
        out = int8_linear(x, weight, scale)
    assert not bool(out[1].isfinite().any())
    assert bool(out[[0, 2]].isfinite().all())


@cases.backends
def test_no_rows_give_no_rows(backend: str) -> None:
    weight, scale = quantise(cases.Draw(2).normal(6, 8))
    with cases.running(backend):
        assert int8_linear(torch.zeros(0, 8, device=cases.DEVICE), weight, scale).shape == (0, 6)


def test_on_a_cpu_the_packed_kernel_is_chosen_where_it_is_safe() -> None:
    def chosen(dtype: torch.dtype, width: int = 64) -> str:
        shape = {"rows": 1, "width": width, "outputs": 8}
        return KERNELS.chosen("int8_linear", KernelRequest("cpu", dtype, shape)).backend

    assert chosen(torch.bfloat16) == chosen(torch.float32) == "torch_packed"
    assert chosen(torch.float64) == "torch"
    assert chosen(torch.float32, width=40) == "torch"  # torch's kernel would read past the row


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_a_one_line_error(bad: float) -> None:
    with pytest.raises(DeliberateError, match="NaN or infinity"):
        quantise(torch.tensor([[1.0, bad]]))


def test_weights_that_are_not_int8_are_a_one_line_error() -> None:
    with pytest.raises(DeliberateError, match="int8"):
        int8_linear(torch.zeros(1, 4), torch.zeros(3, 4), torch.ones(3))


@backends
def test_is_a_torch_operator_that_compiles_without_a_break(backend: str) -> None:
    draw = cases.Draw(3)
    x = draw.normal(2, 64)
    weight, scale = quantise(draw.normal(32, 64))
    with cases.running(backend):
        torch.library.opcheck(int8_linear, (x, weight, scale))
        compiled = torch.compile(
            lambda x: int8_linear(x, weight, scale) * 2.0, fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(compiled(x), int8_linear(x, weight, scale) * 2.0)
