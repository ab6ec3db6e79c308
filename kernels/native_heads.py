"""Heads by the C++ kernels: logits, and the token with its statistics."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deliberate.kernels import border
from deliberate.kernels.blocks import BlockWeight
from deliberate.kernels.native_arguments import (
    HeadArgument,
    MatrixArgument,
)
from deliberate.kernels.native_build import load
from deliberate.kernels.native_inputs import Weight


@dataclass(frozen=True)
class HeadReading:
    """What a head made of states.

    Attributes:
        logits: ``[R, V]``.
        tokens: the most likely of each.
    """

    logits: Tensor
    tokens: list[int]
    _statistics: list[float]

    def statistic(self, which: int) -> list[float]:
        """0 the largest probability, 1 its lead, 2 certainty 1 - H / log V; of each row."""
        return self._statistics[which::3]


class Head:
    """A head by address: final norm, translator's factors, matrix ``[V, d]``.

    Args:
        gain, eps: of the norm; None where states have been normed already.
        head: the matrix.
        factors: of a translator x -> x + ... F2 F1 x.
        ids: int64 ``[V]``, the token of each row; None: row i is of token i.

    Raises:
        BorderError: something in it is not what the kernels read, or sizes do not fit.
    """

    def __init__(
        self,
        gain: Tensor | None,
        eps: float,
        head: Weight | BlockWeight,
        factors: Sequence[Tensor] = (),
        ids: Tensor | None = None,
    ) -> None:
        matrix = head.argument("the head")
        self._width = width = matrix.k
        chain, columns = [], width
        for index, factor in enumerate(factors):
            n = width if index == len(factors) - 1 else None
            chain.append(Weight(factor).argument(f"factor {index} of a translator", n, columns))
            columns = chain[-1].n
        address = None if gain is None else border.plain(gain, "the final norm", (width,))
        self._factors = (MatrixArgument * max(1, len(chain)))(*chain)
        where = ctypes.addressof(self._factors)
        tokens = None if ids is None else border.token_ids(ids, "tokens of a head's rows", matrix.n)
        self.argument = HeadArgument(matrix, address, where, len(chain), eps, tokens)
        self.vocabulary: int = matrix.n
        self.tokens_end: int = matrix.n if ids is None else int(ids.max()) + 1
        extra = [one for one in (gain, ids) if one is not None]
        self._places = border.Places([[*extra, *head.tensors, *factors]])
        self._read = load().deliberate_read_head
        self._read.restype = None
        self._read.argtypes = (
            *(c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int64),
        )

    def check(self, width: int) -> None:
        """Raises `BorderError` unless it reads states of this width and is where it was."""
        border.same(width, self._width, "the width of states that a head reads")
        self._places.check(0, 1)

    def logits(self, states: Tensor, threads: int) -> Tensor:
        """Logits ``[R, V]`` of contiguous states ``[R, d]``."""
        return self._call(states, threads, None, None)

    def read(self, states: Tensor, threads: int) -> HeadReading:
        """Logits, tokens and statistics of contiguous states ``[R, d]``."""
        rows = states.shape[0] if states.dim() else 0
        best, statistics = (c_int64 * rows)(), (c_float * (3 * rows))()
        logits = self._call(states, threads, best, statistics)
        return HeadReading(logits, best[:], statistics[:])

    def _call(self, states: Tensor, threads: int, best: Any, statistics: Any) -> Tensor:
        border.same(states.dim(), 2, "the number of dimensions of states that a head reads")
        rows = border.states(states, self._width, "states that a head reads")
        border.within(threads, 1, 4096, "the number of threads")
        self._places.check(0, 1)
        logits = torch.empty((rows, self.vocabulary), dtype=torch.float32, device="cpu")
        self._read(
            ctypes.addressof(self.argument),
            states.data_ptr(),
            rows,
            self._width,
            logits.data_ptr(),
            best,
            statistics,
            threads,
        )
        return logits
