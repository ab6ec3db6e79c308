"""SwiGLU feed-forward of the active rows only: gather -> gate and up -> down -> scatter-add.

Rows whose tokens have exited cost nothing: indices and count stay on the device, and the programs
of rows past the count return at once. Nothing is gathered into a buffer of its own either; the
first product reads its rows where they lie.

SwiGLU: Shazeer, 2020 (arXiv:2002.05202).

Floor: the bytes of the three matrices, 3 * d * I * itemsize, over the bandwidth of the memory; for
many rows 6 * R * d * I operations over the rate of the matrix units.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from deliberate.kernels.registry import KERNELS, KernelRequest
from deliberate.kernels.rows import active_rows, check_rows
from deliberate.kernels.triton_support import (
    Tile,
    active_count,
    check_launch,
    dot,
    jit,
    power_of_two,
    prefers_triton,
    processors,
    tl,
    triton,
)
from deliberate.utils.errors import DeliberateError


@KERNELS.define(writes=("residual",))
def skip_mlp(
    residual: Tensor,
    normed: Tensor,
    gate_up: Tensor,
    down: Tensor,
    rows: Tensor | None = None,
    count: Tensor | None = None,
) -> KernelRequest:
    """residual += (silu(normed Wg^T) * (normed Wu^T)) Wd^T on the active rows, in place.

    Args:
        residual: ``[R, d]``, contiguous, updated.
        normed: ``[R, d]``, the normed input.
        gate_up: ``[2 I, d]``, the rows of Wg, then those of Wu.
        down: ``[d, I]``.
        rows, count: active rows without repeats, int32 ``[<= R]`` and ``[1]``, on the device.

    The product of gate and up is rounded to the dtype of ``normed``; sums are in float32.
    Raises DeliberateError for shapes that do not fit.
    """
    shapes = residual.dim() == 2 and normed.shape == residual.shape and down.dim() == 2
    width = residual.shape[-1]
    if not shapes or gate_up.shape != (2 * down.shape[1], width) or down.shape[0] != width:
        raise DeliberateError(
            f"skip_mlp: residual and normed [R, d], gate_up [2 I, d] and down [d, I] are needed, "
            f"got {tuple(residual.shape)}, {tuple(normed.shape)}, {tuple(gate_up.shape)} and "
            f"{tuple(down.shape)}"
        )
    if not residual.is_contiguous():
        raise DeliberateError("skip_mlp: residual must be contiguous")
    check_rows("skip_mlp", rows, count, residual.shape[0])
    return KernelRequest.of(normed, rows=residual.shape[0], width=width, inner=down.shape[1])


@KERNELS.register("skip_mlp", "torch")
def skip_mlp_torch(
    residual: Tensor,
    normed: Tensor,
    gate_up: Tensor,
    down: Tensor,
    rows: Tensor | None,
    count: Tensor | None,
) -> None:
    """The reference; with every row active it copies none."""
    if rows is None:
        gate, up = linear(normed, gate_up).chunk(2, dim=-1)
        residual += linear(silu(gate) * up, down)
        return
    active = active_rows(rows, count, residual.shape[0], residual.device)
    gate, up = linear(normed[active], gate_up).chunk(2, dim=-1)
    residual[active] += linear(silu(gate) * up, down)


@jit
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    normed,
    gate_up,
    mixed,
    rows,
    count,
    listed,
    inner,
    width,
    normed_stride,
    weight_stride,
    BLOCK_R: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """mixed[i, n] = silu(gate) * up for BLOCK_R active rows and BLOCK_N inner channels."""
    first = tl.program_id(0) * BLOCK_R
    active = active_count(count, listed, HAS_ROWS)
    if first < active:
        i = first + tl.arange(0, BLOCK_R)
        is_row = i < active
        row = tl.load(rows + i, mask=is_row, other=0) if HAS_ROWS else i
        x_line = normed + row.to(tl.int64)[:, None] * normed_stride
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_n = n < inner
        gate_line = gate_up + n.to(tl.int64)[:, None] * weight_stride
        up_line = gate_up + (inner + n).to(tl.int64)[:, None] * weight_stride
        if BLOCK_R == 1:
            gate_sum = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
            up_sum = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        else:
            gate = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
            up = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        for start in range(0, width, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            is_k = k < width
            is_w = is_n[:, None] & is_k[None, :]
            g = tl.load(gate_line + k[None, :], mask=is_w, other=0.0)
            u = tl.load(up_line + k[None, :], mask=is_w, other=0.0)
            x = tl.load(x_line + k[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0)
            if BLOCK_R == 1:
                x = x.to(tl.float32)
                gate_sum += g.to(tl.float32) * x
                up_sum += u.to(tl.float32) * x
            else:
                x = tl.trans(x.to(g.dtype))
                gate = dot(g, x, gate)
                up = dot(u, x, up)
        if BLOCK_R == 1:
            gate = tl.sum(gate_sum, axis=1)[:, None]
            up = tl.sum(up_sum, axis=1)[:, None]
        # As in separate operators: each product is rounded before the next.
        kind: tl.constexpr = mixed.dtype.element_ty
        gate = gate.to(kind).to(tl.float32)
        up = up.to(kind).to(tl.float32)
        h = (gate * tl.sigmoid(gate)).to(kind).to(tl.float32) * up
        to = mixed + i[None, :] * inner + n[:, None]
        tl.store(to, h.to(kind), mask=is_row[None, :] & is_n[:, None])


@jit
def _down_kernel(  # type: ignore[no-untyped-def]
    mixed,
    down,
    residual,
    partial,
    rows,
    count,
    listed,
    inner,
    width,
    weight_stride,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One share of residual += mixed Wd^T: added in place, or kept apart when split."""
    first = tl.program_id(0) * BLOCK_R
    split = tl.program_id(2)
    active = active_count(count, listed, HAS_ROWS)
    if first < active:
        i = first + tl.arange(0, BLOCK_R)
        is_row = i < active
        row = tl.load(rows + i, mask=is_row, other=0) if HAS_ROWS else i
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_n = n < width
        line = down + n.to(tl.int64)[:, None] * weight_stride
        if BLOCK_R == 1:
            product = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        else:
            out = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        for start in range(split * BLOCK_K, inner, BLOCK_K * SPLITS):
            k = start + tl.arange(0, BLOCK_K)
            is_k = k < inner
            w = tl.load(line + k[None, :], mask=is_n[:, None] & is_k[None, :], other=0.0)
            x_mask = is_row[:, None] & is_k[None, :]
            x = tl.load(mixed + i[:, None] * inner + k[None, :], mask=x_mask, other=0.0)
            if BLOCK_R == 1:
                product += w.to(tl.float32) * x.to(tl.float32)
            else:
                out = dot(w, tl.trans(x.to(w.dtype)), out)
        if BLOCK_R == 1:
            out = tl.sum(product, axis=1)[:, None]
        mask = is_row[None, :] & is_n[:, None]
        if SPLITS == 1:
            to = residual + row.to(tl.int64)[None, :] * width + n[:, None]
            old = tl.load(to, mask=mask, other=0.0).to(tl.float32)
            tl.store(to, (old + out).to(residual.dtype.element_ty), mask=mask)
        else:
            to = partial + (split * listed + i[None, :]) * width + n[:, None]
            tl.store(to, out, mask=mask)


@jit
def _add_shares_kernel(  # type: ignore[no-untyped-def]
    partial,
    residual,
    rows,
    count,
    listed,
    width,
    SPLITS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the shares of a split product to one active row, always in the same order."""
    i = tl.program_id(0)
    if i < active_count(count, listed, HAS_ROWS):
        row = tl.load(rows + i) if HAS_ROWS else i
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        is_n = n < width
        out = tl.zeros((BLOCK,), dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            out += tl.load(partial + (split * listed + i) * width + n, mask=is_n, other=0.0)
        to = residual + row.to(tl.int64) * width + n
        old = tl.load(to, mask=is_n, other=0.0).to(tl.float32)
        tl.store(to, (old + out).to(residual.dtype.element_ty), mask=is_n)


# Of the first product. The first is used; the benchmark tries the others.
TILES_ONE_ROW = (Tile(16, 128), Tile(8, 256), Tile(16, 256, stages=2), Tile(32, 128))
TILES = (Tile(32, 128), Tile(64, 64, stages=4), Tile(64, 128, warps=8), Tile(16, 128))
TILES_MANY_ROWS = (Tile(64, 64, stages=4), Tile(128, 64, warps=8), Tile(64, 128, warps=8))


def first_tiles(rows: int) -> tuple[Tile, ...]:
    """Candidates for the first product with this many rows, the default first."""
    if rows == 1:
        return TILES_ONE_ROW
    return TILES if rows <= 64 else TILES_MANY_ROWS


def second_tile(rows: int, width: int, inner: int, processors: int) -> tuple[Tile, int]:
    """Tile of the second product, and into how many shares its sum is split.

    Its output is narrow (d), so for a few rows most processors would be idle: the sum over
    the inner channels is then split so that about two programs per processor read weights.
    """
    if rows == 1:
        return Tile(4, 512), 1
    tile = Tile(32, 128) if rows <= 64 else Tile(64, 64, stages=4)
    programs = -(-rows // row_block(rows)) * -(-width // tile.block_n)
    useful = max(1, inner // (4 * tile.block_k))  # each share at least four steps long
    return tile, max(1, min(2 * processors // programs, useful, 8))


def row_block(rows: int) -> int:
    """Rows of one program: 1, which needs no matrix unit, or a power of two from 16 to 64."""
    return 1 if rows == 1 else power_of_two(rows, least=16, most=64)


@KERNELS.register("skip_mlp", "triton", prefers_triton)
def skip_mlp_triton(
    residual: Tensor,
    normed: Tensor,
    gate_up: Tensor,
    down: Tensor,
    rows: Tensor | None,
    count: Tensor | None,
    tile: Tile | None = None,
) -> None:
    """Two launches, or three where the second product is split."""
    check_launch("skip_mlp", residual, normed, gate_up)
    total, width = residual.shape
    inner = down.shape[1]
    listed = total if rows is None else rows.shape[0]
    if listed == 0:
        return
    normed, gate_up, down = (
        one if one.stride(1) == 1 else one.contiguous() for one in (normed, gate_up, down)
    )
    mixed = normed.new_empty((listed, inner))
    has_rows = rows is not None
    block_r = row_block(listed)
    tile = tile or first_tiles(listed)[0]
    # Row blocks run fastest: those that share weights follow each other, and find them cached.
    blocks = triton.cdiv(listed, block_r)
    _gate_up_kernel[(blocks, triton.cdiv(inner, tile.block_n))](
        normed, gate_up, mixed, rows, count, listed, inner, width,
        normed.stride(0), gate_up.stride(0),
        BLOCK_R=block_r, HAS_ROWS=has_rows, **tile.launch(),
    )  # fmt: skip
    tile, splits = second_tile(listed, width, inner, processors(residual.device))
    partial = residual
    if splits > 1:
        partial = residual.new_empty((splits, listed, width), dtype=torch.float32)
    _down_kernel[(blocks, triton.cdiv(width, tile.block_n), splits)](
        mixed, down, residual, partial, rows, count, listed, inner, width, down.stride(0),
        SPLITS=splits, BLOCK_R=block_r, HAS_ROWS=has_rows, **tile.launch(),
    )  # fmt: skip
    if splits > 1:
        _add_shares_kernel[(listed, triton.cdiv(width, 512))](
            partial, residual, rows, count, listed, width,
            SPLITS=splits, HAS_ROWS=has_rows, BLOCK=512,
        )  # fmt: skip
