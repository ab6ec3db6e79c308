"""Float and int8 matrices in panels of 16 rows, as the C++ kernels multiply them fastest.

A panel holds pairs of columns of its 16 rows one after another, so that one instruction (AVX-512's
``vdpbf16ps``) multiplies a pair of all 16 by a pair of activations and sums stay in lanes.
`kernels/cpp/blocks.h` has the layout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from deliberate.kernels import border
from deliberate.kernels.blocks import BlockFormat, BlockPart, BlockWeight

ROWS = 16
# Rows at a time: a copy of a whole head would be as large as it.
_AT_ONCE = 64 * ROWS


def bfloat16_panels(weight: Tensor) -> BlockWeight:
    """A matrix ``[N, K]`` of any floating dtype, rounded to bfloat16."""
    data = _laid_out(weight.detach(), BlockFormat.BF16_PANELS, _bfloat16)
    return BlockWeight((BlockPart(data, BlockFormat.BF16_PANELS),), weight.shape[1])


def int8_panels(weight: Tensor, scale: Tensor) -> BlockWeight:
    """Whole numbers ``[N, K]`` from -127 to 127, int8, each row with a scale of ``[N]``.

    Raises:
        BorderError: a number is -128.
    """
    least = int(weight.min()) if weight.numel() else 0
    border.within(least, -127, 127, "the least of a matrix in int8")
    data = _laid_out(weight, BlockFormat.INT8_PANELS, _int8)
    scales = scale.to(torch.float32).contiguous().view(torch.uint8)
    data.view(-1)[data.numel() - len(scales) :] = scales
    return BlockWeight((BlockPart(data, BlockFormat.INT8_PANELS),), weight.shape[1])


def _laid_out(weight: Tensor, chosen: BlockFormat, panels: Callable[[Tensor], Tensor]) -> Tensor:
    """Panels of all rows, some at a time, in a matrix ``[N, row bytes]`` that may be longer."""
    data = torch.empty((weight.shape[0], chosen.row_bytes(weight.shape[1])), dtype=torch.uint8)
    flat, at = data.view(-1), 0
    for rows in weight.split(_AT_ONCE):
        laid_out = panels(rows)
        flat[at : at + len(laid_out)] = laid_out
        at += len(laid_out)
    return data


def _bfloat16(rows: Tensor) -> Tensor:
    """Panels of some rows, one after another, as bytes."""
    padded = F.pad(rows.to(torch.bfloat16), (0, -rows.shape[1] % 2))
    whole = len(rows) // ROWS * ROWS
    full = padded[:whole].unflatten(1, (-1, 2)).unflatten(0, (-1, ROWS)).transpose(1, 2)
    rest = padded[whole:].unflatten(1, (-1, 2)).transpose(0, 1)
    return torch.cat([part.reshape(-1).view(torch.uint8) for part in (full, rest)])


def _int8(rows: Tensor) -> Tensor:
    """As `_bfloat16`, of int8."""
    signed = torch.where(rows < 0, 128 - rows.to(torch.int16), rows.to(torch.int16))
    padded = F.pad(signed.to(torch.uint8), (0, -rows.shape[1] % 4))
    whole = len(rows) // ROWS * ROWS
    # [panel, four rows, row, two pairs, pair, column] -> pairs first, then the fours of rows.
    full = padded[:whole].unflatten(1, (-1, 2, 2)).unflatten(0, (-1, 4, 4))
    rest = padded[whole:].unflatten(1, (-1, 2)).transpose(0, 1)
    return torch.cat([full.permute(0, 3, 1, 4, 2, 5).reshape(-1), rest.reshape(-1)])
