"""The feed-forward block of the active rows: gathered, multiplied, added where they lie."""

from __future__ import annotations

import math

import kernel_cases as cases
import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from deliberate.kernels.ops.skip_mlp import second_tile, skip_mlp
from deliberate.utils.errors import DeliberateError


def exact_mlp(normed: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (normed.double() @ gate_up.double().T).chunk(2, dim=1)
    return (silu(gate) * up) @ down.double().T


def weights(draw: cases.Draw, width: int, inner: int) -> tuple[Tensor, Tensor]:
    gate_up = draw.normal(2 * inner, width, scale=width**-0.5)
    return gate_up, draw.normal(width, inner, scale=inner**-0.5)


@cases.backends
@cases.dtypes
@pytest.mark.parametrize(
    "shape", [(1, 123, 123), (5, 123, 123), (2, 64, 70), (70, 40, 33)], ids=str
)
def test_adds_the_block_to_every_row(
    backend: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    rows, width, inner = shape
    draw = cases.Draw(rows, dtype)
    residual, normed = draw.normal(rows, width), draw.normal(rows, width)
    gate_up, down = weights(draw, width, inner)
    expected = residual.double() + exact_mlp(normed, gate_up, down)
    with cases.running(backend):
        skip_mlp(residual, normed, gate_up, down)
    cases.assert_close("residual", expected, residual, cases.RATIO[dtype])


@cases.backends
@cases.active
def test_inactive_rows_are_neither_read_nor_written(backend: str, active: str) -> None:
    draw = cases.Draw(1)
    rows, count, chosen = cases.listed(active)
    residual, normed = draw.normal(5, 48), draw.normal(5, 48)
    gate_up, down = weights(draw, 48, 80)
    normed[[row for row in range(5) if row not in chosen]] = math.nan
    before = residual.clone()
    expected = before.double()
    expected[chosen] += exact_mlp(normed[chosen], gate_up, down)
    with cases.running(backend):
        skip_mlp(residual, normed, gate_up, down, rows, count)
    cases.assert_close("residual", expected, residual, 1e-6)
    untouched = [row for row in range(5) if row not in chosen]
    assert torch.equal(residual[untouched], before[untouched])


@cases.backends
@pytest.mark.parametrize("processors", [1, 132])
def test_a_split_sum_gives_the_same(
    backend: str, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deliberate.kernels.ops.skip_mlp.processors", lambda device: processors)
    draw = cases.Draw(2)
    residual, normed = draw.normal(5, 40), draw.normal(5, 40)
    gate_up, down = weights(draw, 40, 1100)
    assert (second_tile(5, 40, 1100, processors)[1] > 1) == (processors > 1)
    expected = residual.double() + exact_mlp(normed, gate_up, down)
    rows, count = cases.integers(4, 1, 2, 0, 3), cases.integers(5)
    with cases.running(backend):
        skip_mlp(residual, normed, gate_up, down, rows, count)
    cases.assert_close("residual", expected, residual, 1e-6)


@cases.backends
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_harms_no_other(backend: str, bad: float) -> None:
    draw = cases.Draw(3)
    residual, normed = draw.normal(3, 48), draw.normal(3, 48)
    gate_up, down = weights(draw, 48, 80)
    normed[1, 5] = bad
    expected = residual.double() + exact_mlp(normed, gate_up, down)
    with cases.running(backend):
        skip_mlp(residual, normed, gate_up, down)
    assert bool(residual[1].isnan().any())
    cases.assert_close("the others", expected[[0, 2]], residual[[0, 2]], 1e-6)


def test_weights_of_another_width_are_a_one_line_error() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(DeliberateError, match="gate_up"):
        skip_mlp(x, x.clone(), torch.zeros(6, 5), torch.zeros(4, 3))


@cases.backends
def test_is_a_torch_operator_that_compiles_without_a_break(backend: str) -> None:
    draw = cases.Draw(4)
    residual, normed = draw.normal(3, 32), draw.normal(3, 32)
    gate_up, down = weights(draw, 32, 48)

    def step(x: Tensor) -> Tensor:
        residual = x.clone()
        skip_mlp(residual, normed, gate_up, down)
        return residual * 2.0

    with cases.running(backend):
        torch.library.opcheck(skip_mlp, (residual.clone(), normed, gate_up, down))
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(residual), step(residual))
