"""Keys and values of a draft layer: rows of one buffer, of sequences that share its calls."""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from deliberate.kernels.native_inputs import KeysValues
from deliberate.utils.errors import DeliberateError

# Entries that a row has room for at first.
_ROOM = 512


class DraftRows:
    """Rows that are opened and closed; of one engine, or one generation.

    Args:
        kv_heads, head_dim: of the layer.
        like: any tensor of the dtype and on the device that keys and values have.

    Attributes:
        keys, values: ``[rows, kv_heads, capacity, head_dim]``.
    """

    def __init__(self, kv_heads: int, head_dim: int, like: Tensor) -> None:
        self._like = like
        self._free: list[int] = []
        self._lock = threading.Lock()
        self._addresses: KeysValues | None = None
        self.keys = self._buffer(0, kv_heads, 0, head_dim)
        self.values = self._buffer(0, kv_heads, 0, head_dim)

    @property
    def capacity(self) -> int:
        """Entries of a row that there is room for."""
        return self.keys.shape[2]

    def open(self) -> DraftKeysValues:
        """A row without entries; it is free again when it is closed, or nothing refers to it."""
        with self._lock:
            if not self._free:
                rows = self.keys.shape[0]
                self._grow(max(1, 2 * rows), max(_ROOM, self.capacity))
                self._free.extend(reversed(range(rows, self.keys.shape[0])))
            return DraftKeysValues(self, self._free.pop())

    def reserve(self, entries: int) -> None:
        """Makes room for so many entries in every row."""
        if entries > self.capacity:
            with self._lock:
                self._grow(self.keys.shape[0], max(entries, 2 * self.capacity))

    def addresses(self) -> KeysValues:
        """As the C++ kernels take them."""
        if self._addresses is None:
            self._addresses = KeysValues([(self.keys, self.values)])
        return self._addresses

    def _release(self, row: int) -> None:
        self._free.append(row)

    def _grow(self, rows: int, capacity: int) -> None:
        held, heads, before, dim = self.keys.shape
        for name in ("keys", "values"):
            old, new = getattr(self, name), self._buffer(rows, heads, capacity, dim)
            new[:held, :, :before] = old
            setattr(self, name, new)
        self._addresses = None

    def _buffer(self, rows: int, heads: int, capacity: int, dim: int) -> Tensor:
        # An ordinary tensor also under inference mode: it outlives the pass.
        with torch.inference_mode(False), torch.no_grad():
            size = (rows, heads, capacity, dim)
            return torch.zeros(size, dtype=self._like.dtype, device=self._like.device)


class DraftKeysValues:
    """One sequence's keys and values of a draft layer: `length` entries are valid.

    Attributes:
        rows: where they lie.
        index: of its row there.
    """

    def __init__(self, rows: DraftRows, index: int) -> None:
        self.rows = rows
        self.index = index
        self.length = 0
        self._close = weakref.finalize(self, rows._release, index)

    @property
    def capacity(self) -> int:
        """Entries that there is room for."""
        return self.rows.capacity

    @property
    def keys(self) -> Tensor:
        """``[1, kv_heads, capacity, head_dim]``."""
        return self.rows.keys[self.index : self.index + 1]

    @property
    def values(self) -> Tensor:
        """As `keys`."""
        return self.rows.values[self.index : self.index + 1]

    def crop(self, length: int) -> None:
        """Drops the entries at `length` and after."""
        if length < 0:
            raise DeliberateError(f"cannot crop a draft layer's cache to {length}: 0 or more")
        self.length = min(self.length, length)

    def close(self) -> None:
        """Gives the row up."""
        self.length = 0
        self._close()
