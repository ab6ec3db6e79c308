"""Blocks of 4 and 8 bits in panels of 16 rows, as the C++ kernels multiply them fastest.

The weights are those of the blocks, to the last bit; only where they lie differs: the same columns
of 16 rows lie together, so sums stay in lanes. `kernels/cpp/blocks.h` has the layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deliberate.kernels.blocks import BlockFormat, BlockPart
from deliberate.kernels.panels import ROWS

# Rows at a time: what is made on the way is several times what it is made of.
_AT_ONCE = 16 * ROWS
_PANELS = {
    BlockFormat.Q4_0: BlockFormat.Q4_0_PANELS,
    BlockFormat.Q4_1: BlockFormat.Q4_1_PANELS,
    BlockFormat.Q8_0: BlockFormat.Q8_0_PANELS,
}


def in_panels(part: BlockPart) -> BlockPart:
    """A copy of a part in panels, rows in the order of their outputs; a part whose format has none
    (Q4_K, Q6_K) is returned as it is."""
    chosen = _PANELS.get(part.format)
    if chosen is None:
        return part
    made, at = torch.empty(part.data.numel(), dtype=torch.uint8), 0
    for rows in part.data.split(ROWS * part.rotary if part.rotary else _AT_ONCE):
        if part.rotary:
            rows = rows.unflatten(0, (-1, part.rotary // 2, 2)).transpose(1, 2).flatten(0, 2)
        whole = len(rows) // ROWS * ROWS
        for panels in (rows[:whole].unflatten(0, (-1, ROWS)), rows[None, whole:]):
            if panels.numel():
                laid_out = _panels(panels, chosen).flatten()
                made[at : at + len(laid_out)] = laid_out
                at += len(laid_out)
    return BlockPart(made.view(part.data.shape), chosen)


def _panels(panels: Tensor, chosen: BlockFormat) -> Tensor:
    """Blocks ``[panels, rows, bytes]`` -> ``[panels, groups, rows * bytes of a group]``."""
    blocks = panels.unflatten(2, (-1, chosen.bytes))
    halves = 4 if chosen is BlockFormat.Q4_1_PANELS else 2
    numbers = blocks[..., halves:]
    if chosen is BlockFormat.Q8_0_PANELS:
        numbers = numbers ^ 128
    # [panel, row, group, vector, bytes] -> [panel, group, vector, row, bytes].
    lying = [
        one.unflatten(-1, (-1, size)).permute(0, 2, 3, 1, 4).flatten(2)
        for one, size in ((numbers, 4), (blocks[..., :halves], 2))
    ]
    return torch.cat(lying, dim=2)
