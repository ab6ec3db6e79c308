"""The exit gate decides on the device who goes on, and hands the list to the next segment."""

from __future__ import annotations

import math

import kernel_cases as cases
import pytest
import torch
from torch import Tensor

from deliberate.kernels.ops.exit_gate import decide, exit_gate
from deliberate.utils.errors import DeliberateError


def exact_scores(hidden: Tensor, probe: Tensor, bias: Tensor, gain: Tensor | None) -> Tensor:
    """Probability of the probe in float64."""
    x = hidden.double()
    if gain is not None:
        x = x / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * gain.double()
    return torch.sigmoid(x @ probe.double() + bias.double())


def number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float32, device=cases.DEVICE)


@cases.backends
@cases.dtypes
@pytest.mark.parametrize("shape", [(1, 123), (5, 123), (33, 40)], ids=str)
@pytest.mark.parametrize("normed", [True, False])
def test_scores_and_splits_the_batch_at_the_threshold(
    backend: str, dtype: torch.dtype, shape: tuple[int, int], normed: bool
) -> None:
    rows, width = shape
    draw = cases.Draw(rows, dtype)
    hidden, probe = draw.normal(rows, width), draw.normal(width, scale=2 * width**-0.5)
    gain = None if normed else draw.gain(width)
    bias = draw.normal(1)
    with cases.running(backend):
        made = decide(hidden, probe, bias, number(0.5), gain=gain)
    cases.assert_close(
        "score", exact_scores(hidden, probe, bias, gain), made.score, cases.RATIO[dtype]
    )
    stays = made.score < 0.5
    assert torch.equal(made.continues, stays)
    following = stays.nonzero()[:, 0].tolist()
    assert int(made.remaining) == len(following)
    assert made.rows.tolist() == following + [-1] * (rows - len(following))


@cases.backends
@cases.active
def test_only_listed_rows_are_asked_and_the_order_is_kept(backend: str, active: str) -> None:
    draw = cases.Draw(1)
    rows, count, chosen = cases.listed(active)
    hidden, probe, bias = draw.normal(5, 30), draw.normal(30), number(0.0)
    scores = exact_scores(hidden, probe, bias, None)
    with cases.running(backend):
        made = decide(hidden, probe, bias, number(0.5), rows=rows, count=count)
    following = [row for row in chosen if float(scores[row]) < 0.5]
    assert made.rows.tolist() == following + [-1] * (5 - len(following))
    assert int(made.remaining) == len(following)
    assert made.continues.nonzero()[:, 0].tolist() == sorted(following)
    assert (~made.score.isnan()).nonzero()[:, 0].tolist() == sorted(chosen)


@cases.backends
def test_gates_chain_on_the_device(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deliberate.kernels.ops.exit_gate.COMPACT_BLOCK", 16)
    draw = cases.Draw(2)
    hidden, probe, bias = draw.normal(40, 30), draw.normal(30, scale=0.3), number(0.0)
    scores = exact_scores(hidden, probe, bias, None)
    with cases.running(backend):
        first = decide(hidden, probe, bias, number(0.8))
        second = decide(hidden, probe, bias, number(0.4), rows=first.rows, count=first.remaining)
    expected = (scores < 0.4).nonzero()[:, 0].tolist()
    assert second.rows[: int(second.remaining)].tolist() == expected
    assert int(first.remaining) > int(second.remaining) > 0


@cases.backends
@pytest.mark.parametrize(("threshold", "going"), [(math.inf, 5), (0.0, 0), (math.nan, 5)])
def test_thresholds_at_the_ends_keep_everyone_or_no_one(
    backend: str, threshold: float, going: int
) -> None:
    draw = cases.Draw(3)
    with cases.running(backend):
        made = decide(draw.normal(5, 30), draw.normal(30), number(0.0), number(threshold))
    assert int(made.remaining) == going == int(made.continues.sum())


@cases.backends
def test_a_score_equal_to_the_threshold_leaves(backend: str) -> None:
    hidden = torch.zeros(3, 8, device=cases.DEVICE)
    with cases.running(backend):
        made = decide(hidden, torch.ones(8, device=cases.DEVICE), number(0.0), number(0.5))
    assert int(made.remaining) == 0


@cases.backends
def test_a_row_that_is_not_finite_goes_on(backend: str) -> None:
    draw = cases.Draw(4)
    hidden = draw.normal(4, 30)
    hidden[2, 3] = math.nan
    with cases.running(backend):
        made = decide(
            hidden, draw.normal(30), number(0.0), number(0.0), gain=draw.gain(30), eps=1e-6
        )
    assert made.rows.tolist() == [2, -1, -1, -1]


def test_a_threshold_of_another_dtype_is_a_one_line_error() -> None:
    with pytest.raises(DeliberateError, match="float32"):
        decide(torch.zeros(2, 4), torch.zeros(4), torch.zeros(1), torch.zeros(1).double())


@cases.backends
def test_is_a_torch_operator_that_compiles_without_a_break(backend: str) -> None:
    draw = cases.Draw(5)
    hidden, probe = draw.normal(3, 32), draw.normal(32)
    with cases.running(backend):
        arguments = (hidden, probe, number(0.0), number(0.5), None, 0.0, None, None)
        torch.library.opcheck(exit_gate, arguments)
        compiled = torch.compile(
            lambda x: decide(x, probe, number(0.0), number(0.5)).rows,
            fullgraph=True,
            backend="aot_eager",
        )
        assert torch.equal(compiled(hidden), decide(hidden, probe, number(0.0), number(0.5)).rows)
