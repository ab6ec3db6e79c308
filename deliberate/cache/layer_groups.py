"""Layers that share a block table: those with the same sliding window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deliberate.utils.errors import DeliberateError

# In a table: the block of these positions was freed, being behind the window.
FREED = -1


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that share a block table: rising numbers, and their sliding window (0: none)."""

    layers: tuple[int, ...]
    window: int = 0

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise DeliberateError(f"layers={self.layers} of a group: rising numbers are needed")
        if self.window < 0:
            raise DeliberateError(f"window={self.window} of a layer group: it must be >= 0")


def groups_by_window(windows: Sequence[int]) -> tuple[LayerGroup, ...]:
    """Layer groups of a model whose layer i has a window of ``windows[i]`` tokens (0: none)."""
    return tuple(
        LayerGroup(tuple(i for i, one in enumerate(windows) if one == window), window)
        for window in dict.fromkeys(windows)
    )
