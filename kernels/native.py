"""Calls of the C++ kernels: runs of Llama-family layers, and heads, on a CPU.

`kernels/cpp/layers.cpp` has the arithmetic, `kernels.border` the checks of all that is given to it:
nothing here takes an address without them. `Layers` and `Head` keep the tensors alive whose
addresses they hold, and nothing that a call writes: any number of threads may call at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deliberate.kernels import border
from deliberate.kernels.native_arguments import (
    HeadArgument,
    KeysValuesArgument,
    LayerArgument,
    MatrixArgument,
    SpanArgument,
)
from deliberate.kernels.native_build import load

# Of a bool that is read as a byte.
_HOLES = torch.bool


@dataclass(frozen=True)
class Weight:
    """A stored matrix: ``weight [N, K]``, its float32 ``scale [N]`` (int8 only), ``bias [N]``."""

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        return [part for part in (self.weight, self.scale, self.bias) if part is not None]

    def argument(self, name: str, n: int | None = None, k: int | None = None) -> Any:
        """What the kernels get of it.

        Args:
            name: for the error.
            n, k: sizes that it must have, or None for any.

        Raises:
            BorderError: it has no form that the kernels read, or another size.
        """
        address, rows, columns = border.stored(self.weight, f"{name}.weight")
        if (self.weight.dtype is torch.int8) != (self.scale is not None):
            raise border.BorderError(f"{name}: int8 weights need a scale, and no others have one")
        for found, needed, what in ((rows, n, "rows"), (columns, k, "columns")):
            if needed is not None:
                border.same(found, needed, f"the number of {what} of {name}.weight")
        return MatrixArgument(
            address,
            None if self.scale is None else border.plain(self.scale, f"{name}.scale", (rows,)),
            None if self.bias is None else border.plain(self.bias, f"{name}.bias", (rows,)),
            rows,
            columns,
            border.STORAGE[self.weight.dtype],
        )


@dataclass(frozen=True)
class LayerTensors:
    """One decoder layer: weights as in `deliberate.executors.fused.weights.LayerWeights`, and its numbers."""

    qkv: Weight
    out: Weight
    gate_up: Weight
    down: Weight
    attention_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    mlp_norm: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    scaling: float
    eps: float
    head_eps: float

    @property
    def tensors(self) -> list[Tensor]:
        """All that the kernels read."""
        norms = (self.attention_norm, self.query_norm, self.key_norm, self.mlp_norm)
        found = [norm for norm in norms if norm is not None]
        for part in (self.qkv, self.out, self.gate_up, self.down):
            found += part.tensors
        return found

    def argument(self) -> Any:
        """What the kernels get of it; every size follows from the numbers and the width.

        Raises:
            BorderError: a tensor is not what they read, or sizes contradict each other.
        """
        for name in ("heads", "kv_heads", "head_dim"):
            border.within(getattr(self, name), 1, 1 << 20, f"a layer's {name}")
        border.same(self.heads % self.kv_heads, 0, "the remainder of heads over kv_heads")
        border.same(self.head_dim % 2, 0, "the remainder of head_dim over 2")
        border.within(self.window, 0, 1 << 40, "a layer's window")
        width = self.attention_norm.numel()
        inner, kv = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        feed = self.down.weight.shape[-1]

        def norm(x: Tensor | None, name: str, size: int) -> int | None:
            return None if x is None else border.plain(x, f"a layer's {name}", (size,))

        return LayerArgument(
            self.qkv.argument("a layer's qkv", inner + kv, width),
            self.out.argument("a layer's out", width, inner),
            self.gate_up.argument("a layer's gate_up", 2 * feed, width),
            self.down.argument("a layer's down", width, feed),
            norm(self.attention_norm, "attention_norm", width),
            norm(self.query_norm, "query_norm", self.head_dim),
            norm(self.key_norm, "key_norm", self.head_dim),
            norm(self.mlp_norm, "mlp_norm", width),
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.window,
            self.scaling,
            self.eps,
            self.head_eps,
        )


class KeysValues:
    """Cache buffers ``[batch, kv_heads, capacity, head_dim]``, one pair a layer, by address.

    Raises:
        BorderError: a buffer is not contiguous float32 on the CPU, or they do not fit each other.
    """

    def __init__(self, buffers: Sequence[tuple[Tensor, Tensor]]) -> None:
        made = []
        self.batch = buffers[0][0].shape[0]
        self.capacity = min(keys.shape[2] for keys, _ in buffers)
        self.sizes = [(keys.shape[1], keys.shape[3]) for keys, _ in buffers]
        for (keys, values), (heads, dim) in zip(buffers, self.sizes, strict=True):
            shape = (self.batch, heads, keys.shape[2], dim)
            made.append(
                KeysValuesArgument(
                    border.plain(keys, "a layer's cached keys", shape),
                    border.plain(values, "a layer's cached values", shape),
                    keys.shape[2],
                )
            )
        self._keep = list(buffers)
        self.arguments = (KeysValuesArgument * len(made))(*made)


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one sequence: its cache row, first position, number of tokens.

    Attributes:
        holes: bool ``[slots]``, True where a slot of the row holds nothing; None: nowhere.
    """

    row: int
    start: int
    count: int
    holes: Tensor | None = None


class Layers:
    """Layers by address.

    Raises:
        BorderError: something in them is not what the kernels read.
    """

    def __init__(self, layers: Sequence[LayerTensors]) -> None:
        self._layers = (LayerArgument * len(layers))(*(one.argument() for one in layers))
        self._places = border.Places([one.tensors for one in layers])
        self._sizes = [(one.kv_heads, one.head_dim) for one in layers]
        self.width = layers[0].attention_norm.numel()
        for one in layers:
            border.same(one.attention_norm.numel(), self.width, "the width of a layer")
            border.same(one.head_dim, layers[0].head_dim, "the head_dim of a layer")
        self.head_dim = layers[0].head_dim
        library = load()
        self._run = library.deliberate_run_layers
        self._run.restype = None
        self._run.argtypes = (
            *(c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64),
            *(c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64),
        )
        self._decode = library.deliberate_decode
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
        kv: KeysValues,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        spans: Sequence[Span],
        apart: int,
        threads: int,
        *,
        write_only: bool = False,
    ) -> None:
        """Takes hidden states ``[N, d]`` through layers first..last-1, in place.

        Args:
            kv: of all layers, with room for the pass.
            rotary: cos and sin, N rows of head_dim each.
            spans: whose the tokens are: those of span i are rows i * apart and on.
            write_only: the layers get keys and values of the same states, which stay as they are.

        Raises:
            BorderError: an argument is not what the kernels read, or too short.
        """
        border.within(last, first, len(self._sizes), "the last layer of a pass")
        border.within(first, 0, last, "the first layer of a pass")
        tokens = border.states(hidden, self.width, "hidden states")
        cos, sin = rotary
        if border.states(cos, self.head_dim, "cosines") != tokens or (
            border.states(sin, self.head_dim, "sines") != tokens
        ):
            raise border.BorderError(f"cosines or sines are not of {tokens} tokens")
        where = self._where(spans, apart, tokens, kv)
        self._check_cache(kv, first, last)
        self._places.check(first, last)
        border.within(threads, 1, 4096, "the number of threads")
        self._run(
            ctypes.addressof(self._layers) + first * ctypes.sizeof(LayerArgument),
            ctypes.addressof(kv.arguments) + first * ctypes.sizeof(KeysValuesArgument),
            last - first,
            hidden.data_ptr(),
            tokens,
            self.width,
            cos.data_ptr(),
            sin.data_ptr(),
            where,
            len(spans),
            write_only,
            threads,
        )

    def _where(self, spans: Sequence[Span], apart: int, tokens: int, kv: KeysValues) -> Any:
        """The spans as the kernels take them, each within the cache and the pass."""
        made = (SpanArgument * len(spans))()
        for index, span in enumerate(spans):
            offset, end = index * apart, span.start + span.count
            if not (
                0 <= span.row < kv.batch
                and span.start >= 0
                and 0 <= span.count <= apart
                and end <= kv.capacity
                and offset + span.count <= tokens
            ):
                raise border.BorderError(
                    f"{span.count} tokens of row {span.row} from position {span.start}, at {offset}"
                    f" of a pass of {tokens}: the cache has {kv.batch} rows of {kv.capacity} slots"
                )
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
            made[index] = SpanArgument(span.row, span.start, span.count, offset, address)
        return made

    def _check_cache(self, kv: KeysValues, first: int, last: int) -> None:
        if kv.sizes[first:last] != self._sizes[first:last]:
            raise border.BorderError(
                f"a cache of {kv.sizes[first:last]} heads and dimensions for layers of "
                f"{self._sizes[first:last]}"
            )

    def decode(
        self,
        last: int,
        kv: KeysValues,
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
            embedding: ``[V, d]``, with a row for every token that the head may choose.
            token, start: what is fed first, and its position.
            rotary: cos and sin of all positions, ``[positions, head_dim]``.
            head: read after each of the first `asked` passes.
            steps: passes at most.
            threshold: least score of a token that stands; -inf for all.
            stops: tokens that end it, and stand themselves only if `stops_stand`.

        Raises:
            BorderError: an argument is not what the kernels read, or too short.
        """
        cos, sin = rotary
        rows = border.states(embedding, self.width, "the embedding's rows")
        border.within(head.vocabulary, 1, rows, "the number of tokens that the head may choose")
        border.within(token, 0, rows - 1, "the token that is fed")
        border.within(last, 1, len(self._sizes), "the last layer of a pass")
        positions = min(
            border.states(cos, self.head_dim, "cosines"),
            border.states(sin, self.head_dim, "sines"),
            kv.capacity,
        )
        border.within(steps, 1, positions, "the number of steps")
        border.within(start, 0, positions - steps, "the first position")
        border.within(asked, 0, steps, "the number of steps that ask")
        border.within(statistic, 0, 2, "the statistic")
        border.within(threads, 1, 4096, "the number of threads")
        self._check_cache(kv, 0, last)
        self._places.check(0, last)
        head.check(self.width)
        made = torch.empty((steps, self.width), dtype=torch.float32, device="cpu")
        tokens, scores = (c_int64 * steps)(), (c_float * steps)()
        standing = c_int64()
        passes = self._decode(
            self._layers,
            kv.arguments,
            last,
            embedding.data_ptr(),
            self.width,
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
            made.data_ptr(),
            tokens,
            scores,
            ctypes.byref(standing),
            threads,
        )
        read = min(passes, asked)
        return Decoded(made[:passes], tokens[:read], scores[:read], standing.value)


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

    Raises:
        BorderError: something in it is not what the kernels read, or sizes do not fit.
    """

    def __init__(
        self, gain: Tensor | None, eps: float, head: Weight, factors: Sequence[Tensor] = ()
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
        self.argument = HeadArgument(matrix, address, where, len(chain), eps)
        self.vocabulary: int = matrix.n
        norms = [] if gain is None else [gain]
        self._places = border.Places([[*norms, *head.tensors, *factors]])
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
