"""What may be handed to the C++ kernels: the only checks between a tensor and its address.

`kernels/cpp` reads addresses and believes every length. So whatever goes there passes one of the
functions here first: weights once, when they are built in, and again before every call whether they
are still where they were; states, rotary tables, cache buffers and token ids at every call. A check
of a call takes about a microsecond.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deliberate.utils.errors import DeliberateError

# How products.h numbers what it reads.
STORAGE = {torch.float32: 0, torch.int8: 2}
BLOCKS = 3
_ADDRESS = torch._C.TensorBase.data_ptr


class BorderError(DeliberateError):
    """Something that the C++ kernels cannot read was about to be handed to them."""


def plain(x: Tensor, name: str, shape: Sequence[int] | None = None) -> int:
    """The address of a contiguous float32 tensor on the CPU.

    Args:
        name: what it is, for the error.
        shape: that it must have, or None for any.

    Raises:
        BorderError: it is another kind of tensor.
    """
    if x.dtype is not torch.float32 or not _on_cpu(x):
        raise BorderError(_refusal(x, name, "float32"))
    if shape is not None and tuple(x.shape) != tuple(shape):
        raise BorderError(f"{name} has shape {tuple(x.shape)}: the C++ kernels need {tuple(shape)}")
    return x.data_ptr()


def packs(x: Tensor, name: str, shape: Sequence[int]) -> int:
    """The address of contiguous bytes of this shape on the CPU.

    Raises:
        BorderError: it is another kind of tensor.
    """
    if x.dtype is not torch.uint8 or not _on_cpu(x):
        raise BorderError(_refusal(x, name, "uint8"))
    if tuple(x.shape) != tuple(shape):
        raise BorderError(f"{name} has shape {tuple(x.shape)}: the C++ kernels need {tuple(shape)}")
    return x.data_ptr()


def token_ids(x: Tensor, name: str, count: int) -> int:
    """The address of `count` token ids: contiguous, int64, none negative, on the CPU.

    Raises:
        BorderError: it is another kind of tensor.
    """
    if x.dtype is not torch.int64 or not _on_cpu(x) or not x.is_contiguous():
        raise BorderError(_refusal(x, name, "int64"))
    if tuple(x.shape) != (count,) or int(x.min()) < 0:
        raise BorderError(f"{name} has shape {tuple(x.shape)}: the C++ kernels need {count} ids")
    return x.data_ptr()


def stored(x: Tensor, name: str) -> tuple[int, int, int]:
    """A float32 weight matrix ``[N, K]``: its address, N and K.

    Raises:
        BorderError: it is another kind of tensor, or empty.
    """
    if x.dtype is not torch.float32 or not _on_cpu(x):
        raise BorderError(_refusal(x, name, "float32"))
    if x.dim() != 2 or x.numel() == 0:
        raise BorderError(f"{name} has shape {tuple(x.shape)}: a matrix [N, K] is needed")
    rows, columns = x.shape
    return x.data_ptr(), rows, columns


def blocks(x: Tensor, name: str, row_bytes: int) -> tuple[int, int]:
    """Rows of quantised blocks, uint8 ``[N, row_bytes]``: their address, and N.

    Raises:
        BorderError: they are of another kind, or empty.
    """
    if x.dtype is not torch.uint8 or not _on_cpu(x):
        raise BorderError(_refusal(x, name, "uint8"))
    if x.dim() != 2 or x.numel() == 0 or x.shape[1] != row_bytes:
        raise BorderError(
            f"{name} has shape {tuple(x.shape)}: rows of {row_bytes} bytes are needed"
        )
    return x.data_ptr(), x.shape[0]


def same(found: int, needed: int, name: str) -> None:
    """Raises `BorderError` unless a size is what it must be."""
    if found != needed:
        raise BorderError(f"{name} is {found}: the C++ kernels need {needed}")


def within(value: int, least: int, most: int, name: str) -> None:
    """Raises `BorderError` unless ``least <= value <= most``."""
    if not least <= value <= most:
        raise BorderError(f"{name} is {value}: it must be from {least} to {most}")


def states(x: Tensor, width: int, name: str) -> int:
    """Rows of hidden states ``[..., d]``: how many. For every call, so in as few steps as can be.

    Raises:
        BorderError: they are not contiguous float32 of this width on the CPU.
    """
    shape = x.shape
    if x.dtype is not torch.float32 or not _on_cpu(x) or not shape or shape[-1] != width:
        if x.dtype is torch.float32 and _on_cpu(x):
            raise BorderError(f"{name} have shape {tuple(shape)}: the model's width is {width}")
        raise BorderError(_refusal(x, name, "float32"))
    return x.numel() // width


class Places:
    """Where tensors were when their addresses were taken, group by group (layer by layer).

    Args:
        groups: of tensors, kept alive. Those that follow a model's parameters do not move with
            them, but their memory may be given back (a storage that is resized).
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        self._tensors = [tensor for group in groups for tensor in group]
        self._addresses = list(map(_ADDRESS, self._tensors))
        self._starts = [0]
        for group in groups:
            self._starts.append(self._starts[-1] + len(group))

    def check(self, first: int, last: int) -> None:
        """Raises `BorderError` where a tensor of groups first..last-1 is not where it was."""
        begin, end = self._starts[first], self._starts[last]
        # By `map`, in half the time: a pass of 30 layers has over 400.
        if list(map(_ADDRESS, self._tensors[begin:end])) != self._addresses[begin:end]:
            raise BorderError(
                "weights were moved or freed while the C++ kernels hold their addresses: finish "
                "the generation before changing the model, or wrap the model anew"
            )


def _on_cpu(x: Tensor) -> bool:
    return x.layout is torch.strided and x.is_cpu and x.is_contiguous()


def _refusal(x: Tensor, name: str, allowed: str) -> str:
    how = "contiguous" if x.layout is torch.strided and x.is_contiguous() else "not contiguous"
    return (
        f"{name}: {how} {str(x.dtype).removeprefix('torch.')} on {x.device}; the C++ kernels read "
        f"contiguous {allowed} on the CPU. If the model was moved since it was wrapped, begin "
        "another generation"
    )
