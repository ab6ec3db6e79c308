"""From the joined QKV product to attention's inputs: bias, head norms, RoPE and the cache write.

Between the product of queries, keys and values and the attention stand a dozen small operators
(split, two norms, four products and two sums of the rotary embedding, two cache writes). For one
token each takes longer to launch than to run; here they are one launch, and the new token's key and
value go straight to the cache slot of its position.

RoPE: Su et al., 2021 (arXiv:2104.09864), in the layout of two halves that transformers uses.

Floor: one launch; the bytes, 2 * R * (heads + 2 kv) * hd * itemsize, are nothing for a few rows.
"""

import torch
from torch import Tensor

from deliberate.kernels.registry import KERNELS, KernelRequest
from deliberate.kernels.rows import active_rows, check_rows, check_table
from deliberate.kernels.triton_support import (
    active_count,
    check_launch,
    jit,
    power_of_two,
    prefers_triton,
    tl,
)
from deliberate.utils.errors import DeliberateError


@KERNELS.define(writes=("key_cache", "value_cache", "query"))
def rope_write(
    qkv: Tensor,
    bias: Tensor | None,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query: Tensor,
    eps: float,
    rows: Tensor | None = None,
    count: Tensor | None = None,
    tokens: int = 1,
    table: Tensor | None = None,
) -> KernelRequest:
    """Writes the queries of the active rows, and their keys and values at their positions.

    Args:
        qkv: ``[R, (heads + 2 kv) * hd]``, rows contiguous: queries, keys, values.
        bias: ``[(heads + 2 kv) * hd]``, contiguous, or None.
        query_gain, key_gain: gains of a norm over each head ``[hd]`` (Qwen3), both or neither.
        cos, sin: rotary tables ``[P, hd]``, contiguous: both halves, as transformers makes them.
        positions: int32 or int64 ``[R]``: row of the tables, and slot of the cache.
        key_cache, value_cache: ``[R / tokens, kv, capacity, hd]``, last dimension contiguous: row r
            is written to row r // tokens of the cache.
        query: ``[R, heads, hd]``, contiguous, written; inactive rows keep what they held.
        eps: of the head norms.
        rows, count: active rows without repeats, int32 ``[<= R]`` and ``[1]``, on the device.
        tokens: consecutive rows that belong to one row of the cache.
        table: as for `decode_attention`: the caches are then ``[blocks, kv, block size, hd]``. A
            token whose entry is negative is not written, only its query is.

    A position outside the cache or the tables writes nothing and leaves its query unset: checking
    it would mean waiting for the device. Raises DeliberateError for shapes that do not fit.
    """
    total, heads, hd = query.shape if query.dim() == 3 else (0, 0, 0)
    kv = key_cache.shape[1] if key_cache.dim() == 4 else 0
    fits = hd > 0 and hd % 2 == 0 and qkv.shape == (total, (heads + 2 * kv) * hd)
    if not fits or qkv.stride(1) != 1 or not query.is_contiguous() or positions.shape != (total,):
        raise DeliberateError(
            f"rope_write: qkv [R, (heads + 2 kv) * hd], contiguous queries [R, heads, hd] with hd "
            f"even and R positions are needed, got {tuple(qkv.shape)}, {tuple(query.shape)} and "
            f"{tuple(positions.shape)}"
        )
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        rows_of = cache if table is None else table
        held = rows_of.shape[0] * tokens == total and cache.shape == key_cache.shape
        if not held or cache.shape[3] != hd or cache.stride(3) != 1:
            first = f"{total} / {tokens}, kv, capacity" if table is None else "blocks, kv, size"
            raise DeliberateError(
                f"rope_write: {name} must be [{first}, {hd}] with its "
                f"last dimension contiguous, got {tuple(cache.shape)} with strides {cache.stride()}"
                + ("" if table is None else f" and a table {tuple(table.shape)}")
            )
    if table is not None:
        check_table("rope_write", table)
    if cos.shape != sin.shape or cos.shape[1:] != (hd,):
        raise DeliberateError(
            f"rope_write: cos and sin [P, {hd}] are needed, got {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}"
        )
    if (query_gain is None) != (key_gain is None):
        raise DeliberateError("rope_write: give the gains of queries and keys, or neither")
    check_rows("rope_write", rows, count, total)
    return KernelRequest.of(qkv, rows=total, heads=heads, head_width=hd)


@KERNELS.register("rope_write", "torch")
def rope_write_torch(
    qkv: Tensor,
    bias: Tensor | None,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query: Tensor,
    eps: float,
    rows: Tensor | None,
    count: Tensor | None,
    tokens: int,
    table: Tensor | None,
) -> None:
    """The reference, in float32 or wider, rounded once."""
    total, heads, hd = query.shape
    kv = key_cache.shape[1]
    active = active_rows(rows, count, total, qkv.device)
    at = positions[active].long()
    size = key_cache.shape[2]
    capacity = size if table is None else size * table.shape[1]
    inside = (at >= 0) & (at < min(capacity, cos.shape[0]))
    active, at = active[inside], at[inside]
    x = qkv[active].to(torch.promote_types(qkv.dtype, torch.float32))
    if bias is not None:
        x = x + bias
    queries, keys, values = x.view(-1, heads + 2 * kv, hd).split((heads, kv, kv), dim=1)
    if query_gain is not None and key_gain is not None:
        queries = _normed(queries, query_gain, eps)
        keys = _normed(keys, key_gain, eps)
    turn = cos[at][:, None, :].to(x.dtype), sin[at][:, None, :].to(x.dtype)
    query[active] = _rotated(queries, *turn).to(query.dtype)
    keys, held = _rotated(keys, *turn), active // tokens
    if table is not None:
        held, at = table[held, at // size].long(), at % size
        known = held >= 0
        keys, values, held, at = keys[known], values[known], held[known], at[known]
    key_cache[held, :, at] = keys.to(key_cache.dtype)
    value_cache[held, :, at] = values.to(value_cache.dtype)


def _normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * gain.to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@jit
def _rope_write_kernel(  # type: ignore[no-untyped-def]
    qkv,
    bias,
    query_gain,
    key_gain,
    cos,
    sin,
    positions,
    key_cache,
    value_cache,
    query,
    rows,
    count,
    table,
    listed,
    heads,
    kv,
    head_width,
    slots,
    tokens,
    qkv_stride,
    key_row,
    key_head,
    key_slot,
    value_row,
    value_head,
    value_slot,
    eps,
    table_row,
    SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAINS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head of one token: pairs (i, i + hd / 2) that RoPE mixes.

    SIZE is that of the blocks that `table` names, 0 where a sequence is a row of the cache.
    """
    i = tl.program_id(0)
    head = tl.program_id(1)
    if i < active_count(count, listed, HAS_ROWS):
        row = tl.load(rows + i) if HAS_ROWS else i
        row = row.to(tl.int64)
        half = head_width // 2
        p = tl.arange(0, BLOCK)
        is_p = p < half
        at = head * head_width + p
        low = tl.load(qkv + row * qkv_stride + at, mask=is_p, other=0.0).to(tl.float32)
        high = tl.load(qkv + row * qkv_stride + at + half, mask=is_p, other=0.0).to(tl.float32)
        if HAS_BIAS:
            low += tl.load(bias + at, mask=is_p, other=0.0).to(tl.float32)
            high += tl.load(bias + at + half, mask=is_p, other=0.0).to(tl.float32)
        position = tl.load(positions + row).to(tl.int64)
        is_inside = (position >= 0) & (position < slots)
        mask = is_p & is_inside
        cache_row = row // tokens
        slot = position
        is_written = mask
        if SIZE:
            entry = table + cache_row * table_row + position // SIZE
            cache_row = tl.load(entry, mask=is_inside, other=-1).to(tl.int64)
            slot = position % SIZE
            is_written = mask & (cache_row >= 0)
        if head < heads + kv:
            if HAS_GAINS:
                scale = tl.rsqrt(tl.sum(low * low + high * high, axis=0) / head_width + eps)
                gain = query_gain
                if head >= heads:
                    gain = key_gain
                low = low * scale * tl.load(gain + p, mask=is_p, other=0.0).to(tl.float32)
                high = high * scale * tl.load(gain + p + half, mask=is_p, other=0.0).to(tl.float32)
            turn = position * head_width + p
            low_cos = tl.load(cos + turn, mask=mask, other=0.0).to(tl.float32)
            low_sin = tl.load(sin + turn, mask=mask, other=0.0).to(tl.float32)
            high_cos = tl.load(cos + turn + half, mask=mask, other=0.0).to(tl.float32)
            high_sin = tl.load(sin + turn + half, mask=mask, other=0.0).to(tl.float32)
            new_low = low * low_cos - high * low_sin
            new_high = high * high_cos + low * high_sin
            if head < heads:
                to = query + (row * heads + head) * head_width + p
                tl.store(to, new_low.to(query.dtype.element_ty), mask=mask)
                tl.store(to + half, new_high.to(query.dtype.element_ty), mask=mask)
            else:
                to = cache_row * key_row + (head - heads) * key_head + slot * key_slot
                to = key_cache + to + p
                tl.store(to, new_low.to(key_cache.dtype.element_ty), mask=is_written)
                tl.store(to + half, new_high.to(key_cache.dtype.element_ty), mask=is_written)
        else:
            to = cache_row * value_row + (head - heads - kv) * value_head + slot * value_slot
            to = value_cache + to + p
            tl.store(to, low.to(value_cache.dtype.element_ty), mask=is_written)
            tl.store(to + half, high.to(value_cache.dtype.element_ty), mask=is_written)


@KERNELS.register("rope_write", "triton", prefers_triton)
def rope_write_triton(
    qkv: Tensor,
    bias: Tensor | None,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query: Tensor,
    eps: float,
    rows: Tensor | None,
    count: Tensor | None,
    tokens: int,
    table: Tensor | None = None,
) -> None:
    """One launch."""
    check_launch("rope_write", qkv, query, key_cache)
    total, heads, hd = query.shape
    kv, size = key_cache.shape[1:3]
    capacity = size if table is None else size * table.shape[1]
    listed = total if rows is None else rows.shape[0]
    if listed == 0:
        return
    _rope_write_kernel[(listed, heads + 2 * kv)](
        qkv, bias, query_gain, key_gain, cos.contiguous(), sin.contiguous(), positions,
        key_cache, value_cache, query, rows, count, table,
        listed, heads, kv, hd, min(capacity, cos.shape[0]), tokens, qkv.stride(0),
        *key_cache.stride()[:3], *value_cache.stride()[:3], eps,
        0 if table is None else table.stride(0), SIZE=0 if table is None else size,
        HAS_BIAS=bias is not None, HAS_GAINS=query_gain is not None, HAS_ROWS=rows is not None,
        BLOCK=power_of_two(hd // 2, least=16), num_warps=1,
    )  # fmt: skip
