"""Static key/value buffers of the fused executor, and contexts that name slots instead of masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deliberate.cache.attention_metadata import ContextBuilder, StepContext
from deliberate.cache.int8_cache import packed, unpacked
from deliberate.cache.kv_cache import MIN_CAPACITY, SegmentCache
from deliberate.config import KVStorage
from deliberate.executors.fused.weights import LayerShape
from deliberate.kernels.native_arguments import SCALE_BYTES
from deliberate.kernels.native_inputs import KeysValues

# Slots looked at are rounded up to this: full vectors in the compiled loops.
SLOT_MULTIPLE = 16
# What the masks of a context hold here: the slots to look at, and which of them hold nothing.
SLOTS, HOLES = "slots", "holes"


class StaticCache(SegmentCache):
    """A `SegmentCache` whose buffers exist before the first pass and are written by slot.

    The buffers are ordinary tensors also under ``torch.inference_mode``: compiled code cannot
    write to others. They are always longer than what is looked at: a slice that happens to be the
    whole of a buffer would be compiled anew.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], like: Tensor, capacity: int, batch: int
    ) -> None:
        """
        Args:
            shapes: of the layers.
            like: any tensor of the dtype and on the device that keys and values have.
            capacity: tokens to make room for; more are made room for when they come.
        """
        room = _rounded(max(capacity, MIN_CAPACITY)) + SLOT_MULTIPLE
        super().__init__(len(shapes), room, batch)
        self._shapes = tuple(shapes)
        self._like = like
        self._addresses: KeysValues | None = None
        self.reserve(1)

    def reserve(self, tokens: int) -> None:
        """Makes room for this many tokens in every layer."""
        for layer, shape in enumerate(self._shapes):
            if tokens >= self._capacities[layer]:
                new = self._like.new_empty((self.batch, shape.kv_heads, 0, shape.head_dim))
                self._grow(layer, tokens + 1, new, new)

    def buffers(self, first: int, last: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of layers first..last-1, ``[B, kv_heads, capacity, head_dim]``."""
        return list(zip(self._keys[first:last], self._values[first:last], strict=True))  # type: ignore[arg-type]

    def addresses(self) -> KeysValues:
        """Where the buffers of all layers are, for the C++ kernels."""
        if self._addresses is None:
            self._addresses = KeysValues(self.buffers(0, self.num_layers))
        return self._addresses

    def advance(self, ctx: StepContext, first: int, last: int) -> None:
        """After a pass has been written: layers first..last-1 hold its tokens."""
        if not ctx.ragged:
            end = ctx.start + ctx.positions.shape[1]
            for layer in range(first, last):
                self._lengths[layer] = [end] * self.batch
            return
        for held in self._lengths[first:last]:
            for row, start, count in zip(ctx.row_ids, ctx.starts, ctx.counts, strict=True):
                held[row] = start + count

    def runs(self, row: int) -> None:
        """Where a row's slots are in pools: in none, it has a row of the buffers."""

    def reserve_steps(self, last: int, start: int, end: int, row: int) -> None:
        """Makes room for positions start..end-1 of a row."""
        self.reserve(end)

    def extend(self, last: int, tokens: int, row: int = 0) -> None:
        """Layers 0..last-1 hold so many tokens more of a row."""
        for held in self._lengths[:last]:
            held[row] += tokens

    def keep(self, rows: Sequence[int]) -> None:
        """As `SegmentCache.keep`."""
        self._addresses = None
        with torch.inference_mode(False), torch.no_grad():
            super().keep(rows)

    def _grow(self, layer: int, needed: int, key_states: Tensor, value_states: Tensor) -> None:
        self._addresses = None
        with torch.inference_mode(False), torch.no_grad():
            super()._grow(layer, _rounded(needed), key_states, value_states)


class Int8StaticCache(StaticCache):
    """A `StaticCache` of keys and values in 8 bits, packed as in `deliberate.cache.int8_cache`.

    The C++ kernels alone read and write it: attention multiplies the whole numbers and then their
    scales, and nothing is widened in memory. `like` gives the dtype of what is taken over and given
    out, not that of the buffers.
    """

    storage = KVStorage.INT8

    def reserve(self, tokens: int) -> None:
        """As `StaticCache.reserve`."""
        for layer, shape in enumerate(self._shapes):
            if tokens >= self._capacities[layer]:
                entry = shape.head_dim + SCALE_BYTES
                new = torch.empty((self.batch, shape.kv_heads, 0, entry), dtype=torch.uint8)
                self._grow(layer, tokens + 1, new, new)

    def states(self, layer: int, row: int | None = None) -> tuple[Tensor, Tensor]:
        """As `SegmentCache.states`, widened: copies, not views."""
        keys, values = super().states(layer, row)
        return unpacked(keys, self._like.dtype), unpacked(values, self._like.dtype)

    def adopt(self, layer: int, row: int, slot: int, keys: Tensor, values: Tensor) -> None:
        """As `SegmentCache.adopt`; what is taken over is rounded."""
        super().adopt(layer, row, slot, packed(keys), packed(values))


class SlotContexts(ContextBuilder):
    """Contexts with the slots to look at in place of masks, which the layers make themselves."""

    def __init__(self, plain: ContextBuilder) -> None:
        super().__init__(
            plain._embedding,
            plain._rotary,
            rope_follows_length=plain._rope_follows_length,
            eager=False,
            window=None,
            learned_positions=None,
        )

    @torch.inference_mode()
    def uniform(self, start: int, q: int, *, device: torch.device | str) -> StepContext:
        """As `ContextBuilder.uniform`; what is computed for it is always made in this mode."""
        return super().uniform(start, q, device=device)

    def _masks(
        self, tables: Any, start: int, end: int, dtype: torch.dtype
    ) -> Mapping[str, Tensor | None]:
        return {SLOTS: tables.positions[0, : _rounded(end)], HOLES: None}

    def _ragged_masks(
        self,
        tables: Any,
        first: Tensor,
        q: int,
        keys: int,
        dtype: torch.dtype,
        holes: Tensor | None,
    ) -> Mapping[str, Tensor | None]:
        slots = tables.positions[0, : _rounded(keys)]
        if holes is not None:
            missing = max(0, len(slots) - holes.shape[1])
            holes = torch.nn.functional.pad(holes, (0, missing), value=True)
        return {SLOTS: slots, HOLES: holes}


def _rounded(tokens: int) -> int:
    return -(-tokens // SLOT_MULTIPLE) * SLOT_MULTIPLE
