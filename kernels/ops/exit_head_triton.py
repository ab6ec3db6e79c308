"""Triton kernels of the exit head: partial results of blocks of tokens, then one per row.

The logits of a block live in registers; written are six numbers per block and row. Kept apart from
the op (`exit_head`) for its length only.
"""

import torch
from torch import Tensor

from deliberate.kernels.triton_support import (
    Tile,
    active_count,
    check_launch,
    dot,
    jit,
    power_of_two,
    tl,
)

COMBINE_CHUNK = 2048  # blocks of tokens that are combined at a time
# The first is used; the benchmark tries the others.
TILES_ONE_ROW = (
    Tile(32, 128),
    Tile(32, 256, stages=2),
    Tile(64, 128),
    Tile(16, 256),
    Tile(16, 512),
)
TILES = (
    Tile(64, 128),
    Tile(64, 64, stages=4),
    Tile(128, 64),
    Tile(128, 64, warps=8),
    Tile(32, 128),
)


@jit
def _partial_kernel(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    gain,
    vocabulary,
    rows,
    count,
    scores,
    places,
    total,
    vocab,
    width,
    weight_stride,
    eps,
    softcap,
    blocks,
    BLOCK_R: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_VOCABULARY: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logits of BLOCK_N tokens for BLOCK_R rows, kept in registers; their best two and sums."""
    block = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_R
    active = active_count(count, total, HAS_ROWS)
    if first < active:
        at = first + tl.arange(0, BLOCK_R)
        is_row = at < active
        row = tl.load(rows + at, mask=is_row, other=0) if HAS_ROWS else at
        row = row.to(tl.int64)
        v = block * BLOCK_N + tl.arange(0, BLOCK_N)
        is_token = v < vocab
        token = tl.load(vocabulary + v, mask=is_token, other=0) if HAS_VOCABULARY else v
        line = weight + token.to(tl.int64)[:, None] * weight_stride

        # The scale of the norm is a factor of the whole row: it is applied once, after the sums.
        square = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
        if BLOCK_R == 1:
            partial = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        else:
            logits = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        for start in range(0, width, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            is_k = k < width
            tile = tl.load(
                line + k[None, :],
                mask=is_token[:, None] & is_k[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            x = tl.load(
                hidden + row[:, None] * width + k[None, :],
                mask=is_row[:, None] & is_k[None, :],
                other=0.0,
            ).to(tl.float32)
            if HAS_GAIN:
                square += x * x
                x = x * tl.load(gain + k, mask=is_k, other=0.0).to(tl.float32)[None, :]
            if BLOCK_R == 1:
                partial += tile.to(tl.float32) * x
            else:
                logits = dot(tile, tl.trans(x.to(tile.dtype)), logits)
        if BLOCK_R == 1:
            logits = tl.sum(partial, axis=1)[:, None]
        if HAS_GAIN:
            logits = logits * tl.rsqrt(tl.sum(square, axis=1) / width + eps)[None, :]
        if HAS_CAP:
            # tanh as a sigmoid, which saturates where tanh by exponentials would divide inf by inf.
            logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)

        low = float("-inf")
        sound = (logits < float("inf")) | (is_token[:, None] == 0)
        is_bad = tl.sum((sound == 0).to(tl.int32), axis=0) > 0
        logits = tl.where(sound & is_token[:, None], logits, low)
        best, best_at = tl.max(logits, axis=0, return_indices=True)
        others = tl.where(tl.arange(0, BLOCK_N)[:, None] == best_at[None, :], low, logits)
        second, second_at = tl.max(others, axis=0, return_indices=True)
        # Of a block of only -inf: the first listed that is not the best.
        second_at = tl.where(second == low, tl.where(best_at == 0, 1, 0), second_at)
        base = tl.where(best == low, 0.0, best)
        shifted = logits - base[None, :]
        mass = tl.exp(shifted)
        total_mass = tl.sum(mass, axis=0)
        weighted = tl.sum(tl.where(mass > 0, mass * shifted, 0.0), axis=0)
        total_mass = tl.where(is_bad, float("nan"), total_mass)

        plane = total * blocks
        to = at * blocks + block
        tl.store(scores + to, best, mask=is_row)
        tl.store(scores + plane + to, second, mask=is_row)
        tl.store(scores + 2 * plane + to, total_mass, mask=is_row)
        tl.store(scores + 3 * plane + to, weighted, mask=is_row)
        tl.store(places + to, block * BLOCK_N + best_at, mask=is_row)
        tl.store(places + plane + to, block * BLOCK_N + second_at, mask=is_row)


@jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    scores,
    places,
    vocabulary,
    count,
    tokens,
    values,
    normaliser,
    entropy,
    total,
    vocab,
    blocks,
    HAS_VOCABULARY: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One row: its blocks' best two and sums become the row's."""
    i = tl.program_id(0)
    active = active_count(count, total, HAS_ROWS)
    low = float("-inf")
    best = low
    best_at = 0
    second = low
    second_at = 1
    mass = 0.0
    weighted = 0.0
    plane = total * blocks
    end = tl.where(i < active, blocks, 0)
    for start in range(0, end, CHUNK):
        j = start + tl.arange(0, CHUNK)
        is_block = j < blocks
        at = i * blocks + j
        a = tl.load(scores + at, mask=is_block, other=low)
        b = tl.load(scores + plane + at, mask=is_block, other=low)
        a_at = tl.load(places + at, mask=is_block, other=0)
        b_at = tl.load(places + plane + at, mask=is_block, other=0)
        s = tl.load(scores + 2 * plane + at, mask=is_block, other=0.0)
        t = tl.load(scores + 3 * plane + at, mask=is_block, other=0.0)

        top, where_top = tl.max(a, axis=0, return_indices=True)
        is_top = tl.arange(0, CHUNK) == where_top
        top_at = tl.sum(tl.where(is_top, a_at, 0), axis=0)
        rest = tl.where(is_top, b, a)
        rest_at = tl.where(is_top, b_at, a_at)
        # Of equals the first listed, which a second of an earlier block may be.
        next_top = tl.max(rest, axis=0)
        next_at = tl.min(tl.where((rest == next_top) & is_block, rest_at, vocab), axis=0)

        # What went before is listed first, so it wins when equal.
        new_second = tl.where(top > best, tl.maximum(best, next_top), tl.maximum(second, top))
        old_or_next = tl.where(best >= next_top, best_at, next_at)
        old_or_top = tl.where(second >= top, second_at, top_at)
        second_at = tl.where(top > best, old_or_next, old_or_top)
        second = new_second
        new_best = tl.maximum(best, top)
        best_at = tl.where(top > best, top_at, best_at)

        base = tl.where(new_best == low, 0.0, new_best)
        old_base = tl.where(best == low, base, best)
        shift = tl.where(a == low, 0.0, a - base)
        scale = tl.where(a == low, 0.0, tl.exp(shift))
        old_shift = old_base - base
        old_scale = tl.exp(old_shift)
        # NaN sums mark a bad row; NaN times 0 keeps the mark.
        weighted = old_scale * (weighted + mass * old_shift)
        weighted += tl.sum(scale * (t + s * shift), axis=0)
        mass = mass * old_scale + tl.sum(s * scale, axis=0)
        best = new_best
    # All others at -inf: the first listed that is not the best.
    second_at = tl.where(second == low, tl.where(best_at == 0, 1, 0), second_at)
    is_good = (mass == mass) & (i < active)
    nan = float("nan")
    lse = tl.where(best == low, low, best + tl.log(mass))
    h = tl.where(best == low, 0.0, tl.log(mass) - weighted / mass)
    if HAS_VOCABULARY:
        best_at = tl.load(vocabulary + best_at)
        second_at = tl.load(vocabulary + second_at)
    tl.store(tokens + 2 * i, tl.where(is_good, best_at, 0).to(tl.int64))
    tl.store(tokens + 2 * i + 1, tl.where(is_good, second_at, 0).to(tl.int64))
    tl.store(values + 2 * i, tl.where(is_good, best, nan))
    tl.store(values + 2 * i + 1, tl.where(is_good, second, nan))
    tl.store(normaliser + i, tl.where(is_good, lse, nan))
    tl.store(entropy + i, tl.where(is_good, h, nan))


def launch(
    hidden: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    eps: float,
    vocabulary: Tensor | None,
    softcap: float,
    rows: Tensor | None,
    count: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    tile: Tile | None = None,
) -> None:
    """Fills ``outputs`` (fields of a `HeadReading`) in two launches; arguments as `exit_head`."""
    check_launch("exit_head", hidden, weight, gain)
    total = outputs[0].shape[0]
    if total == 0:
        return
    hidden = hidden.contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    vocab = weight.shape[0] if vocabulary is None else vocabulary.numel()
    # One row needs no matrix unit: its program multiplies and adds.
    block_r = 1 if total == 1 else power_of_two(total, least=16, most=64)
    if tile is None:
        # Exact float32 products keep both factors in registers: a smaller tile does not spill.
        wide = weight.dtype == torch.float32
        tile = TILES_ONE_ROW[0] if total == 1 else Tile(32, 32) if wide else TILES[0]
    blocks = -(-vocab // tile.block_n)
    scores = hidden.new_empty((4, total, blocks), dtype=torch.float32)
    places = hidden.new_empty((2, total, blocks), dtype=torch.int32)
    flags = {"HAS_VOCABULARY": vocabulary is not None, "HAS_ROWS": rows is not None}
    # Row blocks run fastest: those that share weights follow each other, and find them cached.
    _partial_kernel[(-(-total // block_r), blocks)](
        hidden, weight, gain, vocabulary, rows, count, scores, places,
        total, vocab, hidden.shape[1], weight.stride(0), eps, softcap, blocks,
        BLOCK_R=block_r, HAS_GAIN=gain is not None, HAS_CAP=softcap != 0.0,
        **flags, **tile.launch(),
    )  # fmt: skip
    _combine_kernel[(total,)](
        scores, places, vocabulary, count, *outputs, total, vocab, blocks,
        CHUNK=power_of_two(blocks, least=16, most=COMBINE_CHUNK), **flags,
    )  # fmt: skip
