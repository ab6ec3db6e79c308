"""Where the sequences of a call of the C++ kernels have their tokens, checked, as the kernels take
it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deliberate.kernels import border
from deliberate.kernels.native_arguments import SpanArgument
from deliberate.kernels.native_inputs import KeysValues, Span
from deliberate.kernels.native_pools import PooledKeysValues, SequenceRuns

# Of a bool that is read as a byte.
_HOLES = torch.bool


def packed_spans(
    spans: Sequence[Span],
    apart: int,
    tokens: int,
    kv: KeysValues | PooledKeysValues,
    layers: tuple[int, int],
) -> Any:
    """The spans as the kernels take them, each within the cache and the pass."""
    made = (SpanArgument * len(spans))()
    after = 0
    for index, span in enumerate(spans):
        offset, end = index * apart if apart else after, span.start + span.count
        after = offset + span.count
        if not (
            span.start >= 0
            and 0 <= span.count <= (apart or tokens)
            and offset + span.count <= tokens
        ):
            raise border.BorderError(
                f"{span.count} tokens of row {span.row} from position {span.start}, at {offset}"
                f" of a pass of {tokens}, {apart} apart"
            )
        tables = tables_of(kv, layers, span.row, span.runs, span.start, end)
        holes = span.holes
        if holes is not None and not (
            holes.dtype is _HOLES
            and holes.is_cpu
            and holes.is_contiguous()
            and holes.numel() >= end
        ):
            raise border.BorderError(
                f"holes of row {span.row}: contiguous bool of {end} slots on the CPU is needed"
            )
        address = None if holes is None else holes.data_ptr()
        made[index] = SpanArgument(span.row, span.start, span.count, offset, address, tables)
    return made


def tables_of(
    kv: KeysValues | PooledKeysValues,
    layers: tuple[int, int],
    row: int,
    runs: SequenceRuns | None,
    start: int,
    end: int,
) -> int | None:
    """The tables of a sequence as the kernels take them; None for a row of its own.

    Raises:
        BorderError: the cache has no room for tokens start..end-1 of this sequence.
    """
    if isinstance(kv, PooledKeysValues):
        if runs is None or row:
            raise border.BorderError(
                f"row {row} of a cache in blocks: row 0 and the sequence's runs of slots are needed"
            )
        runs.check(kv, *layers, start, end)
        return runs.address
    if runs is not None:
        raise border.BorderError("runs of slots belong to a cache in blocks")
    if not 0 <= row < kv.batch or end > kv.capacity:
        raise border.BorderError(
            f"tokens up to position {end - 1} of row {row}: the cache has {kv.batch} rows of "
            f"{kv.capacity} slots"
        )
    return None
