"""Residual add and norm touch the active rows and nothing else."""

from __future__ import annotations

import math

import kernel_cases as cases
import pytest
import torch

from deliberate.kernels.ops.add_rmsnorm import add_rmsnorm
from deliberate.utils.errors import DeliberateError

EPS = 1e-5


def exact_norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(dim=1, keepdim=True) + EPS).sqrt() * gain.double()


@cases.backends
@cases.dtypes
@pytest.mark.parametrize("shape", [(1, 123), (5, 123), (3, 2049)], ids=str)
@pytest.mark.parametrize("adds", [True, False])
def test_adds_and_norms_in_place(
    backend: str, dtype: torch.dtype, shape: tuple[int, int], adds: bool
) -> None:
    draw = cases.Draw(shape[1], dtype)
    residual, gain = draw.normal(*shape, scale=3.0), draw.gain(shape[1])
    addition = draw.normal(*shape) if adds else None
    expected = residual.double() + (0.0 if addition is None else addition.double())
    normed = torch.full_like(residual, math.nan)
    with cases.running(backend):
        add_rmsnorm(residual, addition, gain, EPS, normed)
    cases.assert_close("residual", expected, residual, cases.RATIO[dtype])
    cases.assert_close("normed", exact_norm(expected, gain), normed, cases.RATIO[dtype])


@cases.backends
@cases.active
def test_inactive_rows_keep_what_they_held(backend: str, active: str) -> None:
    draw = cases.Draw(1)
    rows, count, chosen = cases.listed(active)
    residual, addition, gain = draw.normal(5, 37), draw.normal(5, 37), draw.gain(37)
    before, normed = residual.clone(), torch.full_like(residual, math.nan)
    with cases.running(backend):
        add_rmsnorm(residual, addition, gain, EPS, normed, rows, count)
    after = before.clone()
    after[chosen] += addition[chosen]
    cases.assert_close("residual", after, residual, 1e-6)
    assert torch.equal(residual[after == before], before[after == before])
    poisoned = torch.full_like(residual, math.nan).double()
    poisoned[chosen] = exact_norm(after[chosen], gain)
    cases.assert_close("normed", poisoned, normed, 1e-6)


@cases.backends
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_harms_no_other(backend: str, bad: float) -> None:
    draw = cases.Draw(2)
    residual, gain = draw.normal(3, 37), draw.gain(37)
    residual[1, 4] = bad
    expected = exact_norm(residual, gain)
    normed = torch.empty_like(residual)
    with cases.running(backend):
        add_rmsnorm(residual, None, gain, EPS, normed)
    cases.assert_close("normed", expected, normed, 1e-6)
    assert bool(normed[1].isnan().any())


@cases.backends
def test_the_addition_may_be_a_slice_of_something_wider(backend: str) -> None:
    draw = cases.Draw(3)
    wide, residual, gain = draw.normal(3, 80), draw.normal(3, 37), draw.gain(37)
    expected = residual + wide[:, 5:42]
    normed = torch.empty_like(residual)
    with cases.running(backend):
        add_rmsnorm(residual, wide[:, 5:42], gain, EPS, normed)
    cases.assert_close("residual", expected, residual, 1e-6)


def test_half_a_list_of_rows_is_a_one_line_error() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(DeliberateError, match="rows and count together"):
        add_rmsnorm(x, None, torch.ones(4), EPS, x.clone(), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(DeliberateError, match="int32"):
        add_rmsnorm(x, None, torch.ones(4), EPS, x.clone(), torch.zeros(2), torch.zeros(1))


@cases.backends
def test_is_a_torch_operator_that_compiles_without_a_break(backend: str) -> None:
    draw = cases.Draw(4)
    residual, addition, gain = draw.normal(3, 32), draw.normal(3, 32), draw.gain(32)

    def step(x: torch.Tensor) -> torch.Tensor:
        residual, normed = x.clone(), torch.empty_like(x)
        add_rmsnorm(residual, addition, gain, EPS, normed)
        return normed + residual

    with cases.running(backend):
        arguments = (residual.clone(), addition, gain, EPS, torch.zeros_like(residual))
        torch.library.opcheck(add_rmsnorm, arguments)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(residual), step(residual))
