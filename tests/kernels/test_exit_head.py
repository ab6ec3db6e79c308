"""The exit head reads two tokens and the scores of every measure without writing logits."""

from __future__ import annotations

import math

import kernel_cases as cases
import pytest
import torch
from torch import Tensor

from deliberate.kernels.ops.exit_head import (
    HeadReading,
    exit_head,
    exit_head_torch,
    normalised_certainty,
    read_head,
    top_margin,
    top_probability,
)
from deliberate.utils.errors import DeliberateError


def exact_logits(
    hidden: Tensor, weight: Tensor, gain: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Norm and head in float64, written out."""
    x = hidden.double()
    if gain is not None:
        x = x / (x.square().mean(dim=1, keepdim=True) + eps).sqrt() * gain.double()
    return x @ weight.double().T


def assert_reads(reading: HeadReading, logits: Tensor, ratio: float) -> None:
    """The reading is that of these float64 logits; near ties may fall either way."""
    best = logits.topk(2, dim=1).values
    # A token is right when its exact logit is within rounding of the exact best.
    margin = 4 * ratio * float(logits.abs().max())
    chosen = logits.gather(1, reading.tokens)
    assert bool((chosen[:, 0] >= best[:, 0] - margin).all())
    assert bool((chosen[:, 1] >= best[:, 1] - margin).all())
    assert bool((reading.tokens[:, 0] != reading.tokens[:, 1]).all())
    cases.assert_close("values", best, reading.values, ratio)
    cases.assert_close("normaliser", logits.logsumexp(dim=1), reading.normaliser, ratio)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    # Entropy moves with the logits themselves, not with their ratio to its own size.
    assert float((reading.entropy.double() - entropy).abs().max()) <= margin * 4


@cases.backends
@cases.dtypes
@pytest.mark.parametrize(
    "shape", [(1, 123, 123), (5, 123, 123), (1, 96, 257), (17, 40, 70), (3, 200, 2)], ids=str
)
def test_reads_what_float64_logits_say(
    backend: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    rows, width, vocab = shape
    draw = cases.Draw(rows, dtype)
    hidden, gain = draw.normal(rows, width, scale=3.0), draw.gain(width)
    weight = draw.normal(vocab, width, scale=2 * width**-0.5)
    with cases.running(backend):
        reading = read_head(hidden, weight, gain=gain)
    assert_reads(reading, exact_logits(hidden, weight, gain), cases.RATIO[dtype])


@cases.backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3])
def test_huge_states_do_not_overflow_before_the_norm(
    backend: str, dtype: torch.dtype, rows: int
) -> None:
    draw = cases.Draw(11, dtype)
    hidden, gain = draw.normal(rows, 64, scale=9000.0), draw.gain(64) * 8
    weight = draw.normal(50, 64, scale=0.1)
    with cases.running(backend):
        reading = read_head(hidden, weight, gain=gain)
    assert_reads(reading, exact_logits(hidden, weight, gain), cases.RATIO[dtype])


@cases.backends
def test_scores_are_those_of_the_functions_on_logits(backend: str) -> None:
    draw = cases.Draw(1)
    hidden, weight = draw.normal(4, 64), draw.normal(101, 64, scale=0.3)
    logits = exact_logits(hidden, weight)
    with cases.running(backend):
        reading = read_head(hidden, weight)
    for scored, (token, score) in (
        (reading.probability(), top_probability(logits)),
        (reading.margin(), top_margin(logits)),
        (reading.certainty(101), normalised_certainty(logits)),
    ):
        assert torch.equal(reading.tokens[:, 0], token)
        cases.assert_close("score", score, scored, 1e-5)


@cases.backends
@pytest.mark.parametrize("rows", [1, 3])
def test_a_trimmed_vocabulary_reads_only_its_rows_and_answers_in_token_ids(
    backend: str, rows: int
) -> None:
    draw = cases.Draw(2)
    hidden, weight = draw.normal(rows, 48), draw.normal(90, 48)
    kept = torch.tensor([80, 3, 41, 7, 66], device=cases.DEVICE)
    poisoned = torch.full_like(weight, math.nan)
    poisoned[kept] = weight[kept]
    with cases.running(backend):
        reading = read_head(hidden, poisoned, vocabulary=kept)
    logits = exact_logits(hidden, weight[kept])
    assert torch.equal(reading.tokens, kept[logits.topk(2, dim=1).indices])
    cases.assert_close("normaliser", logits.logsumexp(dim=1), reading.normaliser, 1e-5)


@cases.backends
@pytest.mark.parametrize("rows", [1, 3])
def test_softcap_bounds_the_logits_smoothly(backend: str, rows: int) -> None:
    draw = cases.Draw(3)
    hidden, weight = draw.normal(rows, 48, scale=9.0), draw.normal(90, 48)
    with cases.running(backend):
        reading = read_head(hidden, weight, softcap=5.0)
    assert_reads(reading, torch.tanh(exact_logits(hidden, weight) / 5.0) * 5.0, 1e-5)


@cases.backends
def test_a_low_rank_translator_is_applied_between_norm_and_head(backend: str) -> None:
    draw = cases.Draw(4)
    hidden, gain, weight = draw.normal(3, 48), draw.gain(48), draw.normal(90, 48, scale=0.3)
    down, up = draw.normal(6, 48, scale=0.2), draw.normal(48, 6, scale=0.2)
    matrix = torch.eye(48, device=cases.DEVICE).double() + up.double() @ down.double()
    with cases.running(backend):
        reading = read_head(hidden, weight, gain=gain, down=down, up=up)
    assert_reads(reading, exact_logits(hidden, weight.double() @ matrix, gain), 1e-5)


@cases.backends
@cases.active
def test_only_active_rows_are_read_in_the_order_listed(backend: str, active: str) -> None:
    draw = cases.Draw(5)
    rows, count, chosen = cases.listed(active)
    hidden, weight = draw.normal(5, 48), draw.normal(90, 48)
    left_out = [row for row in range(5) if row not in chosen]
    hidden[left_out] = math.nan
    with cases.running(backend):
        reading = read_head(hidden, weight, rows=rows, count=count)
    n = len(chosen)
    if n:
        done = HeadReading(*(part[:n] for part in reading))
        assert_reads(done, exact_logits(hidden[chosen], weight), 1e-5)
    assert bool((reading.tokens[n:] == 0).all())
    for part in reading[1:]:
        assert bool(part[n:].isnan().all())


@cases.backends
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_that_is_not_finite_never_leaves_and_harms_no_other(
    backend: str, bad: float, rows: int
) -> None:
    draw = cases.Draw(6)
    hidden, gain, weight = draw.normal(rows, 48), draw.gain(48), draw.normal(90, 48)
    hidden[-1, 7] = bad
    with cases.running(backend):
        reading = read_head(hidden, weight, gain=gain)
    assert reading.tokens[-1].tolist() == [0, 0]
    assert not bool(reading.probability()[-1] >= 0.0)
    for part in reading[1:]:
        assert bool(part[-1].isnan().all())
        assert bool(part[:-1].isfinite().all())


@cases.backends
@pytest.mark.parametrize("rows", [1, 2])
def test_tokens_ruled_out_by_minus_infinity_take_no_mass(backend: str, rows: int) -> None:
    hidden = torch.ones(rows, 16, device=cases.DEVICE)
    weight = torch.full((70, 16), -math.inf, device=cases.DEVICE)
    weight[[20, 69]] = torch.tensor([[0.1], [0.2]], device=cases.DEVICE)
    with cases.running(backend):
        reading = read_head(hidden, weight)
    assert reading.tokens.tolist() == [[69, 20]] * rows
    kept = torch.tensor([[1.6, 3.2]], dtype=torch.float64).expand(rows, 2)
    cases.assert_close("normaliser", kept.logsumexp(dim=1), reading.normaliser, 1e-6)
    entropy = torch.distributions.Categorical(logits=kept).entropy()
    cases.assert_close("entropy", entropy, reading.entropy, 1e-5)


@cases.backends
def test_a_vocabulary_of_many_blocks_is_combined_in_chunks(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deliberate.kernels.ops.exit_head_triton.COMBINE_CHUNK", 16)
    draw = cases.Draw(12)
    for seed_row in range(4):  # the best two fall into other chunks each time
        hidden, weight = draw.normal(1, 16, scale=2.0), draw.normal(1250 + seed_row, 16)
        with cases.running(backend):
            reading = read_head(hidden, weight)
        assert_reads(reading, exact_logits(hidden, weight), 1e-5)


@cases.backends
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("places", [(5, 9), (5, 80), (64, 80), (0, 1249), (520, 1040)], ids=str)
def test_of_equal_tokens_the_first_listed_is_best(
    backend: str, rows: int, places: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deliberate.kernels.ops.exit_head_triton.COMBINE_CHUNK", 16)
    hidden = torch.ones(rows, 16, device=cases.DEVICE)
    weight = torch.zeros(1250, 16, device=cases.DEVICE)
    weight[list(places)] = 0.5
    with cases.running(backend):
        reading = read_head(hidden, weight)
    assert reading.tokens.tolist() == [list(places)] * rows
    assert reading.margin().tolist() == [0.0] * rows


@cases.backends
def test_of_equal_seconds_the_first_listed_is_second(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deliberate.kernels.ops.exit_head_triton.COMBINE_CHUNK", 16)
    hidden = torch.ones(1, 16, device=cases.DEVICE)
    for best in (5, 1030, 1249):
        weight = torch.zeros(1250, 16, device=cases.DEVICE)
        weight[[4, 1040]] = 0.5
        weight[best] = 0.75
        with cases.running(backend):
            assert read_head(hidden, weight).tokens.tolist() == [[best, 4]]


@cases.backends
def test_with_all_tokens_equal_the_first_two_are_chosen(backend: str) -> None:
    hidden = torch.zeros(1, 16, device=cases.DEVICE)
    weight = torch.ones(90, 16, device=cases.DEVICE)
    with cases.running(backend):
        reading = read_head(hidden, weight)
    assert reading.tokens.tolist() == [[0, 1]]
    assert float(reading.entropy) == pytest.approx(math.log(90), rel=1e-6)


@cases.backends
def test_no_rows_give_an_empty_reading(backend: str) -> None:
    draw = cases.Draw(7)
    with cases.running(backend):
        reading = read_head(draw.normal(0, 16), draw.normal(9, 16))
    assert [tuple(part.shape) for part in reading] == [(0, 2), (0, 2), (0,), (0,)]


def test_the_reference_keeps_float64() -> None:
    draw = cases.Draw(8, torch.float64)
    hidden, weight = draw.normal(2, 32), draw.normal(20, 32)
    tokens, _, normaliser, _ = exit_head_torch(
        hidden, weight, None, 0.0, None, None, None, 0.0, None, None
    )
    logits = exact_logits(hidden, weight)
    assert torch.equal(tokens, logits.topk(2, dim=1).indices)
    cases.assert_close("normaliser", logits.logsumexp(dim=1), normaliser, 1e-7)


@pytest.mark.parametrize(
    ("hidden", "weight", "message"),
    [((2, 8), (9, 7), "hidden"), ((2, 8), (1, 8), "at least 2"), ((8,), (9, 8), "hidden")],
)
def test_shapes_that_do_not_fit_are_one_line_errors(
    hidden: tuple[int, ...], weight: tuple[int, ...], message: str
) -> None:
    with pytest.raises(DeliberateError, match=message):
        read_head(torch.zeros(hidden), torch.zeros(weight))


@cases.backends
def test_is_a_torch_operator_that_compiles_without_a_break(backend: str) -> None:
    draw = cases.Draw(9)
    hidden, gain, weight = draw.normal(3, 32), draw.gain(32), draw.normal(50, 32)
    with cases.running(backend):
        arguments = (hidden, weight, gain, 1e-6, None, None, None, 0.0, None, None)
        torch.library.opcheck(exit_head, arguments)
        compiled = torch.compile(
            lambda x: read_head(x, weight, gain=gain).probability(),
            fullgraph=True,
            backend="aot_eager",
        )
        expected = read_head(hidden, weight, gain=gain).probability()
        assert torch.equal(compiled(hidden), expected)
