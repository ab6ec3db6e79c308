"""Rounds float matrices to blocks: 8 bits (Q8_0) and 4 bits (Q4_1), laid out as in GGUF files.

For 4 bits Q4_1 is chosen. Its blocks of 32 take any width, where Q4_K's of 256 would fill a width
of 576 up by a third; and it has all 16 levels between the smallest and the largest weight of a
block, where Q4_0's lie around zero, for half a bit a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deliberate.kernels.blocks import BlockFormat, BlockPart

# Rows at a time: the intermediate results of a whole matrix would be many times it.
_ROWS = 1024
# Ranges of a 4-bit block that are tried, as shares of all that lies between its least and largest.
_SHARES = (1.0, 0.94, 0.88)


def quantise_blocks(weight: Tensor, chosen: BlockFormat) -> BlockPart:
    """A matrix ``[N, K]`` in blocks; the last block of a row is filled up with its last weight,
    which widens no range and is multiplied with nothing.

    Args:
        weight: any floating dtype.
        chosen: Q8_0 or Q4_1.
    """
    rounded = {BlockFormat.Q8_0: _eight_bits, BlockFormat.Q4_1: _four_bits}[chosen]
    parts = []
    for rows in weight.detach().cpu().split(_ROWS):
        rest = rows[:, -1:].expand(-1, -rows.shape[1] % 32)
        blocks = torch.cat([rows, rest], dim=1).float().view(len(rows), -1, 32)
        parts.append(rounded(blocks).view(len(rows), -1))
    return BlockPart(torch.cat(parts), chosen)


def _eight_bits(blocks: Tensor) -> Tensor:
    """``[N, blocks, 32]`` -> uint8 ``[N, blocks, 34]``."""
    scale = _half(blocks.abs().amax(-1, keepdim=True) / 127.0)
    whole = _divided(blocks, scale).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([_bytes(scale), whole.view(torch.uint8)], dim=-1)


def _four_bits(blocks: Tensor) -> Tensor:
    """``[N, blocks, 32]`` -> uint8 ``[N, blocks, 20]``.

    Of a few ranges, each with the scale and minimum that fit its whole numbers best (least
    squares), the one with the smallest squared error.
    """
    least, most = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for share in _SHARES:
        width = (most - least) * share
        start = least + (most - least - width) / 2
        whole = _divided(blocks - start, width / 15.0).round().clamp(0, 15)
        scale, minimum = map(_half, _fitted(blocks, whole, width / 15.0, start))
        # Whole numbers of the scale and minimum as they are stored.
        whole = _divided(blocks - minimum, scale).round().clamp(0, 15)
        error = (whole * scale + minimum - blocks).square().sum(-1, keepdim=True)
        if best is None:
            best = error, whole, scale, minimum
        else:
            better = error < best[0]
            now = (error, whole, scale, minimum)
            best = tuple(  # type: ignore[assignment]
                torch.where(better, one, other) for one, other in zip(now, best, strict=True)
            )
    assert best is not None
    _, whole, scale, minimum = best
    low, high = whole.to(torch.uint8).split(16, dim=-1)
    return torch.cat([_bytes(scale), _bytes(minimum), low | (high << 4)], dim=-1)


def _fitted(blocks: Tensor, whole: Tensor, scale: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum with the smallest squared error; as they were where all numbers agree."""
    mean, centre = blocks.mean(-1, keepdim=True), whole.mean(-1, keepdim=True)
    spread = (whole - centre).square().sum(-1, keepdim=True)
    slope = ((whole - centre) * (blocks - mean)).sum(-1, keepdim=True) / spread.clamp(min=1e-9)
    usable = (spread > 0) & (slope > 0)
    return torch.where(usable, slope, scale), torch.where(usable, mean - slope * centre, start)


def _half(x: Tensor) -> Tensor:
    """Rounded to what float16 holds, as float32."""
    return x.clamp(-65504.0, 65504.0).to(torch.float16).float()


def _bytes(x: Tensor) -> Tensor:
    return x.to(torch.float16).view(torch.uint8)


def _divided(x: Tensor, scale: Tensor) -> Tensor:
    """0 where the scale is."""
    return torch.where(scale > 0, x / torch.where(scale > 0, scale, 1.0), 0.0)
