"""Calls of the C++ kernels: runs of Llama-family layers, and heads, for a few tokens on a CPU.

`kernels/cpp/layers.cpp` has the arithmetic. What is given to it are addresses, so everything that
is not float32, contiguous and on the CPU is the caller's to exclude; `Layers` and `Head` keep the
tensors alive whose addresses they hold.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deliberate.kernels.native_build import load

_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
# Rows of a head whose tokens and scores have a place ready.
MOST_ROWS = 64


class MatrixArgument(ctypes.Structure):
    """``Matrix`` of products.h."""

    _fields_ = (
        ("data", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("storage", c_int64),
    )


class LayerArgument(ctypes.Structure):
    """``Layer`` of layers.cpp."""

    _fields_ = (
        ("qkv", MatrixArgument),
        ("out", MatrixArgument),
        ("gate_up", MatrixArgument),
        ("down", MatrixArgument),
        ("attention_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("window", c_int64),
        ("scaling", c_float),
        ("eps", c_float),
        ("head_eps", c_float),
    )


class HeadArgument(ctypes.Structure):
    """``Head`` of layers.cpp."""

    _fields_ = (
        ("matrix", MatrixArgument),
        ("gain", c_void_p),
        ("factors", c_void_p),
        ("n_factors", c_int64),
        ("eps", c_float),
    )


class KeysValuesArgument(ctypes.Structure):
    """``KeysValues`` of layers.cpp."""

    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("capacity", c_int64))


class SpanArgument(ctypes.Structure):
    """``Span`` of layers.cpp."""

    _fields_ = (("row", c_int64), ("start", c_int64), ("count", c_int64), ("offset", c_int64))


def matrix(weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Any:
    """A weight ``[N, K]``, float32, bfloat16, or int8 with its float32 scale ``[N]``.

    Raises:
        ValueError: it has no form that the kernels read.
    """
    plain = [part for part in (scale, bias) if part is not None]
    if weight.dtype not in _STORAGE or any(part.dtype != torch.float32 for part in plain):
        raise ValueError(f"no C++ kernel reads weights of dtype {weight.dtype}")
    if not all(part.is_contiguous() and part.device.type == "cpu" for part in (weight, *plain)):
        raise ValueError("the C++ kernels read contiguous weights on the CPU")
    rows, columns = weight.shape
    where = [None if part is None else part.data_ptr() for part in (scale, bias)]
    return MatrixArgument(weight.data_ptr(), *where, rows, columns, _STORAGE[weight.dtype])


def address(x: Tensor | None) -> int | None:
    """Of a contiguous float32 tensor on the CPU, or None.

    Raises:
        ValueError: it is another kind of tensor.
    """
    if x is None:
        return None
    if x.dtype != torch.float32 or not x.is_contiguous() or x.device.type != "cpu":
        raise ValueError(f"not contiguous float32 on the CPU: {x.dtype}, {tuple(x.shape)}")
    return x.data_ptr()


def keys_values(buffers: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """Addresses of cache buffers ``[batch, kv_heads, capacity, head_dim]``, one pair a layer."""
    made = [
        KeysValuesArgument(address(keys), address(values), keys.shape[2])
        for keys, values in buffers
    ]
    return (KeysValuesArgument * len(made))(*made)


def spans(rows: Sequence[int], starts: Sequence[int], counts: Sequence[int], apart: int) -> Any:
    """Which tokens are whose: cache rows, first positions, numbers; `apart` tokens a row."""
    made = [
        SpanArgument(row, start, count, index * apart)
        for index, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True))
    ]
    return (SpanArgument * len(made))(*made)


class Layers:
    """Layers by address.

    Args:
        layers: one `LayerArgument` each.
        keep: tensors that must live as long.
    """

    def __init__(self, layers: Sequence[Any], keep: object) -> None:
        self._layers = (LayerArgument * len(layers))(*layers)
        self._keep = keep
        self._run = load().deliberate_run_layers
        self._run.restype = None
        self._run.argtypes = (
            *(c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64),
            *(c_void_p, c_void_p, c_void_p, c_int64, c_int64),
        )

        self._decode = load().deliberate_decode
        self._decode.restype = c_int64
        self._decode.argtypes = (
            *(c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p),
            *(c_int64, c_int64, c_void_p, c_int64, c_double, c_void_p, c_int64, c_int64),
            *(c_void_p, c_void_p, c_void_p, c_void_p, c_int64),
        )

    def run(
        self,
        first: int,
        last: int,
        kv: Any,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        where: Any,
        threads: int,
    ) -> None:
        """Takes hidden states ``[N, d]`` through layers first..last-1, in place.

        Args:
            kv: `keys_values` of all layers.
            rotary: cos and sin, N rows of head_dim each.
            where: `spans` of the N tokens.
        """
        cos, sin = rotary
        tokens = hidden.numel() // hidden.shape[-1]
        self._run(
            ctypes.addressof(self._layers) + first * ctypes.sizeof(LayerArgument),
            ctypes.addressof(kv) + first * ctypes.sizeof(KeysValuesArgument),
            last - first,
            hidden.data_ptr(),
            tokens,
            hidden.shape[-1],
            cos.data_ptr(),
            sin.data_ptr(),
            where,
            len(where),
            threads,
        )

    def decode(
        self,
        last: int,
        kv: Any,
        embedding: Tensor,
        token: int,
        start: int,
        rotary: tuple[Tensor, Tensor],
        head: Head,
        *,
        steps: int,
        asked: int,
        statistic: int,
        threshold: float,
        stops: Sequence[int],
        stops_stand: bool,
        threads: int,
    ) -> Decoded:
        """Decodes greedily through layers 0..last-1, a token at a time; see `deliberate_decode`.

        Args:
            embedding: ``[V, d]``.
            token, start: what is fed first, and its position.
            rotary: cos and sin of all positions, ``[positions, head_dim]``.
            head: read after each of the first `asked` passes.
            steps: passes at most.
            threshold: least score of a token that stands; -inf for all.
            stops: tokens that end it, and stand themselves only if `stops_stand`.
        """
        cos, sin = rotary
        width = embedding.shape[1]
        states = embedding.new_empty((steps, width))
        tokens, scores = (c_int64 * steps)(), (c_float * steps)()
        standing = c_int64()
        passes = self._decode(
            self._layers,
            kv,
            last,
            embedding.data_ptr(),
            width,
            token,
            start,
            cos.data_ptr(),
            sin.data_ptr(),
            steps,
            asked,
            ctypes.addressof(head.argument),
            statistic,
            threshold,
            (c_int64 * len(stops))(*stops),
            len(stops),
            stops_stand,
            states.data_ptr(),
            tokens,
            scores,
            ctypes.byref(standing),
            threads,
        )
        read = min(passes, asked)
        return Decoded(states[:passes], tokens[:read], scores[:read], standing.value)


@dataclass(frozen=True)
class Decoded:
    """What `Layers.decode` did.

    Attributes:
        states: after the layers, ``[passes, d]``.
        tokens, scores: chosen after each pass that asked the head.
        standing: of the tokens, so many stand: all of them, or all but the last.
    """

    states: Tensor
    tokens: list[int]
    scores: list[float]
    standing: int


class Head:
    """A head by address: final norm, translator's factors, matrix ``[V, d]``.

    Args:
        gain, eps: of the norm.
        head, factors: made by `matrix`.
        keep: tensors that must live as long.
    """

    def __init__(
        self, gain: Tensor, eps: float, head: Any, factors: Sequence[Any], keep: object
    ) -> None:
        self._factors = (MatrixArgument * max(1, len(factors)))(*factors)
        where = ctypes.addressof(self._factors)
        self.argument = HeadArgument(head, address(gain), where, len(factors), eps)
        self._keep = (gain, keep)
        self._best = (c_int64 * MOST_ROWS)()
        self._stats = (c_float * (3 * MOST_ROWS))()
        self._read = load().deliberate_read_head
        self._read.restype = None
        self._read.argtypes = (
            *(c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int64),
        )

    def logits(self, states: Tensor, threads: int, *, stats: bool = False) -> Tensor:
        """Logits ``[R, V]`` of contiguous states ``[R, d]``; with `stats` see `tokens`."""
        rows, width = states.shape
        logits = states.new_empty((rows, self.argument.matrix.n))
        self._read(
            ctypes.addressof(self.argument),
            states.data_ptr(),
            rows,
            width,
            logits.data_ptr(),
            self._best,
            self._stats if stats else None,
            threads,
        )
        return logits

    def tokens(self, rows: int) -> list[int]:
        """The most likely token of each of the first rows of the last call with `stats`."""
        return self._best[:rows]

    def statistic(self, which: int, rows: int) -> list[float]:
        """Of the last call: 0 the largest probability, 1 its lead, 2 certainty 1 - H / log V."""
        return self._stats[which : 3 * rows : 3]
