"""Residual add and RMS norm of the active rows: what stands between every two products of a block.

Root mean square norm: Zhang and Sennrich, 2019 (arXiv:1910.07467).

Floor: 4 * R * d * itemsize bytes (read residual and addition, write residual and normed) over the
bandwidth of the memory; one launch.
"""

import torch
from torch import Tensor

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


@KERNELS.define(writes=("residual", "normed"))
def add_rmsnorm(
    residual: Tensor,
    addition: Tensor | None,
    gain: Tensor,
    eps: float,
    normed: Tensor,
    rows: Tensor | None = None,
    count: Tensor | None = None,
) -> KernelRequest:
    """residual += addition; normed = residual / rms(residual) * gain, on the active rows in place.

    Args:
        residual: ``[R, d]``, contiguous, updated.
        addition: ``[R, d]``, or None to norm only.
        gain: ``[d]``.
        eps: added to the mean square.
        normed: ``[R, d]``, contiguous, written; inactive rows of it keep what they held.
        rows, count: active rows without repeats, int32 ``[<= R]`` and ``[1]``, on the device.

    Mean and scale are in float32. Raises DeliberateError for shapes that do not fit.
    """
    fits = residual.dim() == 2 and normed.shape == residual.shape
    fits = fits and (addition is None or addition.shape == residual.shape)
    if not fits or gain.shape != residual.shape[1:]:
        raise DeliberateError(
            f"add_rmsnorm: residual, addition and normed [R, d] and gain [d] are needed, got "
            f"{tuple(residual.shape)}, {None if addition is None else tuple(addition.shape)}, "
            f"{tuple(normed.shape)} and {tuple(gain.shape)}"
        )
    if not (residual.is_contiguous() and normed.is_contiguous()):
        raise DeliberateError("add_rmsnorm: residual and normed must be contiguous")
    check_rows("add_rmsnorm", rows, count, residual.shape[0])
    return KernelRequest.of(residual, rows=residual.shape[0], width=residual.shape[1])


@KERNELS.register("add_rmsnorm", "torch")
def add_rmsnorm_torch(
    residual: Tensor,
    addition: Tensor | None,
    gain: Tensor,
    eps: float,
    normed: Tensor,
    rows: Tensor | None,
    count: Tensor | None,
) -> None:
    """The reference; float64 stays float64."""
    if rows is None:
        active: Tensor | slice = slice(None)
    else:
        active = active_rows(rows, count, residual.shape[0], residual.device)
    x = residual[active]
    if addition is not None:
        x = x + addition[active]
        residual[active] = x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    normed[active] = (wide * gain.to(wide.dtype)).to(normed.dtype)


@jit
def _add_rmsnorm_kernel(  # type: ignore[no-untyped-def]
    residual,
    addition,
    gain,
    normed,
    rows,
    count,
    listed,
    width,
    addition_stride,
    eps,
    HAS_ADDITION: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, held in registers between the add and the norm."""
    i = tl.program_id(0)
    if i < active_count(count, listed, HAS_ROWS):
        row = tl.load(rows + i) if HAS_ROWS else i
        row = row.to(tl.int64)
        k = tl.arange(0, BLOCK)
        is_k = k < width
        x = tl.load(residual + row * width + k, mask=is_k, other=0.0)
        if HAS_ADDITION:
            added = tl.load(addition + row * addition_stride + k, mask=is_k, other=0.0)
            # The stored sum is what is normed: rounded once, as in separate operators.
            x = (x.to(tl.float32) + added.to(tl.float32)).to(residual.dtype.element_ty)
            tl.store(residual + row * width + k, x, mask=is_k)
        x = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
        y = x * scale * tl.load(gain + k, mask=is_k, other=0.0).to(tl.float32)
        tl.store(normed + row * width + k, y.to(normed.dtype.element_ty), mask=is_k)


@KERNELS.register(
    "add_rmsnorm",
    "triton",
    lambda request: prefers_triton(request) and request.shape["width"] <= 16384,
)
def add_rmsnorm_triton(
    residual: Tensor,
    addition: Tensor | None,
    gain: Tensor,
    eps: float,
    normed: Tensor,
    rows: Tensor | None,
    count: Tensor | None,
) -> None:
    """One launch, one program per row that may be active."""
    check_launch("add_rmsnorm", residual, gain)
    total, width = residual.shape
    listed = total if rows is None else rows.shape[0]
    if listed == 0:
        return
    if addition is not None and addition.stride(1) != 1:
        addition = addition.contiguous()
    block = power_of_two(width, least=16)
    _add_rmsnorm_kernel[(listed,)](
        residual, addition, gain, normed, rows, count,
        listed, width, 0 if addition is None else addition.stride(0), eps,
        HAS_ADDITION=addition is not None, HAS_ROWS=rows is not None, BLOCK=block,
        num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
