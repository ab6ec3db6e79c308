"""Hidden states of the tokens that exited early and are pending at their exit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class PendingStates:
    """States of the tokens pending at one exit, by row of the batch: ``[B, capacity, d]``.

    There is room for `capacity` tokens of a row, and for more once they come.
    """

    def __init__(self, batch: int, capacity: int) -> None:
        self._capacity = capacity
        self._counts = [0] * batch
        self._states: Tensor | None = None

    def count(self, row: int) -> int:
        """Pending tokens of a row."""
        return self._counts[row]

    def total(self) -> int:
        """Pending tokens of all rows."""
        return sum(self._counts)

    def append(self, rows: Sequence[int], hidden: Tensor, counts: Sequence[int]) -> None:
        """Adds the first ``counts[i]`` states of ``hidden [R, M, d]`` to row ``rows[i]``."""
        states = self._states
        if states is None:
            states = self._states = hidden.new_zeros(
                (len(self._counts), self._capacity, hidden.shape[-1])
            )
        needed = max(self._counts[row] + count for row, count in zip(rows, counts, strict=True))
        if needed > states.shape[1]:
            room = max(needed, 2 * states.shape[1]) - states.shape[1]
            states = self._states = torch.nn.functional.pad(states, (0, 0, 0, room))
        first = self._counts[rows[0]]
        alike = all(self._counts[row] == first for row in rows) and len(set(counts)) == 1
        if alike and len(rows) == len(self._counts):
            states[:, first : first + counts[0]] = hidden
        elif hidden.shape[1] == 1:
            device = states.device
            at = torch.tensor([self._counts[row] for row in rows], device=device)
            states[torch.tensor(rows, device=device), at] = hidden[:, 0]
        else:
            for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
                at_row = self._counts[row]
                states[row, at_row : at_row + count] = hidden[index, :count]
        for row, count in zip(rows, counts, strict=True):
            self._counts[row] += count

    def take(self, rows: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Removes and returns ``(hidden [R, max count, d], counts)``, rows padded on the right."""
        counts = [self._counts[row] for row in rows]
        states = self._states
        assert states is not None and min(counts) > 0
        for row in rows:
            self._counts[row] = 0
        if len(rows) == len(self._counts):
            return states[:, : max(counts)], counts
        index = torch.tensor(rows, device=states.device)
        return states.index_select(0, index)[:, : max(counts)], counts

    def clear(self, row: int) -> None:
        """Drops the pending tokens of a row, which were rolled back."""
        self._counts[row] = 0

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps these rows only, renumbered in the given order."""
        self._counts = [self._counts[row] for row in rows]
        if self._states is not None:
            index = torch.tensor(list(rows), device=self._states.device)
            self._states = self._states.index_select(0, index)
