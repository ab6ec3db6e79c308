"""Exit gate: a probe on the normed hidden state, a threshold, and the list of who goes on.

The decision stays on the device: the kernels of the next segment take the list and its count, so
they can be launched while the flags travel to the host. A gate takes the list of the gate before,
so gates chain.

Floor: two launches; the bytes (R * d) are nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from deliberate.kernels.registry import KERNELS, KernelRequest
from deliberate.kernels.rows import active_rows, check_rows
from deliberate.kernels.triton_support import (
    active_count,
    check_launch,
    jit,
    power_of_two,
    prefers_triton,
    tl,
)
from deliberate.utils.errors import DeliberateError


class GateDecision(NamedTuple):
    """What a gate decides for the R rows of a batch; all on the device.

    ``score`` float32 ``[R]``: sigmoid of the probe; NaN for rows that were not asked.
    ``continues`` bool ``[R]``: asked, and the score did not reach the threshold (NaN goes on).
    ``rows`` int32 ``[R]``: the rows that go on, in the order asked; -1 past their number.
    ``remaining`` int32 ``[1]``: how many.
    """

    score: Tensor
    continues: Tensor
    rows: Tensor
    remaining: Tensor


def decide(
    hidden: Tensor,
    probe: Tensor,
    bias: Tensor,
    threshold: Tensor,
    *,
    gain: Tensor | None = None,
    eps: float = 1e-6,
    rows: Tensor | None = None,
    count: Tensor | None = None,
) -> GateDecision:
    """Evaluates the gate for the active rows.

    Args:
        hidden: ``[R, d]``.
        probe, bias: linear probe, ``[d]`` and ``[1]``.
        threshold: float32 ``[1]`` on the device, so that a controller changes it without a new
            capture; a row exits when score >= threshold, and +inf means never.
        gain: RMS norm gain ``[d]``, or None where hidden is normed already.
        rows, count: active rows, int32 ``[<= R]`` and ``[1]``.
    """
    return GateDecision(*exit_gate(hidden, probe, bias, threshold, gain, eps, rows, count))


def _outputs(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = hidden.shape[0]
    return (
        hidden.new_empty(total, dtype=torch.float32),
        hidden.new_empty(total, dtype=torch.bool),
        hidden.new_empty(total, dtype=torch.int32),
        hidden.new_empty(1, dtype=torch.int32),
    )


@KERNELS.define(outputs=_outputs)
def exit_gate(
    hidden: Tensor,
    probe: Tensor,
    bias: Tensor,
    threshold: Tensor,
    gain: Tensor | None,
    eps: float,
    rows: Tensor | None,
    count: Tensor | None,
) -> KernelRequest:
    """The operator behind `decide`; the fields of a `GateDecision`."""
    if hidden.dim() != 2 or probe.shape != hidden.shape[1:] or bias.numel() != 1:
        raise DeliberateError(
            f"exit_gate: hidden [R, d], probe [d] and bias [1] are needed, got "
            f"{tuple(hidden.shape)}, {tuple(probe.shape)} and {tuple(bias.shape)}"
        )
    if threshold.numel() != 1 or threshold.dtype != torch.float32:
        raise DeliberateError(
            f"exit_gate: the threshold must be one float32 on the device, got "
            f"{threshold.dtype} {tuple(threshold.shape)}"
        )
    check_rows("exit_gate", rows, count, hidden.shape[0])
    return KernelRequest.of(hidden, rows=hidden.shape[0], width=hidden.shape[1])


@KERNELS.register("exit_gate", "torch")
def exit_gate_torch(
    hidden: Tensor,
    probe: Tensor,
    bias: Tensor,
    threshold: Tensor,
    gain: Tensor | None,
    eps: float,
    rows: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference, in float32 (float64 for float64)."""
    score, continues, after, left = _outputs(hidden)
    active = active_rows(rows, count, hidden.shape[0], hidden.device)
    x = hidden[active].to(torch.promote_types(hidden.dtype, torch.float32))
    if gain is not None:
        x = x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * gain.to(x.dtype)
    requested = torch.sigmoid(linear(x, probe.to(x.dtype)[None])[:, 0] + bias.to(x.dtype)).float()
    stays = ~(requested >= threshold)
    score.fill_(torch.nan)[active] = requested
    continues.fill_(False)[active] = stays
    following = active[stays]
    after.fill_(-1)[: following.numel()] = following.int()
    left.fill_(following.numel())
    return score, continues, after, left


@jit
def _score_kernel(  # type: ignore[no-untyped-def]
    hidden,
    probe,
    bias,
    gain,
    rows,
    count,
    score,
    total,
    width,
    eps,
    HAS_GAIN: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row: norm and probe."""
    i = tl.program_id(0)
    if i < active_count(count, total, HAS_ROWS):
        row = tl.load(rows + i) if HAS_ROWS else i
        square = tl.zeros((BLOCK_K,), dtype=tl.float32)
        product = tl.zeros((BLOCK_K,), dtype=tl.float32)
        for start in range(0, width, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = tl.load(hidden + row * width + k, mask=k < width, other=0.0).to(tl.float32)
            p = tl.load(probe + k, mask=k < width, other=0.0).to(tl.float32)
            if HAS_GAIN:
                square += x * x
                x = x * tl.load(gain + k, mask=k < width, other=0.0).to(tl.float32)
            product += x * p
        logit = tl.sum(product, axis=0)
        if HAS_GAIN:
            logit = logit * tl.rsqrt(tl.sum(square, axis=0) / width + eps)
        tl.store(score + row, tl.sigmoid(logit + tl.load(bias).to(tl.float32)))


@jit
def _compact_kernel(  # type: ignore[no-untyped-def]
    score,
    threshold,
    rows,
    count,
    continues,
    after,
    left,
    total,
    listed,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: everyone's flag, and the list of who goes on in the order asked."""
    active = active_count(count, listed, HAS_ROWS)
    limit = tl.load(threshold)
    made = 0
    # The sweeps write disjoint places, so no order among threads is needed.
    if HAS_ROWS:
        for start in range(0, total, BLOCK):
            row = start + tl.arange(0, BLOCK)
            is_row = row < total
            is_evaluated = tl.zeros((BLOCK,), dtype=tl.int32)
            for j in range(0, active):
                is_evaluated = tl.where(row == tl.load(rows + j), 1, is_evaluated)
            tl.store(score + row, float("nan"), mask=is_row & (is_evaluated == 0))
            tl.store(
                continues + row,
                tl.zeros((BLOCK,), dtype=tl.int8),
                mask=is_row & (is_evaluated == 0),
            )
    for start in range(0, listed, BLOCK):
        i = start + tl.arange(0, BLOCK)
        is_active = i < active
        row = tl.load(rows + i, mask=is_active, other=0) if HAS_ROWS else i
        requested = tl.load(score + row, mask=is_active, other=0.0)
        stays = ((requested >= limit) == 0) & is_active
        tl.store(continues + row, stays.to(tl.int8), mask=is_active)
        place = made + tl.cumsum(stays.to(tl.int32), axis=0) - 1
        tl.store(after + place, row, mask=stays)
        made += tl.sum(stays.to(tl.int32), axis=0)
    for start in range(0, total, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(after + i, tl.full((BLOCK,), -1, dtype=tl.int32), mask=(i >= made) & (i < total))
    tl.store(left, made)


COMPACT_BLOCK = 1024  # rows that the list is made of at a time


@KERNELS.register("exit_gate", "triton", prefers_triton)
def exit_gate_triton(
    hidden: Tensor,
    probe: Tensor,
    bias: Tensor,
    threshold: Tensor,
    gain: Tensor | None,
    eps: float,
    rows: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two launches: scores, one program per row; then one program that compacts."""
    check_launch("exit_gate", hidden, probe, gain)
    hidden = hidden.contiguous()
    score, continues, after, left = _outputs(hidden)
    total, width = hidden.shape
    listed = total if rows is None else rows.shape[0]
    flags = continues.view(torch.int8)
    if listed > 0:
        _score_kernel[(listed,)](
            hidden, probe, bias, gain, rows, count, score, listed, width, eps,
            HAS_GAIN=gain is not None, HAS_ROWS=rows is not None,
            BLOCK_K=power_of_two(width, least=16, most=1024),
        )  # fmt: skip
    _compact_kernel[(1,)](
        score, threshold, rows, count, flags, after, left, total, listed,
        HAS_ROWS=rows is not None, BLOCK=power_of_two(total, least=16, most=COMPACT_BLOCK),
    )  # fmt: skip
    return score, continues, after, left
