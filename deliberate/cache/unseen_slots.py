"""Cache slots that layers above an exit never saw, in the KV mode "skip"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class UnseenSlots:
    """Which slots hold nothing: bool ``[rows, slots]`` for each segment of layers.

    Args:
        segments: of the model, from the bottom.
        rows: of the cache.
        slots: room at first; it grows.
        device: of the masks.
    """

    def __init__(self, segments: int, rows: int, slots: int, device: torch.device) -> None:
        self._unseen = [
            torch.zeros((rows, slots), dtype=torch.bool, device=device) for _ in range(segments)
        ]

    def of(self, segment: int, rows: Sequence[int], slots: int) -> Tensor:
        """Of one segment and these rows, bool ``[R, slots or more]``, True where nothing is."""
        self._reserve(slots)
        return self._unseen[segment][list(rows)]

    def mark(self, first: int, row: int, slot: int) -> None:
        """The layers of segment `first` and above never see this slot."""
        self._reserve(slot + 1)
        for unseen in self._unseen[first:]:
            unseen[row, slot] = True

    def clear(self, row: int) -> None:
        """All slots of a row will be written."""
        for unseen in self._unseen:
            unseen[row] = False

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps these rows only, renumbered in the given order."""
        self._unseen = [unseen[list(rows)] for unseen in self._unseen]

    def _reserve(self, slots: int) -> None:
        held = self._unseen[0].shape[1]
        if held < slots:
            room = max(slots, 2 * held) - held
            self._unseen = [torch.nn.functional.pad(one, (0, room)) for one in self._unseen]
