"""Detects weights that were moved, replaced, or written through ``.data``.

A full hash of the weights takes seconds for a large model, so it cannot be computed at every call.
A watch is made when it has been: it remembers where every tensor was, a few values of each, and a
checksum of every block. At each later call it compares the places, the few values, and a few blocks
more, in turn: a change of a whole matrix (a merged adapter) is seen at once, a change of a single
value after at most `calls_to_see_all` calls.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Values of each tensor that every call compares.
SAMPLED = 16
# Values of one block, and blocks that every call compares.
BLOCK, BLOCKS = 16_384, 2

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensors_of(module: nn.Module) -> tuple[list[Tensor], tuple[type, ...]]:
    """Parameters and persistent buffers of a module, and the classes of its modules, in order."""
    tensors: list[Tensor] = []
    kinds: list[type] = []
    for one in module.modules():
        kinds.append(type(one))
        tensors += [p for p in one._parameters.values() if p is not None]
        for name, buffer in one._buffers.items():
            if buffer is not None and name not in one._non_persistent_buffers_set:
                tensors.append(buffer)
    return tensors, tuple(kinds)


class WeightWatch:
    """Places, samples and checksums of a set of tensors, as of their full hash.

    Args:
        tensors: parameters and buffers, in a fixed order.
        settings: whatever else the hash depends on, compared as it is.
    """

    def __init__(self, tensors: Sequence[Tensor], settings: Hashable = None) -> None:
        self._places = _places(tensors)
        self._settings = settings
        self._steps = [_step(tensor) for tensor in tensors]
        self._sample = _sample(tensors, self._steps)
        self._blocks = [
            (index, first, rows) for index, t in enumerate(tensors) for first, rows in _blocks(t)
        ]
        self._sums = [_checksum(tensors[i], first, rows) for i, first, rows in self._blocks]
        self._next = 0

    @property
    def calls_to_see_all(self) -> int:
        """Calls of `changed` after which every value has been compared."""
        return -(-len(self._blocks) // BLOCKS)

    def changed(self, tensors: Sequence[Tensor], settings: Hashable = None) -> bool:
        """Whether any difference was found, so that the full hash has to be computed again."""
        if settings != self._settings or _places(tensors) != self._places:
            return True
        if _sample(tensors, self._steps) != self._sample:
            return True
        count = len(self._blocks)
        for step in range(min(BLOCKS, count)):
            number = (self._next + step) % count
            index, first, rows = self._blocks[number]
            if _checksum(tensors[index], first, rows) != self._sums[number]:
                return True
        self._next = (self._next + BLOCKS) % max(1, count)
        return False


def _places(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple(
        (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.shape) for t in tensors
    )


def _integers(tensor: Tensor) -> Tensor:
    """The tensor's bits as whole numbers, so that NaN and -0 are compared too."""
    if tensor.dtype is torch.bool:
        return tensor.to(torch.int8)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGERS[tensor.element_size()])


def _step(tensor: Tensor) -> int:
    """Distance in memory of two neighbouring values of the sample: along the diagonal."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return sum(size // SAMPLED * stride for size, stride in sizes)


@torch.no_grad()
def _sample(tensors: Sequence[Tensor], steps: Sequence[int]) -> tuple[bytes, ...]:
    """A few values of every tensor, by dtype and device."""
    taken: dict[Any, list[Tensor]] = {}
    for tensor, step in zip(tensors, steps, strict=True):
        if tensor.numel():
            few = tensor.as_strided((SAMPLED,), (step,))
            taken.setdefault((tensor.dtype, tensor.device), []).append(few)
    return tuple(torch.cat(few).view(torch.uint8).cpu().numpy().tobytes() for few in taken.values())


def _blocks(tensor: Tensor) -> list[tuple[int, int]]:
    """(first row, rows) of each block of a tensor."""
    if tensor.numel() == 0:
        return []
    if tensor.dim() == 0:
        return [(0, 1)]
    height = tensor.shape[0]
    rows = max(1, BLOCK // (tensor.numel() // height))
    return [(first, min(rows, height - first)) for first in range(0, height, rows)]


@torch.no_grad()
def _checksum(tensor: Tensor, first: int, rows: int) -> int:
    part = tensor[first : first + rows] if tensor.dim() else tensor
    return int(_integers(part.detach()).sum(dtype=torch.int64))
