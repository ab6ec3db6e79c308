"""A cache in blocks that the C++ kernels read and write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deliberate.cache.attention_metadata import StepContext
from deliberate.cache.block_cache import BLOCK_SIZE, BlockCache
from deliberate.cache.int8_cache import packed, unpacked
from deliberate.cache.layer_groups import FREED
from deliberate.config import KVStorage, as_kv_storage
from deliberate.executors.fused.weights import LayerShape
from deliberate.kernels.native_arguments import SCALE_BYTES
from deliberate.kernels.native_pools import PooledKeysValues, SequenceRuns, SlotRun


class NativeBlockCache(BlockCache):
    """A `BlockCache` whose pools exist from the start and whose tables the kernels are given.

    A sequence whose blocks follow one another is one run of slots, read as fast as a row of its own
    buffer; what the kernels compute does not depend on the runs.

    Args:
        shapes: of the layers.
        like: any tensor of the dtype and on the device that keys and values have.
        blocks, block_size, reuse_key, share, max_rows: as for `BlockCache`.
        storage: of keys and values; in 8 bits they are packed as in `deliberate.cache.int8_cache`,
            and `like` gives the dtype of what is taken over and given out.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        like: Tensor,
        blocks: int,
        *,
        block_size: int = BLOCK_SIZE,
        reuse_key: str = "",
        share: bool = True,
        max_rows: int = 0,
        storage: KVStorage | str = KVStorage.NATIVE,
    ) -> None:
        self.storage = as_kv_storage(storage)
        windows = [shape.window or 0 for shape in shapes]
        super().__init__(
            windows,
            blocks,
            block_size=block_size,
            reuse_key=reuse_key,
            share=share,
            max_rows=max_rows,
        )
        self._windows = windows
        self._dtype = like.dtype
        for layer, shape in enumerate(shapes):
            entry, dtype = shape.head_dim, like.dtype
            if self.storage is KVStorage.INT8:
                entry, dtype = entry + SCALE_BYTES, torch.uint8
            new = like.new_empty((1, shape.kv_heads, 0, entry), dtype=dtype)
            self.pools.require(layer, new, new)
        self._addresses: tuple[int, PooledKeysValues] | None = None
        self._runs_of: dict[int, tuple[int, SequenceRuns]] = {}

    def addresses(self) -> PooledKeysValues:
        """Where the pools of all layers are."""
        known = self._addresses
        if known is None or known[0] != self.pools.generation:
            pools = [self.pools.of(layer) for layer in range(self.num_layers)]
            made = PooledKeysValues(pools, self._group_of, self._windows)
            known = self._addresses = self.pools.generation, made
        return known[1]

    def states(self, layer: int, row: int | None = None) -> tuple[Tensor, Tensor]:
        """As `BlockCache.states`, in the model's dtype."""
        keys, values = super().states(layer, row)
        if self.storage is KVStorage.INT8:
            return unpacked(keys, self._dtype), unpacked(values, self._dtype)
        return keys, values

    def adopt(self, layer: int, row: int, slot: int, keys: Tensor, values: Tensor) -> None:
        """As `BlockCache.adopt`; what is taken over is rounded where the pools are."""
        if self.storage is KVStorage.INT8:
            keys, values = packed(keys), packed(values)
        super().adopt(layer, row, slot, keys, values)

    def runs(self, row: int) -> SequenceRuns:
        """Where a row's slots are."""
        version = self.tables.version(row)
        known = self._runs_of.get(row)
        if known is None or known[0] != version:
            groups = range(len(self.tables.groups))
            made = SequenceRuns(
                [slot_runs(self.tables.table(row, one), self.block_size) for one in groups]
            )
            known = self._runs_of[row] = version, made
        return known[1]

    def reserve(self, tokens: int) -> None:
        """Nothing: `begin` has taken the blocks of the pass."""

    def reserve_steps(self, last: int, start: int, end: int, row: int) -> None:
        """Takes blocks for positions start..end-1 of a row in layers 0..last-1."""
        self._prepare(row, start, end, 0, last)

    def advance(self, ctx: StepContext, first: int, last: int) -> None:
        """After a pass has been written: layers first..last-1 hold its tokens."""
        for row, end in zip(self._rows, self._ends, strict=True):
            self.tables.advance(row, end, first, last)

    def extend(self, last: int, tokens: int, row: int = 0) -> None:
        """Layers 0..last-1 hold so many tokens more of a row."""
        self.tables.advance(row, self.length(0, row) + tokens, 0, last)


def slot_runs(table: Sequence[int], block_size: int) -> list[SlotRun]:
    """Runs of slots of a block table; blocks of rising numbers are one run."""
    runs: list[SlotRun] = []
    begun = 0
    for index, block in enumerate(table):
        if block == FREED or (index + 1 < len(table) and table[index + 1] == block + 1):
            begun = index + 1 if block == FREED else begun
            continue
        count = (index + 1 - begun) * block_size
        runs.append(SlotRun(begun * block_size, (table[begun] + 1) * block_size, count))
        begun = index + 1
    return runs
