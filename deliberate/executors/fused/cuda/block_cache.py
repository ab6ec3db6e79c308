"""A cache in blocks that the registry's ops read and write through tables on the device.

Pools, tables and what passes read and write have fixed addresses, so that graphs serve whichever
sequences come and go. The tables are those of `BlockTables`: a row of the device's copy is written
when its sequence has got other blocks, about once for every block of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deliberate.cache.attention_metadata import StepContext
from deliberate.cache.block_cache import BLOCK_SIZE, BlockCache
from deliberate.cache.layer_groups import FREED
from deliberate.executors.fused.cuda.graphs import SegmentGraphs
from deliberate.executors.fused.cuda.workspaces import Tables, Workspace, bucket
from deliberate.executors.fused.weights import LayerShape
from deliberate.utils.errors import DeliberateError

# Entry of a table on the device where a sequence has no block: nothing is read or written there.
NO_BLOCK = -1


class BlockWorkspace(Workspace):
    """Buffers and graphs of passes over pools of blocks; the pools are a cache's.

    Attributes:
        keys, values: of each layer, ``[blocks, kv_heads, block_size, D]``, views of its pools.
        tables: of each layer, int32 ``[rows, most blocks of a sequence]``; one for each group.
    """

    def __init__(
        self,
        pools: Sequence[tuple[Tensor, Tensor]],
        tables: Sequence[Tensor],
        block_size: int,
        like: Tensor,
        rotary: Tables,
        graphs: SegmentGraphs,
    ) -> None:
        self.keys = [_by_block(keys, block_size) for keys, _ in pools]
        self.values = [_by_block(values, block_size) for _, values in pools]
        self.tables = list(tables)
        rows, capacity = len(tables[0]), tables[0].shape[1] * block_size
        with torch.inference_mode(False), torch.no_grad():
            self.cos, self.sin = (part.contiguous() for part in rotary(capacity))
        self._begin(rows, capacity, like, graphs)


def _by_block(pool: Tensor, size: int) -> Tensor:
    return pool.view(pool.shape[0], -1, size, pool.shape[2]).transpose(0, 1)


class CudaBlockCache(BlockCache):
    """A `BlockCache` whose pools are as long as they may become from the start.

    Args:
        shapes: of the layers.
        like: any tensor of the dtype and on the device that keys and values have, last dimension
            that of hidden states.
        blocks, block_size, reuse_key, share: as for `BlockCache`.
        max_rows: rows that may be open at once, at least 1.
        rotary: makes the rotary tables.
        graphs: for passes over this cache.

    Attributes:
        workspace: what passes read and write.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        like: Tensor,
        blocks: int,
        rotary: Tables,
        graphs: SegmentGraphs,
        *,
        block_size: int = BLOCK_SIZE,
        reuse_key: str = "",
        share: bool = True,
        max_rows: int = 0,
    ) -> None:
        if max_rows < 1:
            raise DeliberateError(
                f"max_rows={max_rows}: a cache in blocks on this executor has buffers of fixed "
                "size; say how many rows may be open at once"
            )
        super().__init__(
            [shape.window or 0 for shape in shapes],
            blocks,
            block_size=block_size,
            reuse_key=reuse_key,
            share=share,
            max_rows=max_rows,
        )
        for layer, shape in enumerate(shapes):
            new = like.new_empty((1, shape.kv_heads, 0, shape.head_dim))
            self.pools.require(layer, new, new)
            self.pools.fit(layer, blocks, blocks)
        with torch.inference_mode(False):
            size = (bucket(max_rows), blocks)
            self._device_tables = [
                torch.full(size, NO_BLOCK, dtype=torch.int32, device=like.device)
                for _ in self.tables.groups
            ]
        pools = [self.pools.of(layer) for layer in range(len(shapes))]
        of_layers = [self._device_tables[group] for group in self._group_of]
        self.workspace = BlockWorkspace(pools, of_layers, block_size, like, rotary, graphs)
        self._written: dict[int, tuple[int, int]] = {}  # version and longest table of each row

    @property
    def pass_rows(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Rows of the pass that was begun, where each begins and how many tokens it has."""
        counts = tuple(end - start for start, end in zip(self._starts, self._ends, strict=True))
        return self._rows, self._starts, counts

    def place_tables(self) -> None:
        """Writes the tables of the pass's rows to the device where they have changed."""
        for row in self._rows:
            version, held = self.tables.version(row), self._written.get(row, (0, 0))
            if held[0] == version:
                continue
            tables = [self.tables.table(row, group) for group in range(len(self._device_tables))]
            longest = max(map(len, tables))
            for table, on_device in zip(tables, self._device_tables, strict=True):
                # What an earlier, longer table of this row had behind the end is overwritten.
                entries = [NO_BLOCK] * max(longest, held[1])
                # The first block of a pool is nobody's.
                entries[: len(table)] = [NO_BLOCK if b == FREED else b + 1 for b in table]
                new = torch.tensor(entries, dtype=torch.int32)
                on_device[row, : len(entries)].copy_(new)
            self._written[row] = version, longest

    def advance(self, ctx: StepContext, first: int, last: int) -> None:
        """After a pass has been written: layers first..last-1 hold its tokens."""
        for row, end in zip(self._rows, self._ends, strict=True):
            self.tables.advance(row, end, first, last)

    # -- passes that are not run by the ops ----------------------------------------------------

    def gathered(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Copies ``[R, kv_heads, tokens, D]`` of what the rows of the pass hold in a layer, room
        for the pass's own tokens included; what a row does not hold is 0."""
        keys, values = self.pools.of(layer)
        at = self._read_slots(self._rows, self._ends, tokens, self._group_of[layer])
        at = at.to(keys.device)
        return tuple(  # type: ignore[return-value]
            pool.index_select(1, at)
            .view(pool.shape[0], len(self._rows), tokens, pool.shape[2])
            .transpose(0, 1)
            .contiguous()
            for pool in (keys, values)
        )

    def scatter(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Takes the pass's own tokens from what `gathered` gave, after they were written there."""
        group = self._group_of[layer]
        index, position, slot = [], [], []
        for number, (row, start, end) in enumerate(
            zip(self._rows, self._starts, self._ends, strict=True)
        ):
            at = torch.arange(start, end)
            index.append(torch.full_like(at, number))
            position.append(at)
            slot.append(self._row_slots(row, group)[start:end])
        device = keys.device
        which, where, to = (torch.cat(part).to(device) for part in (index, position, slot))
        for pool, new in zip(self.pools.of(layer), (keys, values), strict=True):
            pool.index_copy_(1, to, new[which, :, where].transpose(0, 1))
