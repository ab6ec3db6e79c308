"""What lies where in a GGUF file, and its tensors as memory that the file is mapped to.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package `gguf` reads it
too, but copies every token and merge of the tokenizer, which for a small model is more memory than
the weights.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deliberate.kernels.blocks import FILE_FORMATS, BlockFormat
from deliberate.utils.errors import DeliberateError

# Value types of the metadata: their struct formats; 8 is a string, 9 an array.
_SCALARS = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
}
_STRING, _ARRAY, _UINT32 = 8, 9, 4
# Tensor types that are no blocks.
FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
BLOCKS = {int(one) for one in FILE_FORMATS}
# Rows that are widened at a time.
_WIDENED = 1024
# Of the others, for errors.
_NAMES = {
    **{6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K"},
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 20: "IQ4_NL", 23: "IQ4_XS", 39: "MXFP4"},
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file.

    Attributes:
        shape: the slowest dimension first, as torch has it.
        kind: GGUF's number of its type.
        data: uint8, the bytes of each row ``[..., row_bytes]``; mapped, not read.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    data: Tensor

    @property
    def floats(self) -> Tensor | None:
        """Its values as float32, copied; None where it holds blocks."""
        if self.kind not in FLOATS:
            return None
        return self.data.view(FLOATS[self.kind]).float().reshape(self.shape).clone()

    def widened(self) -> Tensor:
        """Its values as float32, those of blocks as the package `gguf` dequantises them.

        Raises:
            DeliberateError: a format whose size is not known here.
        """
        values = self.floats
        if values is not None:
            return values
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(int(self.format))
        made = torch.empty(self.shape)
        # Some rows at a time: what is made on the way is several times the result.
        for rows, to in zip(
            self.data.flatten(0, -2).split(_WIDENED),
            made.flatten(0, -2).split(_WIDENED),
            strict=True,
        ):
            to.copy_(torch.from_numpy(dequantize(rows.numpy(), kind)))
        return made

    @property
    def format(self) -> BlockFormat:
        """Of its blocks.

        Raises:
            DeliberateError: one that the kernels do not read.
        """
        known = ", ".join(one.name for one in FILE_FORMATS)
        try:
            return BlockFormat(self.kind)
        except ValueError:
            raise DeliberateError(
                f"tensor {self.name} is of type {_NAMES.get(self.kind, self.kind)}: the C++ "
                f"kernels read {known}; load the file without "
                "weights='file'"
            ) from None


class GgufFile:
    """A GGUF file: scalars and strings of its metadata, lengths of its arrays, and its tensors.

    Args:
        path: of the file, which must stay as it is while tensors of it are used.

    Attributes:
        metadata: by key; of an array its length.
        tensors: by name.

    Raises:
        DeliberateError: it is cut short, or of a version or byte order that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        self._entries: list[bytes] = []
        try:
            with path.open("rb") as file:
                # Copy on write: torch wants memory that could be written, and the file stays as is.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._at = 0
            self._read()
        except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:
            raise DeliberateError(
                f"{path} is cut short or no GGUF file that this release reads: {error}"
            ) from None
        except OSError as error:
            raise DeliberateError(f"{path} cannot be read: {error.strerror}") from None

    def scalars(self) -> bytes:
        """A GGUF file without arrays and tensors: what a model's configuration follows from."""
        architecture = str(self.metadata.get("general.architecture", ""))
        entries = list(self._entries)
        key = f"{architecture}.vocab_size"
        if key not in self.metadata and "tokenizer.ggml.tokens" in self.metadata:
            tokens = self.metadata["tokenizer.ggml.tokens"]
            entries.append(
                struct.pack("<Q", len(key)) + key.encode() + struct.pack("<II", _UINT32, tokens)
            )
        return struct.pack("<4sIQQ", b"GGUF", 3, 0, len(entries)) + b"".join(entries)

    def release(self) -> None:
        """Drops the pages that were read from memory; the file is read anew where they are used.

        For the time while tensors are read: what somebody wrote to them would be lost.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _read(self) -> None:
        magic, version, tensors, entries = self._take("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}; 2 and 3 are read")
        for _ in range(entries):
            start = self._at
            key = self._string()
            (kind,) = self._take("<I")
            self.metadata[key] = self._value(kind)
            if kind != _ARRAY:
                self._entries.append(self._map[start : self._at])
        found = []
        for _ in range(tensors):
            name = self._string()
            (dimensions,) = self._take("<I")
            if dimensions > 4:
                raise ValueError(f"tensor {name} has {dimensions} dimensions")
            shape = self._take(f"<{dimensions}Q")
            kind, offset = self._take("<IQ")
            found.append((name, tuple(reversed(shape)), kind, offset))
        alignment = int(self.metadata.get("general.alignment", 32))
        base = -(-self._at // alignment) * alignment
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        for name, shape, kind, offset in found:
            self.tensors[name] = self._tensor(whole, name, shape, kind, base + offset)

    def _tensor(
        self, whole: Tensor, name: str, shape: tuple[int, ...], kind: int, at: int
    ) -> GgufTensor:
        width, rows = (shape or (1,))[-1], 1
        for size in shape[:-1]:
            rows *= size
        if kind in FLOATS:
            row_bytes = width * FLOATS[kind].itemsize
        elif kind in BLOCKS:
            row_bytes = BlockFormat(kind).row_bytes(width)
        else:  # its size is not known; who wants it is told its type
            return GgufTensor(name, shape, kind, whole[:0])
        if at + rows * row_bytes > len(whole):
            raise ValueError(f"tensor {name} ends behind the end of the file")
        data = whole[at : at + rows * row_bytes].view(*shape[:-1], row_bytes)
        return GgufTensor(name, shape, kind, data)

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._map, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = self._take("<Q")
        if self._at + length > len(self._map):
            raise ValueError("a string ends behind the end of the file")
        self._at += length
        return self._map[self._at - length : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._take("<" + _SCALARS.get(kind, "x"))[0]
        inner, count = self._take("<IQ")
        if inner in _SCALARS:
            self._at += count * struct.calcsize("<" + _SCALARS[inner])
            return count
        for _ in range(count):
            if inner == _STRING:  # skipped, not decoded
                (length,) = self._take("<Q")
                self._at += length
            else:
                self._value(inner)
        return count
