"""Matrices of 4 to 8 bits, in the blocks of GGUF files, as the C++ kernels read them.

The layouts are those of ggml (`gguf.quants` in Python, ggml-common.h in C): a block has 32 weights
and a float16 scale, or 256 weights with scales for every 32 or 16. `kernels/cpp/blocks.h` says what
a product computes: activations are rounded to 8 bits in groups of 32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from deliberate.kernels import border
from deliberate.kernels.native_arguments import MatrixArgument
from deliberate.kernels.native_build import load


class BlockFormat(IntEnum):
    """Formats that the kernels read, as GGUF numbers them; panels (`deliberate.kernels.panels`) are
    in no file."""

    Q4_0 = 2
    Q4_1 = 3
    Q8_0 = 8
    Q4_K = 12
    Q6_K = 14
    BF16_PANELS = 1001
    INT8_PANELS = 1002
    Q4_0_PANELS = 1003
    Q4_1_PANELS = 1004
    Q8_0_PANELS = 1005

    @property
    def in_panels(self) -> bool:
        """Whether a matrix is kept in panels of 16 rows, each row of which has a scale in int8."""
        return self >= BlockFormat.BF16_PANELS

    @property
    def weights(self) -> int:
        """Weights in a block."""
        return _SIZES[self][0]

    @property
    def bytes(self) -> int:
        """Bytes of a block."""
        return _SIZES[self][1]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many weights; the last block may hold weights past its end."""
        if self is BlockFormat.INT8_PANELS:
            return -(-columns // 4) * 4 + 4
        return -(-columns // self.weights) * self.bytes


_SIZES = {
    BlockFormat.Q4_0: (32, 18),
    BlockFormat.Q4_1: (32, 20),
    BlockFormat.Q8_0: (32, 34),
    BlockFormat.Q4_K: (256, 144),
    BlockFormat.Q6_K: (256, 210),
    BlockFormat.BF16_PANELS: (2, 4),
    BlockFormat.Q4_0_PANELS: (32, 18),
    BlockFormat.Q4_1_PANELS: (32, 20),
    BlockFormat.Q8_0_PANELS: (32, 34),
}
FILE_FORMATS = tuple(one for one in BlockFormat if not one.in_panels)


@dataclass(frozen=True)
class BlockPart:
    """Rows of a matrix.

    Attributes:
        data: uint8 ``[N, format.row_bytes(K)]``; may be memory that a file is mapped to.
        format: of its blocks; its number will do.
        rotary: dimension of a head whose rows lie in pairs, as llama.cpp keeps queries and keys of
            Llama models: row ``2 i + j`` of a head is output ``j * rotary / 2 + i``. 0: in order.
    """

    data: Tensor
    format: BlockFormat
    rotary: int = 0

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "format", BlockFormat(self.format))
        except ValueError:
            raise border.BorderError(
                f"block format {self.format} is not one of {', '.join(BlockFormat.__members__)}"
            ) from None


@dataclass(frozen=True)
class BlockWeight:
    """A matrix ``[N, K]`` of one or several parts, one below the other, and its ``bias [N]``.

    Raises:
        BorderError: a part is not what the kernels read.
    """

    parts: tuple[BlockPart, ...]
    columns: int
    bias: Tensor | None = None
    _table: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        border.within(len(self.parts), 1, 1 << 20, "the number of parts of a matrix")
        border.within(self.columns, 1, 1 << 40, "the number of columns of a matrix")
        rows = []
        for part in self.parts:
            size = part.format.row_bytes(self.columns)
            address, n = border.blocks(part.data, "blocks", size)
            border.same(part.rotary % 2, 0, "the remainder of a rotary dimension over 2")
            most = 0 if part.format.in_panels else n
            border.within(part.rotary, 0, most, "the rotary dimension of rows in pairs")
            if part.rotary:
                border.same(n % part.rotary, 0, "the remainder of rows over their head's dimension")
            rows.append([address, n, int(part.format), part.rotary])
        # A tensor, since it must live as long as its address is used: see `tensors`.
        object.__setattr__(self, "_table", torch.tensor(rows, dtype=torch.int64))

    @property
    def rows(self) -> int:
        """N."""
        return sum(part.data.shape[0] for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""
        return sum(part.data.nbytes for part in self.parts)

    @property
    def tensors(self) -> list[Tensor]:
        """All that the kernels read."""
        found = [self._table, *(part.data for part in self.parts)]
        return found if self.bias is None else [*found, self.bias]

    def check_part_ends(self, row: int, name: str) -> None:
        """Raises `BorderError` unless a part ends before this row."""
        ends, end = [], 0
        for part in self.parts:
            end += part.data.shape[0]
            ends.append(end)
        if row not in ends:
            raise border.BorderError(f"{name}: parts end at rows {ends}; one must end at {row}")

    def argument(self, name: str, n: int | None = None, k: int | None = None) -> Any:
        """As `Weight.argument`."""
        rows = self.rows
        for found, needed, what in ((rows, n, "rows"), (self.columns, k, "columns")):
            if needed is not None:
                border.same(found, needed, f"the number of {what} of {name}.weight")
        for part, address in zip(self.parts, self._table[:, 0].tolist(), strict=True):
            if part.data.data_ptr() != address:
                raise border.BorderError(f"{name}: its blocks were moved or freed")
        bias = None if self.bias is None else border.plain(self.bias, f"{name}.bias", (rows,))
        return MatrixArgument(self._table.data_ptr(), bias, rows, self.columns, border.BLOCKS)

    def multiply(self, x: Tensor, threads: int = 1) -> Tensor:
        """``x [R, K]`` float32 times the transpose -> ``[R, N]``."""
        border.same(x.dim(), 2, "the number of dimensions of activations")
        rows = border.states(x, self.columns, "activations")
        border.within(threads, 1, 4096, "the number of threads")
        weight = self.argument("a matrix")
        out = torch.empty((rows, weight.n), dtype=torch.float32)
        call = load().deliberate_multiply_blocks
        call.restype, call.argtypes = None, (c_void_p, c_void_p, c_int64, c_void_p, c_int64)
        call(ctypes.addressof(weight), x.data_ptr(), rows, out.data_ptr(), threads)
        return out

    def widen(self, ids: Sequence[int] | None = None) -> Tensor:
        """Rows of the matrix (all of them by default) as float32 ``[len(ids), K]``, no bias.

        Raises:
            BorderError: a row that is not there.
        """
        weight = self.argument("a matrix")
        chosen = torch.arange(weight.n) if ids is None else torch.tensor(ids, dtype=torch.int64)
        if len(chosen):
            border.within(int(chosen.min()), 0, weight.n - 1, "a row of a matrix")
            border.within(int(chosen.max()), 0, weight.n - 1, "a row of a matrix")
        out = torch.empty((len(chosen), self.columns), dtype=torch.float32)
        call = load().deliberate_widen_rows
        call.restype, call.argtypes = None, (c_void_p, c_void_p, c_int64, c_void_p)
        call(ctypes.addressof(weight), chosen.data_ptr(), len(chosen), out.data_ptr())
        return out
