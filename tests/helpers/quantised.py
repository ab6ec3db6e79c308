"""Matrices in GGUF's blocks for tests: random ones, and what a product with them is in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deliberate.kernels.block_panels import in_panels
from deliberate.kernels.blocks import BlockFormat, BlockPart, BlockWeight
from deliberate.kernels.panels import bfloat16_panels, int8_panels

# Where a block holds a float16, in bytes; the others may have any value.
_HALVES = {
    BlockFormat.Q4_0: (0,),
    BlockFormat.Q4_1: (0, 2),
    BlockFormat.Q8_0: (0,),
    BlockFormat.Q4_K: (0, 2),
    BlockFormat.Q6_K: (208,),
}
# Blocks in panels, and what they are made of.
LAID_OUT = {
    BlockFormat.Q4_0_PANELS: BlockFormat.Q4_0,
    BlockFormat.Q4_1_PANELS: BlockFormat.Q4_1,
    BlockFormat.Q8_0_PANELS: BlockFormat.Q8_0,
}


def random_part(
    n: int, k: int, chosen: BlockFormat, *, seed: int = 0, rotary: int = 0
) -> BlockPart:
    """Any bytes, with float16 of reasonable size where a block has some."""
    source = np.random.default_rng(seed)
    blocks = -(-k // chosen.weights)
    data = source.integers(0, 256, (n, blocks, chosen.bytes), dtype=np.uint8)
    for at in _HALVES[chosen]:
        half = (0.02 * source.normal(size=(n, blocks, 1))).astype(np.float16)
        data[..., at : at + 2] = half.view(np.uint8)
    return BlockPart(torch.from_numpy(data.reshape(n, -1)), chosen, rotary)


def random_blocks(n: int, k: int, chosen: BlockFormat, *, seed: int = 0) -> BlockWeight:
    """A matrix of one part."""
    if chosen in LAID_OUT:
        return BlockWeight((in_panels(random_part(n, k, LAID_OUT[chosen], seed=seed)),), k)
    if chosen.in_panels:
        source = torch.Generator().manual_seed(seed)
        if chosen is BlockFormat.BF16_PANELS:
            return bfloat16_panels(torch.randn(n, k, generator=source))
        whole = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=source)
        return int8_panels(whole, 0.02 * torch.rand(n, generator=source))
    return BlockWeight((random_part(n, k, chosen, seed=seed),), k)


def rounded(x: Tensor) -> Tensor:
    """Activations ``[R, K]`` as the kernels take them, float64: whole numbers up to 127 times a
    scale for every 32 of them."""
    rows, k = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -k % 32)).view(rows, -1, 32)
    largest = padded.abs().amax(-1, keepdim=True)
    # A number divided by a tensor would be its reciprocal times the number, and round twice.
    whole = (padded * torch.div(torch.tensor(127.0), largest.clamp(min=1e-30))).round()
    scale = torch.where(largest > 1e-30, largest / 127.0, 0.0)
    return (whole.double() * scale.double()).view(rows, -1)[:, :k]
