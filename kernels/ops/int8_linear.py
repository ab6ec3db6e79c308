"""Linear layer with int8 weights, one scale per output channel, for few rows.

Decoding reads every weight once per token, so a weight of one byte costs a quarter of the time of
float32 and half that of bfloat16. Weights only: activations keep their dtype and sums are in
float32, but on a CPU float32 activations are rounded to bfloat16 for the one kernel that is fast
(``DELIBERATE_KERNELS=int8_linear=torch`` keeps them exact, and slow).
Symmetric rounding to nearest, as in LLM.int8() without its outliers (Dettmers et al., 2022,
arXiv:2208.07339).

Floor: N * K bytes over the bandwidth of the memory.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from deliberate.kernels.registry import KERNELS, KernelRequest
from deliberate.kernels.triton_support import (
    Tile,
    check_launch,
    dot,
    jit,
    power_of_two,
    prefers_triton,
    tl,
    triton,
)
from deliberate.utils.errors import DeliberateError


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight ``[N, K]`` -> (int8 ``[N, K]``, scale float32 ``[N]``) with weight ~ int8 * scale.

    The largest magnitude of a row becomes 127; a row of zeros gets scale 1. The error of an
    element is at most half its row's scale. Raises DeliberateError for a weight that is not finite.
    """
    if weight.dim() != 2:
        raise DeliberateError(f"quantise: a matrix [N, K] is needed, got {tuple(weight.shape)}")
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    most = wide.abs().amax(dim=1)
    if not bool(torch.isfinite(most).all()):
        raise DeliberateError("quantise: the weight holds NaN or infinity")
    scale = torch.where(most > 0, most / 127.0, 1.0).float()
    return (wide / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def _outputs(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@KERNELS.define(outputs=_outputs)
def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
) -> KernelRequest:
    """x (weight * scale)^T + bias.

    Args:
        x: ``[M, K]``.
        weight: int8 ``[N, K]``, from `quantise`.
        scale: float32 ``[N]``.
        bias: ``[N]``, or None.

    Returns ``[M, N]`` in the dtype of x. Raises DeliberateError for shapes that do not fit.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise DeliberateError(
            f"int8_linear: x [M, K] and weight [N, K] are needed, got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if weight.dtype != torch.int8 or scale.shape != weight.shape[:1]:
        raise DeliberateError(
            f"int8_linear: int8 weights with one scale per row are needed, got {weight.dtype} "
            f"{tuple(weight.shape)} and scales {tuple(scale.shape)}"
        )
    return KernelRequest.of(x, rows=x.shape[0], width=x.shape[1], outputs=weight.shape[0])


@KERNELS.register("int8_linear", "torch")
def int8_linear_torch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The reference: a dequantised product, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = linear(x.to(wide), weight.to(wide)) * scale.to(wide)
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)


# torch's kernel reads past the end of a row whose width is no multiple of this, and may crash.
PACKED_WIDTH = 16


@KERNELS.register(
    "int8_linear",
    "torch_packed",
    lambda request: (
        request.device == "cpu"
        and request.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and request.shape["rows"] > 0
        and request.shape["width"] % PACKED_WIDTH == 0
    ),
)
def int8_linear_packed(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """torch's own int8 kernel for CPUs, which never writes the dequantised weight.

    It is fast with bfloat16 activations and twenty times slower with float32, so activations and
    the product are rounded to bfloat16 (relative error up to 2**-8 each). It would round the scales
    too: they are applied after it.
    """
    if x.shape[0] == 0 or x.shape[1] % PACKED_WIDTH:
        return int8_linear_torch(x, weight, scale, bias)
    half = x.to(torch.bfloat16).contiguous()
    ones = torch.ones(weight.shape[0], dtype=torch.bfloat16, device=x.device)
    out = torch._weight_int8pack_mm(half, weight.contiguous(), ones).float() * scale.float()
    return (out if bias is None else out + bias.float()).to(x.dtype)


@jit
def _int8_linear_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    scale,
    bias,
    out,
    total,
    outputs,
    width,
    BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_R rows by BLOCK_N channels; the scale is applied once, after the sum."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = row < total
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n = n < outputs
    line = weight + n.to(tl.int64)[:, None] * width
    if BLOCK_R == 1:
        product = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    else:
        y = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        is_k = k < width
        w = tl.load(line + k[None, :], mask=is_n[:, None] & is_k[None, :], other=0)
        x_mask = is_row[:, None] & is_k[None, :]
        v = tl.load(x + row[:, None] * width + k[None, :], mask=x_mask, other=0.0)
        if BLOCK_R == 1:
            product += w.to(tl.float32) * v.to(tl.float32)
        else:
            # Every int8 is exact in bfloat16 and float16; the interpreter needs the way by float32.
            y = dot(w.to(tl.float32).to(v.dtype), tl.trans(v), y)
    if BLOCK_R == 1:
        y = tl.sum(product, axis=1)[:, None]
    y = y * tl.load(scale + n, mask=is_n, other=0.0).to(tl.float32)[:, None]
    if HAS_BIAS:
        y += tl.load(bias + n, mask=is_n, other=0.0).to(tl.float32)[:, None]
    to = out + row.to(tl.int64)[None, :] * outputs + n[:, None]
    tl.store(to, y.to(out.dtype.element_ty), mask=is_row[None, :] & is_n[:, None])


# The first is used; the benchmark tries the others.
TILES_ONE_ROW = (Tile(16, 256), Tile(32, 256), Tile(8, 512), Tile(16, 512, stages=2))
TILES = (Tile(32, 128), Tile(64, 128, stages=4), Tile(32, 256), Tile(16, 256))


@KERNELS.register(
    "int8_linear",
    "triton",
    # With many rows the product is bound by arithmetic: dequantising once is then cheaper.
    lambda request: prefers_triton(request) and request.shape["rows"] <= 128,
)
def int8_linear_triton(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, tile: Tile | None = None
) -> Tensor:
    """One launch."""
    check_launch("int8_linear", x)
    x, weight = x.contiguous(), weight.contiguous()
    total, width = x.shape
    outputs = weight.shape[0]
    out = x.new_empty((total, outputs))
    if total == 0:
        return out
    block_r = 1 if total == 1 else power_of_two(total, least=16, most=64)
    tile = tile or (TILES_ONE_ROW if total == 1 else TILES)[0]
    _int8_linear_kernel[(triton.cdiv(total, block_r), triton.cdiv(outputs, tile.block_n))](
        x, weight, scale, bias, out, total, outputs, width,
        BLOCK_R=block_r, HAS_BIAS=bias is not None, **tile.launch(),
    )  # fmt: skip
    return out
