"""A draft layer by the C++ kernels: entries of states and tokens in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from deliberate.kernels import border
from deliberate.kernels.blocks import BlockWeight
from deliberate.kernels.native import Layers
from deliberate.kernels.native_arguments import MatrixArgument
from deliberate.kernels.native_build import load
from deliberate.kernels.native_heads import Head
from deliberate.kernels.native_inputs import KeysValues, Span, Weight
from deliberate.kernels.native_spans import tables_of


class _Joining(ctypes.Structure):
    """``Joining`` of draft_layer.cpp."""

    _fields_ = (
        ("embedding", MatrixArgument),
        ("matrix", MatrixArgument),
        ("embedding_gain", c_void_p),
        ("state_gain", c_void_p),
        ("embedding_eps", c_float),
        ("state_eps", c_float),
    )


class DraftLayerCall:
    """One draft layer by address.

    Args:
        layers: that layer alone.
        embedding: the model's, ``[V, d]``.
        joining: ``[d, 2 d]``.
        embedding_norm, state_norm: gain ``[d]`` and eps of the norms of embeddings and of states.

    Attributes:
        address: of what comes before the layer.
        tokens: that have an embedding.

    Raises:
        BorderError: something in it is not what the kernels read, or sizes do not fit.
    """

    def __init__(
        self,
        layers: Layers,
        embedding: Weight | BlockWeight,
        joining: Weight | BlockWeight,
        embedding_norm: tuple[Tensor, float],
        state_norm: tuple[Tensor, float],
    ) -> None:
        d = layers.width
        self._layers = layers
        self._argument = _Joining(
            embedding.argument("the embedding", None, d),
            joining.argument("the joining matrix", d, 2 * d),
            border.plain(embedding_norm[0], "the norm of embeddings", (d,)),
            border.plain(state_norm[0], "the norm of states", (d,)),
            embedding_norm[1],
            state_norm[1],
        )
        self.address = ctypes.addressof(self._argument)
        self.tokens: int = self._argument.embedding.n
        gains = [embedding_norm[0], state_norm[0]]
        self._places = border.Places([[*embedding.tensors, *joining.tensors, *gains]])
        library = load()
        library.deliberate_joining_size.restype = c_int64
        size = int(library.deliberate_joining_size())
        border.same(ctypes.sizeof(_Joining), size, "the size of a structure")
        self._call = library.deliberate_extend_draft
        self._call.restype = None
        self._call.argtypes = (
            *(c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64),
            *(c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64),
        )

    def extend(
        self,
        kv: KeysValues,
        states: Tensor,
        tokens: Sequence[int],
        rotary: tuple[Tensor, Tensor],
        spans: Sequence[Span],
        threads: int,
    ) -> Tensor:
        """Appends entries; their outputs ``[n, d]``.

        Args:
            kv: of the layer, with room for them.
            states: ``[n, d]``.
            tokens: after each of them.
            rotary: cos and sin, n rows of head_dim each.
            spans: whose the entries are, one after another.

        Raises:
            BorderError: an argument is not what the kernels read, or too short.
        """
        n, d = len(tokens), self._layers.width
        border.within(n, 1, 1 << 40, "the number of entries")
        border.same(border.states(states, d, "states"), n, "the number of states")
        border.within(min(tokens), 0, self.tokens - 1, "the least token")
        border.within(max(tokens), 0, self.tokens - 1, "the largest token")
        border.within(threads, 1, 4096, "the number of threads")
        layer, where = self._layers.ready_pass(kv, n, rotary, spans)
        self._places.check(0, 1)
        outputs = torch.empty((n, d), dtype=torch.float32, device="cpu")
        self._call(
            ctypes.addressof(self._argument),
            layer,
            ctypes.addressof(kv.arguments),
            states.data_ptr(),
            (c_int64 * n)(*tokens),
            n,
            d,
            rotary[0].data_ptr(),
            rotary[1].data_ptr(),
            where,
            len(spans),
            outputs.data_ptr(),
            threads,
        )
        return outputs

    def ready(
        self,
        kv: KeysValues,
        head: Head,
        rotary: tuple[Tensor, Tensor],
        row: int,
        start: int,
        end: int,
    ) -> int:
        """Checks entries start..end-1 of a row, drafts among them; the layer's address.

        Args:
            head: reads outputs.
            rotary: cos and sin of all positions.

        Raises:
            BorderError: an argument is not what the kernels read, or too short.
        """
        border.within(head.tokens_end, 1, self.tokens, "the number of tokens that are drafted")
        border.within(start, 0, end, "the first position")
        layer = self._layers.ready_to(kv, end, rotary)
        tables_of(kv, (0, 1), row, None, start, end)
        self._places.check(0, 1)
        head.check(self._layers.width)
        return layer
