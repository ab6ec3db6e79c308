"""Calls of the C++ kernels: runs of Llama-family layers, and heads, on a CPU.

`kernels/cpp/layers.cpp` has the arithmetic, `kernels.border` the checks of all that is given to it:
nothing here takes an address without them. `Layers` and `Head` keep the tensors alive whose
addresses they hold, and nothing that a call writes: any number of threads may call at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from deliberate.kernels import border
from deliberate.kernels.blocks import BlockWeight
from deliberate.kernels.native_arguments import (
    KeysValuesArgument,
    LayerArgument,
    MatrixArgument,
)
from deliberate.kernels.native_build import load
from deliberate.kernels.native_drafts import Decoded, DraftedRows, DraftRow, PackedRows
from deliberate.kernels.native_heads import Head
from deliberate.kernels.native_inputs import KeysValues, LayerTensors, Span
from deliberate.kernels.native_pools import PooledKeysValues, SequenceRuns
from deliberate.kernels.native_spans import packed_spans, tables_of


class Layers:
    """Layers by address.

    Raises:
        BorderError: something in them is not what the kernels read.
    """

    def __init__(self, layers: Sequence[LayerTensors]) -> None:
        self._layers = (LayerArgument * len(layers))(*(one.argument() for one in layers))
        self._places = border.Places([one.tensors for one in layers])
        self._sizes = [(one.kv_heads, one.head_dim) for one in layers]
        self._windows = [one.window for one in layers]
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
            *(c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p),
            *(c_int64, c_int64, c_void_p, c_void_p),
            *(c_int64, c_int64, c_void_p, c_int64, c_double, c_void_p, c_int64, c_int64),
            *(c_void_p, c_void_p, c_void_p, c_void_p, c_int64),
        )
        self._draft_rows = library.deliberate_draft_rows
        self._draft_rows.restype = c_int64
        self._draft_rows.argtypes = (
            *(c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64),
            *(c_void_p, c_void_p, c_void_p, c_int64),
            *(c_int64, c_int64, c_int64, c_void_p, c_int64),
        )

    def run(
        self,
        first: int,
        last: int,
        kv: KeysValues | PooledKeysValues,
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
            spans: whose the tokens are: those of span i are rows i * apart and on; with `apart` 0
                they follow one another.
            write_only: the layers get keys and values of the same states, which stay as they are.

        Raises:
            BorderError: an argument is not what the kernels read, or too short.
        """
        border.within(last, first, len(self._sizes), "the last layer of a pass")
        border.within(first, 0, last, "the first layer of a pass")
        tokens = border.states(hidden, self.width, "hidden states")
        cos, sin = rotary
        self._check_rotary(rotary, tokens)
        self._check_cache(kv, first, last)
        where = packed_spans(spans, apart, tokens, kv, (first, last))
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

    def ready_pass(
        self, kv: KeysValues, tokens: int, rotary: tuple[Tensor, Tensor], spans: Sequence[Span]
    ) -> tuple[int, Any]:
        """Checks a pass of so many tokens through the first layer, as `run` does; the layer's
        address, and the spans as the kernels take them."""
        self._check_rotary(rotary, tokens)
        self._check_cache(kv, 0, 1)
        self._places.check(0, 1)
        return self.address, packed_spans(spans, 0, tokens, kv, (0, 1))

    def ready_to(self, kv: KeysValues, end: int, rotary: tuple[Tensor, Tensor]) -> int:
        """Checks passes through the first layer up to position end-1; the layer's address.

        Args:
            rotary: cos and sin of all positions.
        """
        border.within(end, 1, self._positions(rotary), "the number of positions")
        self._check_cache(kv, 0, 1)
        self._places.check(0, 1)
        return self.address

    def _positions(self, rotary: tuple[Tensor, Tensor]) -> int:
        """Of how many positions, from the first on, these are the cosines and sines."""
        cos, sin = (border.states(table, self.head_dim, "rotary tables") for table in rotary)
        return min(cos, sin)

    def _check_rotary(self, rotary: tuple[Tensor, Tensor], tokens: int) -> None:
        cos, sin = rotary
        if border.states(cos, self.head_dim, "cosines") != tokens or (
            border.states(sin, self.head_dim, "sines") != tokens
        ):
            raise border.BorderError(f"cosines or sines are not of {tokens} tokens")

    def _check_cache(self, kv: KeysValues | PooledKeysValues, first: int, last: int) -> None:
        if isinstance(kv, PooledKeysValues) and kv.windows[first:last] != self._windows[first:last]:
            raise border.BorderError(
                f"a cache for windows of {kv.windows[first:last]} tokens and layers with windows "
                f"of {self._windows[first:last]}"
            )
        if kv.sizes[first:last] != self._sizes[first:last]:
            raise border.BorderError(
                f"a cache of {kv.sizes[first:last]} heads and dimensions for layers of "
                f"{self._sizes[first:last]}"
            )

    def _embedding(self, embedding: Tensor | BlockWeight) -> Any:
        """The embedding as the kernels take it."""
        if isinstance(embedding, BlockWeight):
            return embedding.argument("the embedding", None, self.width)
        rows = border.states(embedding, self.width, "the embedding's rows")
        return MatrixArgument(embedding.data_ptr(), None, rows, self.width, 0)

    @property
    def address(self) -> int:
        """Of the first layer."""
        return ctypes.addressof(self._layers)

    def __len__(self) -> int:
        return len(self._sizes)

    def ready(
        self,
        last: int,
        kv: KeysValues | PooledKeysValues,
        embedding: Tensor | BlockWeight,
        rotary: tuple[Tensor, Tensor],
        head: Head,
        threads: int,
    ) -> tuple[Any, int]:
        """Checks what decoding through layers 0..last-1 reads; the embedding as the kernels take
        it, and the number of positions that have rotary tables."""
        table = self._embedding(embedding)
        border.within(head.vocabulary, 1, table.n, "the number of tokens that the head may choose")
        border.within(last, 1, len(self._sizes), "the last layer of a pass")
        border.within(threads, 1, 4096, "the number of threads")
        self._check_cache(kv, 0, last)
        self._places.check(0, last)
        head.check(self.width)
        return table, self._positions(rotary)

    def decode(
        self,
        last: int,
        kv: KeysValues | PooledKeysValues,
        embedding: Tensor | BlockWeight,
        token: int,
        start: int,
        rotary: tuple[Tensor, Tensor],
        head: Head,
        *,
        steps: int,
        requested: int,
        statistic: int,
        threshold: float,
        stops: Sequence[int],
        accept_stops: bool,
        threads: int,
        row: int = 0,
        runs: SequenceRuns | None = None,
    ) -> Decoded:
        """Decodes greedily through layers 0..last-1, a token at a time; see `deliberate_decode`.

        Args:
            embedding: ``[V, d]``, float32 or blocks, with a row for every token that the head may
                choose.
            token, start: what is fed first, and its position.
            rotary: cos and sin of all positions, ``[positions, head_dim]``.
            head: read after each of the first `requested` passes.
            steps: passes at most.
            threshold: least score of a token that is accepted; -inf for all.
            stops: tokens that end it, and are accepted themselves only if `accept_stops`.
            row, runs: where the sequence's keys and values are, as in `Span`.

        Raises:
            BorderError: an argument is not what the kernels read, or too short.
        """
        cos, sin = rotary
        table, positions = self.ready(last, kv, embedding, rotary, head, threads)
        border.within(token, 0, table.n - 1, "the token that is fed")
        border.within(steps, 1, positions, "the number of steps")
        border.within(start, 0, positions - steps, "the first position")
        border.within(requested, 0, steps, "the number of steps that ask")
        border.within(statistic, 0, 2, "the statistic")
        tables = tables_of(kv, (0, last), row, runs, start, start + steps)
        made = torch.empty((steps, self.width), dtype=torch.float32, device="cpu")
        tokens, scores = (c_int64 * steps)(), (c_float * steps)()
        accepted = c_int64()
        passes = self._decode(
            self._layers,
            kv.arguments,
            last,
            ctypes.addressof(table),
            self.width,
            row,
            tables,
            token,
            start,
            cos.data_ptr(),
            sin.data_ptr(),
            steps,
            requested,
            ctypes.addressof(head.argument),
            statistic,
            threshold,
            (c_int64 * len(stops))(*stops),
            len(stops),
            accept_stops,
            made.data_ptr(),
            tokens,
            scores,
            ctypes.byref(accepted),
            threads,
        )
        read = min(passes, requested)
        return Decoded(made[:passes], tokens[:read], scores[:read], accepted.value)

    def draft_rows(
        self,
        last: int,
        kv: KeysValues | PooledKeysValues,
        embedding: Tensor | BlockWeight,
        rows: Sequence[DraftRow],
        rotary: tuple[Tensor, Tensor],
        head: Head,
        *,
        statistic: int,
        enough: int,
        patience: int,
        waiting: bool,
        threads: int,
    ) -> DraftedRows:
        """Drafts greedily for several sequences that share passes; see `deliberate_draft_rows`.

        Args:
            embedding, rotary, head, statistic: as for `decode`.
            enough: sequences that need a deep pass, at which the call ends.
            patience: passes after the first of them at which it ends; from the beginning on where
                others are `waiting` already.

        Raises:
            BorderError: an argument is not what the kernels read, or too short.
        """
        cos, sin = rotary
        table, positions = self.ready(last, kv, embedding, rotary, head, threads)
        border.within(statistic, 0, 2, "the statistic")
        border.within(enough, 1, 1 << 40, "the number of sequences that end a call")
        border.within(patience, 1, 1 << 40, "the number of passes to wait for")
        packed = PackedRows(rows, self.width, (table.n, positions), kv, last)
        passes = self._draft_rows(
            self._layers,
            kv.arguments,
            last,
            ctypes.addressof(table),
            self.width,
            packed.arguments,
            len(rows),
            cos.data_ptr(),
            sin.data_ptr(),
            ctypes.addressof(head.argument),
            statistic,
            enough,
            patience,
            waiting,
            packed.seconds,
            threads,
        )
        return packed.drafted(passes)
