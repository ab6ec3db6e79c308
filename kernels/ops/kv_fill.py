"""Keys and values of all skipped layers from one exit state, in one launch.

When a token exits at exit e and its missing keys and values are *propagated* (CALM: Schuster et
al., 2022, arXiv:2207.07061), every layer above e computes its K and V projection from the same
hidden state. The layers' norms then differ by their gains only, which are folded into the weights
once, so all projections are one ``[(L - e) * 2 * kv heads * head width, d]`` product with one norm,
followed by bias, key norm, rotary embedding and the write to the cache, instead of some twenty
launches.

Floor: the bytes of the weights, (L - e) * 2 * kv * hd * d * itemsize, over the bandwidth of the
memory, and one launch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deliberate.kernels.registry import KERNELS, KernelRequest
from deliberate.kernels.rows import active_rows, check_rows
from deliberate.kernels.triton_support import (
    active_count,
    check_launch,
    dot,
    jit,
    power_of_two,
    prefers_triton,
    tl,
    triton,
)
from deliberate.utils.errors import DeliberateError


def fold_kv_weights(
    keys: Sequence[Tensor], values: Sequence[Tensor], gains: Sequence[Tensor], head_width: int
) -> Tensor:
    """K and V projections of n layers with their input norms' gains folded in.

    ``keys`` and ``values``: per layer ``[kv heads * head_width, d]``; ``gains``: per layer ``[d]``.
    Returns ``[n, 2, kv heads, head_width, d]`` in the dtype of the weights, contiguous. The
    product is formed in float32 or wider and rounded once.
    """
    if not keys or not len(keys) == len(values) == len(gains):
        raise DeliberateError(
            f"fold_kv_weights: one key, value and gain per layer are needed, got {len(keys)}, "
            f"{len(values)} and {len(gains)}"
        )
    width = keys[0].shape[1]
    wide = torch.promote_types(keys[0].dtype, torch.float32)
    stacked = torch.stack([torch.stack(pair) for pair in zip(keys, values, strict=True)]).to(wide)
    folded = stacked * torch.stack(list(gains)).to(wide)[:, None, None, :]
    return folded.to(keys[0].dtype).view(len(keys), 2, -1, head_width, width).contiguous()


@KERNELS.define(writes=("key_cache", "value_cache"))
def kv_fill(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    key_gain: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    eps: float,
    key_eps: float,
    rows: Tensor | None = None,
    count: Tensor | None = None,
) -> KernelRequest:
    """Writes K and V of n layers for the active rows at their positions.

    Args:
        hidden: ``[R, d]``, contiguous: the state at the exit, not normed.
        weight: ``[n, 2, kv, hd, d]``, contiguous, from `fold_kv_weights`.
        bias: ``[n, 2, kv, hd]``, contiguous (Qwen2), or None.
        key_gain: gain of a norm over each head of the keys ``[n, hd]``, contiguous (Qwen3), or
            None.
        cos, sin: rotary tables ``[P, hd]``, contiguous: both halves, as transformers makes them.
        positions: int32 or int64 ``[R]``: row of the tables, and slot of the cache.
        key_cache, value_cache: ``[n, R, kv, capacity, hd]``, last dimension contiguous: row r of
            ``hidden`` is row r of the cache. Views of a cache of more layers are fine.
        eps, key_eps: of the input norm and the key norm.
        rows, count: active rows without repeats, int32 ``[<= R]`` and ``[1]``, on the device.

    A position outside the cache or the tables writes nothing: checking it would mean waiting for
    the device. Raises DeliberateError for shapes that do not fit and an odd head width.
    """
    n, two, kv, hd, width = weight.shape if weight.dim() == 5 else (0, 0, 0, 0, 0)
    if two != 2 or hidden.dim() != 2 or hidden.shape[1] != width or hd % 2:
        raise DeliberateError(
            f"kv_fill: hidden [R, d] and weight [n, 2, kv, hd, d] with hd even are needed, got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        wanted = (n, hidden.shape[0], kv, key_cache.shape[3], hd)
        if tuple(cache.shape) != wanted or cache.stride(4) != 1:
            raise DeliberateError(
                f"kv_fill: {name} must be {wanted} with its last dimension contiguous, got "
                f"{tuple(cache.shape)} with strides {cache.stride()}"
            )
    if cos.shape != sin.shape or cos.shape[1] != hd or positions.numel() != hidden.shape[0]:
        raise DeliberateError(
            f"kv_fill: cos and sin [P, {hd}] and {hidden.shape[0]} positions are needed, got "
            f"{tuple(cos.shape)}, {tuple(sin.shape)} and {tuple(positions.shape)}"
        )
    check_rows("kv_fill", rows, count, hidden.shape[0])
    return KernelRequest.of(hidden, rows=hidden.shape[0], width=width, layers=n, head_width=hd)


@KERNELS.register("kv_fill", "torch")
def kv_fill_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    key_gain: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    eps: float,
    key_eps: float,
    rows: Tensor | None,
    count: Tensor | None,
) -> None:
    """The reference: one product, in the dtype of the weights."""
    n, _, kv, hd, width = weight.shape
    active = active_rows(rows, count, hidden.shape[0], hidden.device)
    at = positions[active].long()
    inside = (at >= 0) & (at < min(key_cache.shape[3], cos.shape[0]))
    active, at = active[inside], at[inside]
    x = hidden[active].to(torch.promote_types(hidden.dtype, torch.float32))
    x = (x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps)).to(weight.dtype)
    both = torch.nn.functional.linear(x, weight.reshape(-1, width)).view(-1, n, 2, kv, hd)
    if bias is not None:
        both = both + bias
    keys, values = both.unbind(dim=2)
    if key_gain is not None:
        wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + key_eps)
        keys = wide.to(keys.dtype) * key_gain[:, None, :]
    first, second = keys.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    keys = keys * cos[at][:, None, None, :] + turned * sin[at][:, None, None, :]
    key_cache[:, active, :, at] = keys.to(key_cache.dtype)
    value_cache[:, active, :, at] = values.to(value_cache.dtype)


@jit
def _kv_fill_kernel(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    key_gain,
    cos,
    sin,
    positions,
    key_cache,
    value_cache,
    rows,
    count,
    listed,
    width,
    heads,
    head_width,
    slots,
    key_layer,
    key_row,
    key_head,
    key_slot,
    value_layer,
    value_row,
    value_head,
    value_slot,
    eps,
    key_eps,
    HAS_BIAS: tl.constexpr,
    HAS_KEY_GAIN: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Keys or values of one head of one layer: BLOCK_P pairs (i, i + hd / 2) that RoPE mixes."""
    first = tl.program_id(0) * BLOCK_R
    matrix = tl.program_id(1)
    active = active_count(count, listed, HAS_ROWS)
    if first < active:
        head = matrix % heads
        is_value = (matrix // heads) % 2
        layer = (matrix // heads // 2).to(tl.int64)
        half = head_width // 2
        i = first + tl.arange(0, BLOCK_R)
        is_row = i < active
        row = tl.load(rows + i, mask=is_row, other=0) if HAS_ROWS else i
        row = row.to(tl.int64)
        p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
        is_p = p < half
        low_line = weight + (matrix.to(tl.int64) * head_width + p)[:, None] * width
        high_line = low_line + half * width
        square = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
        if BLOCK_R == 1:
            low_sum = tl.zeros((BLOCK_P, BLOCK_K), dtype=tl.float32)
            high_sum = tl.zeros((BLOCK_P, BLOCK_K), dtype=tl.float32)
        else:
            low = tl.zeros((BLOCK_P, BLOCK_R), dtype=tl.float32)
            high = tl.zeros((BLOCK_P, BLOCK_R), dtype=tl.float32)
        for start in range(0, width, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            is_k = k < width
            is_w = is_p[:, None] & is_k[None, :]
            a = tl.load(low_line + k[None, :], mask=is_w, other=0.0)
            b = tl.load(high_line + k[None, :], mask=is_w, other=0.0)
            x_mask = is_row[:, None] & is_k[None, :]
            x = tl.load(hidden + row[:, None] * width + k[None, :], mask=x_mask, other=0.0)
            wide = x.to(tl.float32)
            square += wide * wide
            if BLOCK_R == 1:
                low_sum += a.to(tl.float32) * wide
                high_sum += b.to(tl.float32) * wide
            else:
                x = tl.trans(x.to(a.dtype))
                low = dot(a, x, low)
                high = dot(b, x, high)
        if BLOCK_R == 1:
            low = tl.sum(low_sum, axis=1)[:, None]
            high = tl.sum(high_sum, axis=1)[:, None]
        scale = tl.rsqrt(tl.sum(square, axis=1) / width + eps)[None, :]
        low = low * scale
        high = high * scale
        if HAS_BIAS:
            at = bias + matrix * head_width + p
            low += tl.load(at, mask=is_p, other=0.0).to(tl.float32)[:, None]
            high += tl.load(at + half, mask=is_p, other=0.0).to(tl.float32)[:, None]
        if HAS_KEY_GAIN:
            # BLOCK_P then spans the head; pairs past its end are zero.
            mean = tl.sum(low * low + high * high, axis=0) / head_width
            key_scale = tl.rsqrt(mean + key_eps)[None, :]
            gain = key_gain + layer * head_width + p
            low_gain = tl.load(gain, mask=is_p, other=0.0).to(tl.float32)[:, None]
            high_gain = tl.load(gain + half, mask=is_p, other=0.0).to(tl.float32)[:, None]
            low = tl.where(is_value == 0, low * key_scale * low_gain, low)
            high = tl.where(is_value == 0, high * key_scale * high_gain, high)
        position = tl.load(positions + row, mask=is_row, other=-1).to(tl.int64)
        is_inside = is_row & (position >= 0) & (position < slots)
        mask = is_p[:, None] & is_inside[None, :]
        if is_value == 0:
            turn = position[None, :] * head_width + p[:, None]
            low_cos = tl.load(cos + turn, mask=mask, other=0.0).to(tl.float32)
            low_sin = tl.load(sin + turn, mask=mask, other=0.0).to(tl.float32)
            high_cos = tl.load(cos + turn + half, mask=mask, other=0.0).to(tl.float32)
            high_sin = tl.load(sin + turn + half, mask=mask, other=0.0).to(tl.float32)
            to = layer * key_layer + row * key_row + head * key_head + position * key_slot
            to = key_cache + to[None, :] + p[:, None]
            tl.store(to, (low * low_cos - high * low_sin).to(key_cache.dtype.element_ty), mask=mask)
            tl.store(
                to + half,
                (high * high_cos + low * high_sin).to(key_cache.dtype.element_ty),
                mask=mask,
            )
        else:
            to = layer * value_layer + row * value_row + head * value_head + position * value_slot
            to = value_cache + to[None, :] + p[:, None]
            tl.store(to, low.to(value_cache.dtype.element_ty), mask=mask)
            tl.store(to + half, high.to(value_cache.dtype.element_ty), mask=mask)


@KERNELS.register("kv_fill", "triton", prefers_triton)
def kv_fill_triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    key_gain: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    eps: float,
    key_eps: float,
    rows: Tensor | None,
    count: Tensor | None,
) -> None:
    """One launch."""
    check_launch("kv_fill", hidden, weight, key_cache)
    n, _, kv, hd, width = weight.shape
    listed = hidden.shape[0] if rows is None else rows.shape[0]
    if listed == 0:
        return
    hidden, weight = hidden.contiguous(), weight.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    block_r = 1 if listed == 1 else power_of_two(listed, least=16, most=32)
    half = hd // 2
    # One row: many small programs, so that all processors read. More: the matrix unit's 16 lines.
    # A key norm needs the whole head in one program.
    block_p = 4 if block_r == 1 else 16
    block_k = 256 if block_r == 1 else 128
    if key_gain is not None:
        block_p, block_k = power_of_two(half, least=16), 64
    _kv_fill_kernel[(triton.cdiv(listed, block_r), n * 2 * kv, triton.cdiv(half, block_p))](
        hidden, weight,
        None if bias is None else bias.contiguous(),
        None if key_gain is None else key_gain.contiguous(),
        cos, sin, positions, key_cache, value_cache, rows, count,
        listed, width, kv, hd, min(key_cache.shape[3], cos.shape[0]),
        *key_cache.stride()[:4], *value_cache.stride()[:4], eps, key_eps,
        HAS_BIAS=bias is not None, HAS_KEY_GAIN=key_gain is not None, HAS_ROWS=rows is not None,
        BLOCK_R=block_r, BLOCK_P=block_p, BLOCK_K=block_k,
        num_warps=4, num_stages=3,
    )  # fmt: skip
