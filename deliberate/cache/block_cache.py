"""Key/value cache in blocks: rows that come and go, share beginnings, and take what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from deliberate.cache.block_pools import BlockPools
from deliberate.cache.block_tables import BlockTables
from deliberate.cache.kv_cache import KeysWritten, OutOfBlocks, SegmentCache
from deliberate.cache.layer_groups import FREED, groups_by_window
from deliberate.utils.errors import DeliberateError

if TYPE_CHECKING:
    from deliberate.cache.attention_metadata import StepContext

BLOCK_SIZE = 16


class _Reading(NamedTuple):
    """Where a pass writes and reads in the layers of one group.

    Attributes:
        real: int64 ``[n]``, of the R * q tokens of the pass those that are no padding; None: all.
        write: int64 ``[n]``, their slots.
        read: int64 ``[R * keys]``, slots of all keys of all rows; None where `span` says it.
        span: first slot of the keys of the only row, where they lie one after another.
        keys: of each row.
    """

    real: Tensor | None
    write: Tensor
    read: Tensor | None
    span: int
    keys: int


class BlockCache(SegmentCache):
    """A `SegmentCache` whose rows lie in blocks of a common pool.

    `pools` has the memory, as much as the highest block that was ever used needs. Off a CPU it may
    be 1/16 more; while pools grow there, one layer's at a time is held twice.

    The numbers of rows stay while they are open. A uniform pass is one of all open rows. Padding of
    a ragged pass is not written.

    `update` returns keys and values gathered in the order of positions, ``[R, kv_heads, T,
    head_dim]``, a view where the only row of a pass lies in blocks that follow one another.

    Args:
        windows: sliding window of each layer in tokens, 0 for none.
        blocks: blocks of each layer at most; `OutOfBlocks` is raised before it would take more.
        block_size: tokens a block.
        reuse_key: whatever makes keys and values of the same tokens differ between models.
        share: whether rows take up full blocks of others that begin with the same tokens.
        max_rows: rows that may be open at once, and then `batch`; 0: any number.

    References: Kwon et al., arXiv:2309.06180 (blocks, copy-on-write); Zheng et al.,
    arXiv:2312.07104 (prefix tree).
    """

    def __init__(
        self,
        windows: Sequence[int],
        blocks: int,
        *,
        block_size: int = BLOCK_SIZE,
        reuse_key: str = "",
        share: bool = True,
        max_rows: int = 0,
    ) -> None:
        groups = groups_by_window(windows)
        self.tables = BlockTables(groups, block_size, blocks, reuse_key=reuse_key, share=share)
        self.block_size = block_size
        self._group_of = [
            next(i for i, group in enumerate(groups) if layer in group.layers)
            for layer in range(len(windows))
        ]
        self.pools = BlockPools(len(windows), block_size)
        self._ctx: StepContext | None = None
        self._rows: tuple[int, ...] = ()
        self._starts: tuple[int, ...] = ()
        self._ends: tuple[int, ...] = ()
        self._readings: dict[int, _Reading] = {}
        self._slots_of: dict[tuple[int, int], tuple[int, Tensor]] = {}
        self._write_only = False
        self._max_rows = max_rows
        self._fitted = [0] * len(groups)  # blocks that the pools of each group have room for

    # -- rows --------------------------------------------------------------------------------------

    def open_row(
        self, capacity_hint: int, prompt: Sequence[int] = (), reuse_key: str | None = None
    ) -> int:
        """As `SegmentCache.open_row`; the row may hold a published beginning of the prompt.

        Nothing is reserved for `capacity_hint`: ask `can_open` first, and be ready for
        `OutOfBlocks` at the beginning of a pass.

        Args:
            reuse_key: in place of the cache's own, as for a row whose adapter is another.
        """
        if self._max_rows and len(self.tables.open_rows) >= self._max_rows:
            raise OutOfBlocks(f"all {self._max_rows} rows of the cache are open: close one first")
        return self.tables.open(prompt, reuse_key)

    def close_row(self, row: int) -> None:
        """As `SegmentCache.close_row`; published blocks stay until their space is needed."""
        self.tables.close(row)

    def fork_row(self, row: int) -> int:
        """Opens a row that holds what another holds, without copying it."""
        return self.tables.fork(row)

    def publish(self, row: int, tokens: Sequence[int]) -> int:
        """Lets later rows take up this row's full blocks; see `BlockTables.publish`.

        The tokens of the prompt that a row was opened with are published without it.
        """
        return self.tables.publish(row, tokens)

    def published_tokens(self, prompt: Sequence[int], reuse_key: str | None = None) -> int:
        """Tokens of a prompt that a row opened with it would hold from the start."""
        return self.tables.published_tokens(prompt, reuse_key)

    @property
    def free_blocks(self) -> int:
        """Blocks that can be used, those that are only kept for reuse included."""
        return self.tables.free_blocks

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a row of so many tokens takes."""
        return self.tables.blocks_for(tokens)

    def can_open(self, tokens: int) -> bool:
        """Whether a row of so many tokens can be opened and filled now."""
        full = self._max_rows and len(self.tables.open_rows) >= self._max_rows
        return not full and self.blocks_for(tokens) <= self.free_blocks

    def keep(self, rows: Sequence[int]) -> None:
        """Closes all rows but these, renumbered in the given order."""
        self.tables.renumber(rows)
        self._ctx = None

    # -- lengths -----------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.tables.num_layers

    @property
    def batch(self) -> int:
        """Number of rows that may be open, or, without a limit, of those that are."""
        return self._max_rows or len(self.tables.open_rows)

    def row_lengths(self, row: int) -> list[int]:
        """Tokens held by each layer in one row, first layer first (a copy)."""
        return list(self.tables.lengths(row))

    def length(self, layer: int, row: int = 0) -> int:
        """Tokens held by one layer in one row."""
        return self.tables.lengths(row)[layer]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the first open row in a layer, under the name that transformers uses."""
        return self.tables.lengths(self.tables.open_rows[0])[layer_idx]

    def crop(self, length: int, row: int | None = None) -> None:
        """Drops the tokens of a row (None: all) at ``length`` and after, and their blocks.

        Raises:
            DeliberateError: a layer with a sliding window has freed what the next token needs.
        """
        if length < 0:
            raise DeliberateError(f"cannot crop a cache to {length} tokens: it must be >= 0")
        for one in self.tables.open_rows if row is None else (row,):
            self.tables.crop(one, length)

    def checkpoint(self, row: int) -> tuple[int, ...]:
        """What `rollback` needs to bring a row back to what it holds now."""
        return self.tables.checkpoint(row)

    def rollback(self, row: int, checkpoint: Sequence[int]) -> None:
        """Drops what was added to a row since a checkpoint; see `BlockTables.rollback`."""
        self.tables.rollback(row, checkpoint)

    def check(self) -> None:
        """Raises RuntimeError where lengths rise with depth or blocks are not accounted for."""
        self.tables.check()

    @property
    def bytes_allocated(self) -> int:
        """Bytes of memory of all pools up to the highest block that was ever used."""
        return self.pools.nbytes

    # -- passes ------------------------------------------------------------------------------------

    def begin(self, ctx: StepContext, first: int, last: int, *, write_only: bool = False) -> None:
        """As `SegmentCache.begin`; blocks for the pass are taken here.

        Raises:
            OutOfBlocks: too few blocks are free: nothing was written, and no length changed.
        """
        self._ctx, self._write_only = ctx, write_only
        self._readings.clear()
        if ctx.ragged:
            self._rows, self._starts = ctx.row_ids, ctx.starts
            self._ends = tuple(s + c for s, c in zip(ctx.starts, ctx.counts, strict=True))
        else:
            self._rows = tuple(self.tables.open_rows)
            self._starts = (ctx.start,) * len(self._rows)
            self._ends = (ctx.start + ctx.positions.shape[1],) * len(self._rows)
        if first >= last:
            return
        for row, start in zip(self._rows, self._starts, strict=True):
            lengths = self.tables.lengths(row)
            if not lengths[first] == start == lengths[last - 1]:
                raise RuntimeError(
                    f"a pass from position {start} of row {row} through layers "
                    f"{first}..{last - 1} meets {lengths[first]}..{lengths[last - 1]} cached tokens"
                )
        for row, start, end in zip(self._rows, self._starts, self._ends, strict=True):
            self._prepare(row, start, end, first, last)
            if write_only:
                self.tables.mark_lossy(row, start)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """As `SegmentCache.update`: ``[R, kv_heads, q, d]`` in, ``[R, kv_heads, T, d]`` out."""
        self.pools.require(layer_idx, key_states, value_states)
        self._fit(layer_idx)
        keys, values = self.pools.of(layer_idx)
        reading = self._reading(self._group_of[layer_idx], keys.device)
        for pool, states in ((keys, key_states), (values, value_states)):
            new = states.transpose(0, 1).flatten(1, 2)
            if reading.real is not None:
                new = new.index_select(1, reading.real)
            pool.index_copy_(1, reading.write, new)
        for row, end in zip(self._rows, self._ends, strict=True):
            self.tables.advance(row, end, layer_idx, layer_idx + 1)
        if self._write_only:
            raise KeysWritten
        return self._gathered(keys, reading), self._gathered(values, reading)

    def skip(self, first: int, row: int, length: int) -> None:
        """As `SegmentCache.skip`; the slots that stay unwritten hold zeros."""
        last = self.num_layers
        start = self.length(first, row)
        if length > start:
            self._prepare(row, start, length, first, last)
            for layer in range(first, last):
                if self.pools.has(layer):
                    at = self._row_slots(row, self._group_of[layer])[start:length]
                    for pool in self.pools.of(layer):
                        pool.index_fill_(1, at.to(pool.device), 0.0)
            self.tables.mark_lossy(row, start)
        self.tables.advance(row, length, first, last)

    def states(self, layer: int, row: int | None = None) -> tuple[Tensor, Tensor]:
        """Copies ``[1 or B, kv_heads, T, head_dim]`` of what a layer holds for a row (None: all).

        Positions that a row does not hold, and those behind a window, are zeros.

        Raises:
            DeliberateError: the layer was never written.
        """
        keys, values = self.pools.of(layer)
        rows = self.tables.open_rows if row is None else [row]
        ends = [self.length(layer, one) for one in rows]
        at = self._read_slots(rows, ends, max(ends), self._group_of[layer])
        at = at.to(keys.device)
        return tuple(  # type: ignore[return-value]
            pool.index_select(1, at)
            .view(pool.shape[0], len(rows), -1, pool.shape[2])
            .transpose(0, 1)
            for pool in (keys, values)
        )

    def adopt(self, layer: int, row: int, slot: int, keys: Tensor, values: Tensor) -> None:
        """As `SegmentCache.adopt`; what was made elsewhere is not published."""
        end = slot + keys.shape[1]
        self.pools.require(layer, keys.unsqueeze(0), values.unsqueeze(0))
        self._prepare(row, slot, end, layer, layer + 1)
        at = self._row_slots(row, self._group_of[layer])[slot:end]
        for pool, new in zip(self.pools.of(layer), (keys, values), strict=True):
            pool.index_copy_(1, at.to(pool.device), new)
        self.tables.mark_lossy(row, 0)
        self.tables.advance(row, end, layer, layer + 1)

    # -- blocks and slots --------------------------------------------------------------------------

    def _prepare(self, row: int, start: int, end: int, first: int, last: int) -> None:
        """Takes blocks for a row, and makes the copies that its writes need."""
        if self.tables.is_prepared(row, start, end, first, last):
            return
        copies = self.tables.prepare(row, start, end, first, last)
        for index, group in enumerate(self.tables.groups):
            peak = self.tables.allocators[index].peak
            if peak > self._fitted[index]:
                for layer in filter(self.pools.has, group.layers):
                    self._fit(layer)
                self._fitted[index] = peak
        for index, source, target in copies:
            for layer in filter(self.pools.has, self.tables.groups[index].layers):
                self.pools.copy(layer, source, target)

    def _fit(self, layer: int) -> None:
        """Makes the pools of a layer as long as the blocks in use need."""
        allocator = self.tables.allocators[self._group_of[layer]]
        self.pools.fit(layer, allocator.peak, allocator.limit)

    def _row_slots(self, row: int, group: int) -> Tensor:
        """Slots of all positions that a row has blocks for, int64, on the CPU; 0 where freed."""
        version = self.tables.version(row)
        known = self._slots_of.get((row, group))
        if known is None or known[0] != version:
            size = self.block_size
            blocks = torch.tensor(self.tables.table(row, group), dtype=torch.int64)
            slots = ((blocks + 1) * size).unsqueeze(1) + torch.arange(size)
            slots[blocks == FREED] = 0
            known = self._slots_of[row, group] = version, slots.flatten()
        return known[1]

    def _read_slots(
        self, rows: Sequence[int], ends: Sequence[int], keys: int, group: int
    ) -> Tensor:
        """Slots ``[R * keys]`` of positions 0..keys-1 of each row; 0 where a row holds nothing."""
        at = torch.zeros((len(rows), keys), dtype=torch.int64)
        for index, (row, end) in enumerate(zip(rows, ends, strict=True)):
            at[index, :end] = self._row_slots(row, group)[:end]
        return at.flatten()

    def _reading(self, group: int, device: torch.device) -> _Reading:
        reading = self._readings.get(group)
        if reading is None:
            reading = self._readings[group] = self._new_reading(group, device)
        return reading

    def _new_reading(self, group: int, device: torch.device) -> _Reading:
        ctx = self._ctx
        assert ctx is not None
        q = ctx.positions.shape[1]
        counts = [end - start for start, end in zip(self._starts, self._ends, strict=True)]
        real = None
        if min(counts) < q:
            chosen = [i * q + j for i, count in enumerate(counts) for j in range(count)]
            real = torch.tensor(chosen, device=device)
        write = torch.cat(
            [
                self._row_slots(row, group)[start:end]
                for row, start, end in zip(self._rows, self._starts, self._ends, strict=True)
            ]
        ).to(device)
        keys = ctx.keys if ctx.ragged else self._ends[0]
        table = self.tables.table(self._rows[0], group)
        if len(self._rows) == 1 and keys == self._ends[0] and _consecutive(table):
            return _Reading(real, write, None, (table[0] + 1) * self.block_size, keys)
        read = self._read_slots(self._rows, self._ends, keys, group).to(device)
        return _Reading(real, write, read, 0, keys)

    def _gathered(self, pool: Tensor, reading: _Reading) -> Tensor:
        if reading.read is None:
            return pool.narrow(1, reading.span, reading.keys).unsqueeze(0)
        heads, _, dim = pool.shape
        found = pool.index_select(1, reading.read)
        return found.view(heads, len(self._rows), reading.keys, dim).transpose(0, 1)


def _consecutive(table: Sequence[int]) -> bool:
    return FREED not in table and table == list(range(table[0], table[0] + len(table)))
