"""Lists of active rows that live on the device, and their meaning in the torch references.

An op that takes ``rows`` and ``count`` works on the rows ``rows[:count]`` of its batch and leaves
the others alone. Both stay on the device, so that deciding who goes on costs no round trip to the
host: a kernel is launched for the largest number and its programs past the count return at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deliberate.utils.errors import DeliberateError


def check_rows(op: str, rows: Tensor | None, count: Tensor | None, total: int) -> None:
    """Raises DeliberateError unless both are given or neither, int32 ``[<= total]`` and ``[1]``."""
    if rows is None and count is None:
        return
    if rows is None or count is None:
        raise DeliberateError(f"{op}: give rows and count together, or neither")
    if rows.dtype != torch.int32 or count.dtype != torch.int32:
        raise DeliberateError(
            f"{op}: rows and count must be int32, got {rows.dtype} and {count.dtype}"
        )
    if rows.dim() != 1 or rows.numel() > total or count.numel() != 1:
        raise DeliberateError(
            f"{op}: rows must be one list of at most {total} rows and count one number, got "
            f"shapes {tuple(rows.shape)} and {tuple(count.shape)}"
        )


def check_table(op: str, table: Tensor) -> None:
    """Raises DeliberateError unless a block table is int32 ``[rows, M]``, each row contiguous."""
    if table.dtype != torch.int32 or table.dim() != 2 or table.stride(1) != 1:
        raise DeliberateError(
            f"{op}: a block table must be int32 [rows, blocks], each row contiguous, got "
            f"{table.dtype} {tuple(table.shape)} with strides {table.stride()}"
        )


def active_rows(
    rows: Tensor | None, count: Tensor | None, total: int, device: torch.device
) -> Tensor:
    """The active rows, int64 ``[count]``. Waits for the device: for references only."""
    if rows is None or count is None:
        return torch.arange(total, device=device)
    return rows[: int(count)].long()
