"""What the C++ kernels are given: weights, layers, keys and values, spans; checked when it is
made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deliberate.kernels import border
from deliberate.kernels.blocks import BlockWeight
from deliberate.kernels.native_arguments import (
    SCALE_BYTES,
    KeysValuesArgument,
    LayerArgument,
    MatrixArgument,
)
from deliberate.kernels.native_pools import SequenceRuns


@dataclass(frozen=True)
class Weight:
    """A matrix in float32: ``weight [N, K]``, ``bias [N]``. Others are `BlockWeight`."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def columns(self) -> int:
        """K."""
        return self.weight.shape[-1]

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        return [part for part in (self.weight, self.bias) if part is not None]

    def argument(self, name: str, n: int | None = None, k: int | None = None) -> Any:
        """What the kernels get of it.

        Args:
            name: for the error.
            n, k: sizes that it must have, or None for any.

        Raises:
            BorderError: it has no form that the kernels read, or another size.
        """
        address, rows, columns = border.stored(self.weight, f"{name}.weight")
        for found, needed, what in ((rows, n, "rows"), (columns, k, "columns")):
            if needed is not None:
                border.same(found, needed, f"the number of {what} of {name}.weight")
        return MatrixArgument(
            address,
            None if self.bias is None else border.plain(self.bias, f"{name}.bias", (rows,)),
            rows,
            columns,
            border.STORAGE[torch.float32],
        )


@dataclass(frozen=True)
class LayerTensors:
    """One decoder layer: weights as in `deliberate.executors.fused.weights.LayerWeights`, and its
    numbers."""

    qkv: Weight | BlockWeight
    out: Weight | BlockWeight
    gate_up: Weight | BlockWeight
    down: Weight | BlockWeight
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
        feed = self.down.columns

        if isinstance(self.qkv, BlockWeight):
            self.qkv.check_part_ends(inner, "a layer's qkv")

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
    """Cache buffers ``[batch, kv_heads, capacity, entry]``, one pair a layer, by address.

    An entry is head_dim float32, or uint8 ``[head_dim + 4]``: as many whole numbers of 8 bits and
    their scale, as `deliberate.cache.int8_cache` packs them.

    Raises:
        BorderError: a buffer is not contiguous and of one of these kinds on the CPU, or they do not
            fit each other.
    """

    def __init__(self, buffers: Sequence[tuple[Tensor, Tensor]]) -> None:
        made = []
        self.batch = buffers[0][0].shape[0]
        self.capacity = min(keys.shape[2] for keys, _ in buffers)
        packs = buffers[0][0].dtype is torch.uint8
        extra = SCALE_BYTES if packs else 0
        self.sizes = [(keys.shape[1], keys.shape[3] - extra) for keys, _ in buffers]
        for (keys, values), (heads, dim) in zip(buffers, self.sizes, strict=True):
            shape = (self.batch, heads, keys.shape[2], dim + extra)
            address = border.packs if packs else border.plain
            made.append(
                KeysValuesArgument(
                    address(keys, "a layer's cached keys", shape),
                    address(values, "a layer's cached values", shape),
                    keys.shape[2],
                    heads * keys.shape[2],
                    0,
                    border.STORAGE[torch.int8 if packs else torch.float32],
                )
            )
        self._keep = list(buffers)
        self.arguments = (KeysValuesArgument * len(made))(*made)


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one sequence: its cache row, first position, number of tokens.

    Attributes:
        holes: bool ``[positions]``, True where a position holds nothing; None: nowhere.
        runs: where its slots are in pools; None: in its row of the buffers.
    """

    row: int
    start: int
    count: int
    holes: Tensor | None = None
    runs: SequenceRuns | None = None
