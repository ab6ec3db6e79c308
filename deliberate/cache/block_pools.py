"""The memory of a cache in blocks: for each layer one tensor of keys and one of values."""

from __future__ import annotations

import torch
from torch import Tensor

from deliberate.utils.errors import DeliberateError

# Where memory must be there when it is asked for, a pool that is too short is made longer by this
# part of itself, at least by what is needed.
GROWTH = 16


class BlockPools:
    """Keys and values of each layer, ``[kv_heads, slots, head_dim]``.

    On a CPU a layer's tensors are made once, as long as the blocks can ever become: the system
    backs pages with memory when they are first written, so what lies behind the highest block that
    was used takes none. Elsewhere they are made longer as blocks need it, and copied.

    Slots of block b are (b + 1) * block_size and on; the first block_size slots hold zeros and
    stand for what no row holds, so that what is read of them is finite whatever the blocks hold.
    Within a block, and across blocks of rising numbers, the keys of one head follow one another.

    Args:
        num_layers: number of layers; a layer's tensors are made by `require`.
        block_size: tokens a block.

    Attributes:
        block_size: as given.
        generation: changes whenever a tensor is made or made longer.
    """

    def __init__(self, num_layers: int, block_size: int) -> None:
        self.block_size = block_size
        self.generation = 0
        self._blocks = [0] * num_layers  # that were asked for
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    @property
    def nbytes(self) -> int:
        """Bytes of memory of all pools: on a CPU those of the blocks that were asked for."""
        total = 0
        for pools in (self._keys, self._values):
            for pool, blocks in zip(pools, self._blocks, strict=True):
                if pool is not None:
                    lazy = pool.device.type == "cpu"
                    slots = (blocks + 1) * self.block_size if lazy else pool.shape[1]
                    total += pool.shape[0] * slots * pool.shape[2] * pool.element_size()
        return total

    def has(self, layer: int) -> bool:
        """Whether a layer's tensors have been made."""
        return self._keys[layer] is not None

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer.

        Raises:
            DeliberateError: the layer was never written.
        """
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            raise DeliberateError(f"layer {layer} of the cache has never been written")
        return keys, values

    def require(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Makes a layer's tensors for heads, dtype and device of ``[R, kv_heads, T, head_dim]``."""
        if self._keys[layer] is not None:
            return
        self.generation += 1
        # Outside inference mode, so that compiled code may write to them too.
        with torch.inference_mode(False), torch.no_grad():
            for pools, like in ((self._keys, keys), (self._values, values)):
                shape = (like.shape[1], self.block_size, like.shape[3])
                pools[layer] = torch.zeros(shape, dtype=like.dtype, device=like.device)

    def fit(self, layer: int, blocks: int, limit: int) -> None:
        """Makes a layer's tensors long enough for so many blocks, and not for more than `limit`."""
        keys, values = self.of(layer)
        size = self.block_size
        self._blocks[layer] = max(self._blocks[layer], blocks)
        held = keys.shape[1] // size - 1
        if blocks <= held:
            return
        self.generation += 1
        lazy = keys.device.type == "cpu"
        wanted = limit if lazy else min(max(blocks, held + held // GROWTH), limit)
        slots = (wanted + 1) * size
        with torch.inference_mode(False), torch.no_grad():
            for pools, old in ((self._keys, keys), (self._values, values)):
                shape = (old.shape[0], slots, old.shape[2])
                # Zeros would be written, and so take memory. Nothing is read before it is written
                # but the first slots, and what attention multiplies and then leaves out.
                make = torch.empty if lazy else torch.zeros
                longer = make(shape, dtype=old.dtype, device=old.device)
                longer[:, : old.shape[1]] = old
                pools[layer] = longer

    def copy(self, layer: int, source: int, target: int) -> None:
        """Copies all that a block holds in a layer to another block."""
        size = self.block_size
        for pool in self.of(layer):
            pool[:, (target + 1) * size : (target + 2) * size] = pool[
                :, (source + 1) * size : (source + 2) * size
            ]
