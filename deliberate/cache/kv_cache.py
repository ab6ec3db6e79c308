"""Key/value cache whose layers, and whose sequences, may hold different numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deliberate.config import KVStorage
from deliberate.utils.errors import DeliberateError

if TYPE_CHECKING:
    from deliberate.cache.attention_metadata import StepContext

MIN_CAPACITY = 64


class OutOfBlocks(DeliberateError):
    """A cache has no block, or no row, left for what was asked of it: close a row and try again."""


class KeysWritten(Exception):
    """Raised to stop a decoder layer once its keys and values are written."""


class SegmentCache:
    """Preallocated, growable KV cache with one length per layer and row, for inference.

    Pass it as the cache argument of a transformers decoder layer: the layer calls :meth:`update`
    and attends to what that returns. Keys and values have shape ``[B, kv_heads, T, head_dim]``;
    a token's slot is its position. Heads, dtype and device of a layer are those of its first
    update, when its buffers are allocated.

    A pass announced by :meth:`begin` may touch some rows only, each from its own length on. With
    all rows alike, appending writes into the buffer and returns views, so one decoding step costs
    the same at every context length; otherwise rows are scattered in and gathered out. A full
    buffer grows by doubling. Views of an earlier update stay readable until the layer is written
    below their end (after :meth:`crop`).

    Layers with sliding-window attention keep every token as well: the mask restricts what they
    attend to, and a rollback only shortens the length.

    Invariant: a row's lengths are non-increasing with depth, because a token reaches a layer only
    through those below it. :meth:`check` raises where it does not hold.
    """

    storage = KVStorage.NATIVE

    def __init__(self, num_layers: int, capacity: int = 0, batch: int = 1) -> None:
        """``capacity``: tokens to make room for at the first update of a layer."""
        if num_layers < 1:
            raise DeliberateError(f"a cache needs at least 1 layer, got num_layers={num_layers}")
        if capacity < 0:
            raise DeliberateError(f"cache capacity must be >= 0 tokens, got {capacity}")
        if batch < 1:
            raise DeliberateError(f"a cache needs at least 1 row, got batch={batch}")
        self._initial_capacity = capacity
        self._batch = batch
        self._lengths = [[0] * batch for _ in range(num_layers)]
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self._capacities = [0] * num_layers
        self._ragged: StepContext | None = None
        self._slots: Tensor | None = None
        self._row_column: Tensor | None = None
        self._write_only = False
        self._open: set[int] = set()

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self._lengths)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self._batch

    @property
    def lengths(self) -> list[int]:
        """Tokens held by each layer in row 0, first layer first (a copy)."""
        return self.row_lengths(0)

    def row_lengths(self, row: int) -> list[int]:
        """Tokens held by each layer in one row, first layer first (a copy)."""
        return [layer[row] for layer in self._lengths]

    def length(self, layer: int, row: int = 0) -> int:
        """Tokens held by one layer in one row."""
        return self._lengths[layer][row]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of row 0 in a layer, under the name that transformers uses."""
        return self._lengths[layer_idx][0]

    @property
    def bytes_allocated(self) -> int:
        """Bytes of all buffers, used slots or not."""
        return sum(b.nbytes for b in (*self._keys, *self._values) if b is not None)

    def open_row(
        self, capacity_hint: int, prompt: Sequence[int] = (), reuse_key: str | None = None
    ) -> int:
        """Takes an empty row that is not open, and returns its number, which it keeps until closed.

        Args:
            capacity_hint: tokens that the row may come to hold.
            prompt: its first tokens. A cache in blocks may hold keys and values of a beginning of
                them already: then `length` of every layer is not 0 but their number.
            reuse_key: rows share beginnings within the same key; here they share none.

        Raises:
            OutOfBlocks: every row is open.
        """
        for row in range(self._batch):
            if row not in self._open:
                self._open.add(row)
                self.crop(0, row)
                return row
        raise OutOfBlocks(f"all {self._batch} rows of the cache are open: close one first")

    def close_row(self, row: int) -> None:
        """Gives an open row back; its number may be used again.

        Raises:
            DeliberateError: the row is not open.
        """
        if row not in self._open:
            raise DeliberateError(f"row {row} of the cache is not open: {sorted(self._open)} are")
        self._open.remove(row)
        self.crop(0, row)

    @property
    def free_blocks(self) -> int:
        """Blocks that are free, in the unit of `blocks_for`: here rows that are not open."""
        return self._batch - len(self._open)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a row of so many tokens takes: here one, a row whose buffer grows."""
        return 1

    def can_open(self, tokens: int) -> bool:
        """Whether a row of so many tokens can be opened and filled now."""
        return self.blocks_for(tokens) <= self.free_blocks

    def begin(self, ctx: StepContext, first: int, last: int, *, write_only: bool = False) -> None:
        """Announces a pass through layers first..last-1; the updates that follow belong to it.

        Args:
            write_only: each update raises `KeysWritten` after writing.

        Raises:
            RuntimeError: a row does not hold exactly the tokens before its start.
        """
        if first < last:
            below, above = self._lengths[first], self._lengths[last - 1]
            rows = ctx.row_ids if ctx.ragged else range(self._batch)
            starts = ctx.starts if ctx.ragged else (ctx.start,) * self._batch
            for row, start in zip(rows, starts, strict=True):
                if not below[row] == start == above[row]:
                    raise RuntimeError(
                        f"a pass from position {start} of row {row} through layers "
                        f"{first}..{last - 1} meets {below[row]}..{above[row]} cached tokens"
                    )
        self._write_only = write_only
        if not ctx.ragged:
            self._ragged = None
        elif self._ragged is not ctx:
            self._ragged = ctx
            device = ctx.positions.device
            q = ctx.positions.shape[1]
            # Not ctx.positions: those may be clamped to a table of learned positions.
            starts_column = torch.tensor(ctx.starts, device=device).unsqueeze(1)
            self._slots = starts_column + torch.arange(q, device=device)
            rows_tensor = ctx.rows
            if rows_tensor is None:
                rows_tensor = torch.arange(self._batch, device=device)
            self._row_column = rows_tensor.unsqueeze(1)

    def end_write_only(self) -> None:
        """After a pass of `write_only`: updates return what they hold again."""
        self._write_only = False

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Append ``[R, kv_heads, T, head_dim]`` to a layer; return all tokens of these rows.

        Further arguments, which transformers gives to some of its own caches, are ignored.
        """
        if self._ragged is not None:
            return self._update_ragged(key_states, value_states, layer_idx, self._ragged)
        tokens = key_states.shape[2]
        held = self._lengths[layer_idx]
        start = held[0]
        end = start + tokens
        if end > self._capacities[layer_idx]:
            self._grow(layer_idx, end, key_states, value_states)
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        assert keys is not None and values is not None  # _grow has allocated them
        keys.narrow(2, start, tokens).copy_(key_states)
        values.narrow(2, start, tokens).copy_(value_states)
        self._lengths[layer_idx] = [end] * self._batch
        if self._write_only:
            raise KeysWritten
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def _update_ragged(
        self, key_states: Tensor, value_states: Tensor, layer: int, ctx: StepContext
    ) -> tuple[Tensor, Tensor]:
        if ctx.keys > self._capacities[layer]:
            self._grow(layer, ctx.keys, key_states, value_states)
        keys, values = self._keys[layer], self._values[layer]
        assert keys is not None and values is not None
        # [rows, 1] and [rows, tokens] around a slice: the indexed axes come first.
        keys[self._row_column, :, self._slots] = key_states.transpose(1, 2)
        values[self._row_column, :, self._slots] = value_states.transpose(1, 2)
        held = self._lengths[layer]
        for row, start, count in zip(ctx.row_ids, ctx.starts, ctx.counts, strict=True):
            held[row] = start + count
        if self._write_only:
            raise KeysWritten
        keys, values = keys.narrow(2, 0, ctx.keys), values.narrow(2, 0, ctx.keys)
        if ctx.rows is None:
            return keys, values
        return keys.index_select(0, ctx.rows), values.index_select(0, ctx.rows)

    def states(self, layer: int, row: int | None = None) -> tuple[Tensor, Tensor]:
        """Views ``[1 or B, kv_heads, T, head_dim]`` of what a layer holds for a row (None: all).

        Raises:
            DeliberateError: the layer was never written.
        """
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            raise DeliberateError(f"layer {layer} of the cache has never been written")
        if row is None:
            end = max(self._lengths[layer])
            return keys.narrow(2, 0, end), values.narrow(2, 0, end)
        end = self._lengths[layer][row]
        return keys[row : row + 1, :, :end], values[row : row + 1, :, :end]

    def adopt(self, layer: int, row: int, slot: int, keys: Tensor, values: Tensor) -> None:
        """Takes over ``[kv_heads, T, head_dim]`` of another cache for slots slot..slot+T-1.

        Slots before `slot` stay as they are: a sliding window never reads them.
        """
        end = slot + keys.shape[1]
        if end > self._capacities[layer]:
            self._grow(layer, end, keys.unsqueeze(0), values.unsqueeze(0))
        mine, my_values = self._keys[layer], self._values[layer]
        assert mine is not None and my_values is not None
        mine[row, :, slot:end] = keys
        my_values[row, :, slot:end] = values
        self._lengths[layer][row] = end

    def crop(self, length: int, row: int | None = None) -> None:
        """Drop the tokens of a row (None: all) at ``length`` and after; buffers stay."""
        if length < 0:
            raise DeliberateError(f"cannot crop a cache to {length} tokens: it must be >= 0")
        for held in self._lengths:
            for index in range(self._batch) if row is None else (row,):
                held[index] = min(held[index], length)

    def skip(self, first: int, row: int, length: int) -> None:
        """Sets the length of layers `first` and above for a row, without keys and values.

        The slots stay unwritten; the caller must mask them ("skip" mode).
        """
        for held in self._lengths[first:]:
            held[row] = length

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps these rows only, renumbered in the given order, and frees the others."""
        if list(rows) == list(range(self._batch)):
            return
        self._batch = len(rows)
        self._open = {new for new, old in enumerate(rows) if old in self._open}
        self._lengths = [[held[row] for row in rows] for held in self._lengths]
        self._ragged = None
        for buffers in (self._keys, self._values):
            for layer, buffer in enumerate(buffers):
                if buffer is not None:
                    index = torch.tensor(list(rows), device=buffer.device)
                    buffers[layer] = buffer.index_select(0, index)

    def check(self) -> None:
        """Raise RuntimeError unless every row's lengths are non-increasing with depth."""
        for layer, (below, here) in enumerate(zip(self._lengths, self._lengths[1:], strict=False)):
            for row, (low, high) in enumerate(zip(below, here, strict=True)):
                if high > low:
                    raise RuntimeError(
                        f"cache layer {layer + 1} holds {high} tokens of row {row}, more than the "
                        f"{low} of layer {layer} below it"
                    )

    def _grow(self, layer: int, needed: int, key_states: Tensor, value_states: Tensor) -> None:
        if self._keys[layer] is None:
            capacity = max(self._initial_capacity, needed, MIN_CAPACITY)
        else:
            capacity = max(2 * self._capacities[layer], needed)
        held = max(self._lengths[layer])
        for buffers, new in ((self._keys, key_states), (self._values, value_states)):
            old = buffers[layer]
            # A buffer keeps its dtype and device: compiled kernels know only its address.
            like = new if old is None else old
            shape = (self._batch, like.shape[1], capacity, like.shape[3])
            # Slots never written are read too, under a mask: uninitialised memory could hold NaN.
            buffer = torch.zeros(shape, dtype=like.dtype, device=like.device)
            if old is not None:
                buffer[:, :, :held] = old[:, :, :held]
            buffers[layer] = buffer
        self._capacities[layer] = capacity
