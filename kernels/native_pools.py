"""Pools of keys and values, as the C++ kernels are given them; checked when made and at calls."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deliberate.kernels import border
from deliberate.kernels.native_arguments import (
    SCALE_BYTES,
    KeysValuesArgument,
    RunArgument,
    TableArgument,
)


class PooledKeysValues:
    """Pools ``[kv_heads, slots, entry]`` that all sequences share, one pair a layer, by address.

    Entries are those of `deliberate.kernels.native_inputs.KeysValues`.

    Args:
        pools: keys and values of each layer.
        groups: of each layer: which of a sequence's tables says where its slots are.
        windows: sliding window of each layer in tokens, 0 for none; one per group.

    Raises:
        BorderError: a pool is not contiguous float32 or packs on the CPU, or they do not fit each
            other.
    """

    def __init__(
        self,
        pools: Sequence[tuple[Tensor, Tensor]],
        groups: Sequence[int],
        windows: Sequence[int],
    ) -> None:
        border.same(len(groups), len(pools), "the number of layers with a group")
        border.same(len(windows), len(pools), "the number of layers with a window")
        self.windows = list(windows)
        packs = bool(pools) and pools[0][0].dtype is torch.uint8
        extra = SCALE_BYTES if packs else 0
        address = border.packs if packs else border.plain
        self.sizes = [(keys.shape[0], keys.shape[-1] - extra) for keys, _ in pools]
        self.slots: dict[int, int] = {}
        self.window_of: dict[int, int] = {}
        made = []
        for (keys, values), group, window in zip(pools, groups, windows, strict=True):
            border.within(group, 0, len(pools) - 1, "the group of a layer")
            border.within(window, 0, 1 << 40, "the window of a layer")
            border.same(self.window_of.setdefault(group, window), window, "the window of a group")
            if keys.dim() != 3:
                raise border.BorderError(f"cached keys have shape {tuple(keys.shape)}, not 3 sizes")
            slots = keys.shape[1]
            self.slots[group] = min(self.slots.get(group, slots), slots)
            made.append(
                KeysValuesArgument(
                    address(keys, "a layer's cached keys", keys.shape),
                    address(values, "a layer's cached values", keys.shape),
                    slots,
                    0,
                    group,
                    border.STORAGE[torch.int8 if packs else torch.float32],
                )
            )
        self._groups = list(groups)
        self._found: dict[tuple[int, int], tuple[int, ...]] = {}
        self._keep = list(pools)
        self.arguments = (KeysValuesArgument * len(made))(*made)

    def groups_of(self, first: int, last: int) -> tuple[int, ...]:
        """Groups of layers first..last-1."""
        if (first, last) not in self._found:
            self._found[first, last] = tuple(dict.fromkeys(self._groups[first:last]))
        return self._found[first, last]


@dataclass(frozen=True)
class SlotRun:
    """Positions from `position` on that lie in slots from `slot` on, `count` of them."""

    position: int
    slot: int
    count: int


class SequenceRuns:
    """Where one sequence's slots are in the pools of each group.

    Args:
        groups: of each group runs of rising positions, each beginning where the one before ends.

    Raises:
        BorderError: they do not.
    """

    def __init__(self, groups: Sequence[Sequence[SlotRun]]) -> None:
        self.first: list[int] = []
        self.end: list[int] = []
        self._top: list[int] = []
        self._runs = []
        tables = []
        for runs in groups:
            first = end = runs[0].position if runs else 0
            for run in runs:
                border.within(run.count, 1, 1 << 40, "the number of slots in a run")
                border.within(run.slot, 0, 1 << 40, "the first slot of a run")
                border.within(run.position, 0, 1 << 40, "the first position of a run")
                border.same(run.position, end, "the first position of a run")
                end += run.count
            self.first.append(first)
            self.end.append(end)
            self._top.append(max((run.slot + run.count for run in runs), default=0))
            made = (RunArgument * len(runs))(
                *(RunArgument(run.position, run.slot, run.count) for run in runs)
            )
            self._runs.append(made)
            tables.append(TableArgument(ctypes.addressof(made), len(runs)))
        self._tables = (TableArgument * len(tables))(*tables)
        self.address = ctypes.addressof(self._tables)

    def check(
        self, kv: PooledKeysValues, first_layer: int, last_layer: int, start: int, end: int
    ) -> None:
        """Raises `BorderError` unless tokens start..end-1, and all that they see, have slots in
        layers first_layer..last_layer-1."""
        for group in kv.groups_of(first_layer, last_layer):
            window = kv.window_of[group]
            if group >= len(self.end):
                raise border.BorderError(f"a sequence has no table of slots for group {group}")
            needed = max(0, start - window + 1) if window else 0
            if self.first[group] > needed or self.end[group] < end:
                raise border.BorderError(
                    f"positions {needed}..{end - 1} are needed of a sequence whose slots hold "
                    f"positions {self.first[group]}..{self.end[group] - 1}"
                )
            if self._top[group] > kv.slots[group]:
                raise border.BorderError(
                    f"slot {self._top[group] - 1} is needed of a pool of {kv.slots[group]} slots"
                )
