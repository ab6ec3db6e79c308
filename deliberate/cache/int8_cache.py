"""Keys and values in 8 bits, each head of each token with a scale of its own.

A key or value vector ``[head_dim]`` is kept as ``head_dim`` whole numbers from -127 to 127 and one
float32 scale behind them (per token and head, as in KIVI's values, arXiv:2402.02750). It is rounded
once, when it is written, and whoever attends to it reads what was rounded, the token itself
included: what a token computes does not depend on how many tokens its pass has, so exact mode gives
the tokens of dense decoding over the same cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deliberate.cache.kv_cache import SegmentCache
from deliberate.config import KVStorage
from deliberate.kernels.native_arguments import SCALE_BYTES


class Int8Cache(SegmentCache):
    """A `SegmentCache` that keeps a quarter of float32's bytes, or half of bfloat16's.

    Each update widens what the layer holds: attention reads floats, of one layer at a time.
    """

    storage = KVStorage.INT8

    def __init__(self, num_layers: int, capacity: int = 0, batch: int = 1) -> None:
        super().__init__(num_layers, capacity, batch)
        self._dtype = torch.float32

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Append ``[R, kv_heads, T, head_dim]`` to a layer; return all tokens of these rows."""
        self._dtype = key_states.dtype
        keys, values = super().update(packed(key_states), packed(value_states), layer_idx)
        return unpacked(keys, self._dtype), unpacked(values, self._dtype)

    def states(self, layer: int, row: int | None = None) -> tuple[Tensor, Tensor]:
        """As `SegmentCache.states`, widened: copies, not views."""
        keys, values = super().states(layer, row)
        return unpacked(keys, self._dtype), unpacked(values, self._dtype)

    def adopt(self, layer: int, row: int, slot: int, keys: Tensor, values: Tensor) -> None:
        """As `SegmentCache.adopt`; what is taken over is rounded."""
        self._dtype = keys.dtype
        super().adopt(layer, row, slot, packed(keys), packed(values))


def packed(states: Tensor) -> Tensor:
    """Floats ``[..., head_dim]`` -> uint8 ``[..., head_dim + 4]``: numbers, then scale."""
    wide = states.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127.0
    whole = (wide / torch.where(scale > 0, scale, 1.0)).round().to(torch.int8)
    return torch.cat((whole.view(torch.uint8), scale.contiguous().view(torch.uint8)), dim=-1)


def unpacked(packs: Tensor, dtype: torch.dtype) -> Tensor:
    """What `packed` made, as floats ``[..., head_dim]``."""
    whole = packs[..., :-SCALE_BYTES].view(torch.int8)
    scale = (
        packs[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    )
    return (whole * scale).to(dtype)
