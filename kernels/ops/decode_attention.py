"""Attention of one new token per sequence over its cached tokens, each with its own length.

The tokens of a sequence lie in a row of a static cache, or in blocks that a table names
(PagedAttention: Kwon et al., arXiv:2309.06180). One kernel reads both, in the same order, so that
where the tokens lie changes no bit of the result.

Grouped queries read each key once for all heads of the group. The cached tokens of a sequence are
split among programs (Flash-Decoding: Dao et al., 2023), because a batch of one has fewer heads than
a GPU has processors; the shares are merged by their log-sum-exp.

Floor: 2 * kv heads * length * hd * itemsize bytes per active sequence over the bandwidth of the
memory.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from deliberate.kernels.registry import KERNELS, KernelRequest
from deliberate.kernels.rows import active_rows, check_rows, check_table
from deliberate.kernels.triton_support import (
    active_count,
    check_launch,
    dot,
    jit,
    power_of_two,
    prefers_triton,
    processors,
    tl,
)
from deliberate.utils.errors import DeliberateError


@KERNELS.define(writes=("out",))
def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    scale: float,
    out: Tensor,
    window: int = 0,
    rows: Tensor | None = None,
    count: Tensor | None = None,
    tokens: int = 1,
    table: Tensor | None = None,
) -> KernelRequest:
    """out = softmax(query keys^T * scale) values over each active row's own cached tokens.

    Args:
        query: ``[R, heads, hd]``.
        key_cache, value_cache: ``[R / tokens, kv heads, capacity, hd]``, last dimension contiguous:
            row r looks at row r // tokens. What lies past a row's length is never used, whatever
            it holds.
        lengths: int32 ``[R]``: cached tokens, the new one included; a row of length 0 gives zeros.
        scale: usually hd ** -0.5.
        out: ``[R, heads, hd]``, contiguous, written; inactive rows keep what they held.
        window: only the last ``window`` tokens are seen; 0 for all.
        rows, count: active rows without repeats, int32 ``[<= R]`` and ``[1]``, on the device.
        tokens: consecutive rows that belong to one row of the cache. With rising lengths they are
            a causal pass over several tokens of each sequence.
        table: int32 ``[R / tokens, M]``, last dimension contiguous. The caches are then
            ``[blocks, kv heads, block size, hd]``, of any strides but the last, and tokens
            i * block size and on of row r are in block ``table[r // tokens, i]``. Entries past a
            row's length and before its window are never used, whatever they are.

    Raises DeliberateError for shapes that do not fit.
    """
    total, heads, hd = query.shape if query.dim() == 3 else (0, 0, 0)
    kv = key_cache.shape[1] if key_cache.dim() == 4 else 0
    fits = kv > 0 and heads > 0 and heads % kv == 0 and key_cache.shape == value_cache.shape
    held = key_cache if table is None else table
    if not fits or held.shape[0] * tokens != total or key_cache.shape[3] != hd:
        first = f"R / {tokens}, kv, capacity" if table is None else "blocks, kv, block size"
        raise DeliberateError(
            f"decode_attention: query [R, heads, hd] and caches [{first}, hd] "
            f"with heads a multiple of kv are needed, got {tuple(query.shape)}, "
            f"{tuple(key_cache.shape)} and {tuple(value_cache.shape)}"
            + ("" if table is None else f" with a table {tuple(table.shape)}")
        )
    capacity = key_cache.shape[2]
    if table is not None:
        check_table("decode_attention", table)
        capacity *= table.shape[1]
    if out.shape != query.shape or not out.is_contiguous() or lengths.shape != (total,):
        raise DeliberateError(
            f"decode_attention: out {tuple(query.shape)}, contiguous, and lengths [{total}] are "
            f"needed, got {tuple(out.shape)} and {tuple(lengths.shape)}"
        )
    if window < 0:
        raise DeliberateError(f"decode_attention: window {window} is negative; 0 means all tokens")
    check_rows("decode_attention", rows, count, total)
    return KernelRequest.of(query, rows=total, heads=heads, head_width=hd, capacity=capacity)


@KERNELS.register("decode_attention", "torch")
def decode_attention_torch(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    scale: float,
    out: Tensor,
    window: int,
    rows: Tensor | None,
    count: Tensor | None,
    tokens: int,
    table: Tensor | None,
) -> None:
    """The reference: torch's attention, row by row; a group's heads are its queries."""
    _, heads, hd = query.shape
    kv = key_cache.shape[1]
    for row in active_rows(rows, count, query.shape[0], query.device).tolist():
        length = int(lengths[row])
        start = max(0, length - window) if window else 0
        if length == 0:
            out[row] = 0.0
            continue
        grouped = query[row].reshape(1, kv, heads // kv, hd)
        held = row // tokens
        if table is None:
            both = [cache[held, :, start:length] for cache in (key_cache, value_cache)]
        else:
            both = [
                of_blocks(cache, table[held], start, length) for cache in (key_cache, value_cache)
            ]
        keys, values = (one[None] for one in both)
        seen = scaled_dot_product_attention(grouped, keys, values, scale=scale)
        out[row] = seen.reshape(heads, hd)


def of_blocks(pool: Tensor, table: Tensor, start: int, end: int) -> Tensor:
    """Tokens start..end-1 of one row, ``[kv heads, end - start, hd]``, of a pool of blocks."""
    at = torch.arange(start, end, device=pool.device)
    size = pool.shape[2]
    # Two lists of numbers with a slice between them come first.
    return pool[table[at // size].long(), :, at % size].transpose(0, 1)


@jit
def _share_kernel(  # type: ignore[no-untyped-def]
    query,
    key_cache,
    value_cache,
    lengths,
    out,
    sums,
    peaks,
    rows,
    count,
    table,
    listed,
    heads,
    group,
    head_width,
    capacity,
    key_row,
    key_head,
    key_slot,
    value_row,
    value_head,
    value_slot,
    scale,
    window,
    tokens,
    table_row,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """All heads of one group of one sequence over one share of its cached tokens.

    SIZE is that of the blocks that `table` names, 0 where a sequence is a row of the cache.
    """
    i = tl.program_id(0)
    kv = tl.program_id(1)
    split = tl.program_id(2)
    if i < active_count(count, listed, HAS_ROWS):
        row = tl.load(rows + i) if HAS_ROWS else i
        row = row.to(tl.int64)
        length = tl.minimum(tl.load(lengths + row).to(tl.int32), capacity)
        start = tl.where(window > 0, tl.maximum(length - window, 0), 0)
        share = tl.cdiv(tl.cdiv(length - start, SPLITS), BLOCK_N) * BLOCK_N
        low = start + split * share
        high = tl.minimum(low + share, length)

        g = tl.arange(0, BLOCK_G)
        d = tl.arange(0, BLOCK_D)
        is_d = d < head_width
        mask_q = (g < group)[:, None] & is_d[None, :]
        head = kv * group + g
        at = (row * heads + head)[:, None] * head_width + d[None, :]
        q = tl.load(query + at, mask=mask_q, other=0.0)
        held = row // tokens
        keys = key_cache + kv * key_head
        values = value_cache + kv * value_head
        peak = tl.full((BLOCK_G,), float("-inf"), dtype=tl.float32)
        mass = tl.zeros((BLOCK_G,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32)
        for first in range(low, high, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            is_n = n < high
            mask = is_n[:, None] & is_d[None, :]
            if SIZE:
                block = tl.load(table + held * table_row + n // SIZE, mask=is_n, other=0)
                block = block.to(tl.int64)
                slot = n % SIZE
                key_at = block * key_row + slot * key_slot
                value_at = block * value_row + slot * value_slot
            else:
                key_at = held * key_row + n * key_slot
                value_at = held * value_row + n * value_slot
            k = tl.load(keys + key_at[:, None] + d[None, :], mask=mask, other=0.0)
            scores = dot(q, tl.trans(k.to(q.dtype)), tl.zeros((BLOCK_G, BLOCK_N), dtype=tl.float32))
            scores = tl.where(is_n[None, :], scores * scale, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, axis=1))
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            p = tl.exp(scores - base[:, None])
            keep = tl.exp(peak - base)
            mass = mass * keep + tl.sum(p, axis=1)
            v = tl.load(values + value_at[:, None] + d[None, :], mask=mask, other=0.0)
            acc = dot(p.to(v.dtype), v, acc * keep[:, None])
            peak = new_peak
        if SPLITS == 1:
            acc = tl.where(mass[:, None] == 0.0, 0.0, acc / mass[:, None])
            tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask_q)
        else:
            part = (i * heads + head) * SPLITS + split
            tl.store(sums + part[:, None] * head_width + d[None, :], acc, mask=mask_q)
            tl.store(peaks + 2 * part, peak, mask=g < group)
            tl.store(peaks + 2 * part + 1, mass, mask=g < group)


@jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    sums,
    peaks,
    out,
    rows,
    count,
    listed,
    heads,
    head_width,
    SPLITS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One head of one sequence: its shares become the output."""
    i = tl.program_id(0)
    head = tl.program_id(1)
    if i < active_count(count, listed, HAS_ROWS):
        row = tl.load(rows + i) if HAS_ROWS else i
        s = tl.arange(0, BLOCK_S)
        d = tl.arange(0, BLOCK_D)
        is_s = s < SPLITS
        slot = (i * heads + head) * SPLITS + s
        peak = tl.load(peaks + 2 * slot, mask=is_s, other=float("-inf"))
        mass = tl.load(peaks + 2 * slot + 1, mask=is_s, other=0.0)
        top = tl.max(peak, axis=0)
        weight = tl.exp(peak - tl.where(top == float("-inf"), 0.0, top))
        mask = is_s[:, None] & (d < head_width)[None, :]
        acc = tl.load(sums + slot[:, None] * head_width + d[None, :], mask=mask, other=0.0)
        total = tl.sum(mass * weight, axis=0)
        y = tl.sum(acc * weight[:, None], axis=0)
        y = tl.where(total == 0.0, 0.0, y / total)
        to = out + (row.to(tl.int64) * heads + head) * head_width + d
        tl.store(to, y.to(out.dtype.element_ty), mask=d < head_width)


def shares(rows: int, kv_heads: int, capacity: int, processors: int) -> int:
    """Into how many shares the cached tokens of a sequence are split: about two programs per
    processor, and no share under 128 tokens of a full cache."""
    wanted = 2 * processors // max(1, rows * kv_heads)
    return max(1, min(wanted, -(-capacity // 128), 64))


@KERNELS.register(
    "decode_attention",
    "triton",
    lambda request: prefers_triton(request) and request.shape["head_width"] <= 256,
)
def decode_attention_triton(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    scale: float,
    out: Tensor,
    window: int,
    rows: Tensor | None,
    count: Tensor | None,
    tokens: int = 1,
    table: Tensor | None = None,
    splits: int | None = None,
) -> None:
    """One launch, or two where the cached tokens are split."""
    check_launch("decode_attention", query, key_cache)
    total, heads, hd = query.shape
    kv, size = key_cache.shape[1:3]
    capacity = size if table is None else size * table.shape[1]
    listed = total if rows is None else rows.shape[0]
    if listed == 0:
        return
    query = query.contiguous()
    if key_cache.stride(3) != 1 or value_cache.stride(3) != 1:
        raise DeliberateError("decode_attention: the caches' last dimension must be contiguous")
    if splits is None:
        splits = shares(listed, kv, capacity, processors(query.device))
    sums = peaks = out
    if splits > 1:
        sums = query.new_empty((listed, heads, splits, hd), dtype=torch.float32)
        peaks = query.new_empty((listed, heads, splits, 2), dtype=torch.float32)
    group = heads // kv
    block_d = power_of_two(hd, least=16)
    _share_kernel[(listed, kv, splits)](
        query, key_cache, value_cache, lengths, out, sums, peaks, rows, count, table,
        listed, heads, group, hd, capacity,
        *key_cache.stride()[:3], *value_cache.stride()[:3], scale, window, tokens,
        0 if table is None else table.stride(0), SIZE=0 if table is None else size,
        SPLITS=splits, HAS_ROWS=rows is not None, BLOCK_G=power_of_two(group, least=16),
        BLOCK_D=block_d, BLOCK_N=64 if hd <= 128 else 32, num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(listed, heads)](
            sums, peaks, out, rows, count, listed, heads, hd,
            SPLITS=splits, HAS_ROWS=rows is not None,
            BLOCK_S=power_of_two(splits), BLOCK_D=block_d,
        )  # fmt: skip
