"""Key/value cache whose layers may hold different numbers of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deliberate.errors import DeliberateError

MIN_CAPACITY = 64


class SegmentCache:
    """Preallocated, growable KV cache with one length per layer, for inference.

    Pass it as the cache argument of a transformers decoder layer: the layer calls :meth:`update`
    and attends to what that returns. Keys and values have shape ``[B, kv_heads, T, head_dim]``;
    all rows of a batch have the same length. Batch, heads, dtype and device of a layer are those
    of its first update, when its buffers are allocated.

    Appending writes into the buffer and returns views, so one decoding step costs the same at
    every context length; a full buffer grows by doubling. The views of an earlier update stay
    readable until the layer is written below their end (after :meth:`crop`).

    Layers with sliding-window attention keep every token as well: the mask restricts what they
    see, and rolling back stays a matter of a shorter length.

    Invariant: lengths are non-increasing with depth, because a token reaches a layer only through
    those below it. :meth:`check` raises where it does not hold.
    """

    def __init__(self, num_layers: int, capacity: int = 0) -> None:
        """``capacity``: tokens to make room for at the first update of a layer."""
        if num_layers < 1:
            raise DeliberateError(f"a cache needs at least 1 layer, got num_layers={num_layers}")
        if capacity < 0:
            raise DeliberateError(f"cache capacity must be >= 0 tokens, got {capacity}")
        self._initial_capacity = capacity
        self._lengths = [0] * num_layers
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self._capacities = [0] * num_layers

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self._lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens held by each layer, first layer first (a copy)."""
        return list(self._lengths)

    def length(self, layer: int) -> int:
        """Tokens held by one layer."""
        return self._lengths[layer]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Same as :meth:`length`, under the name that transformers uses."""
        return self._lengths[layer_idx]

    @property
    def bytes_allocated(self) -> int:
        """Bytes of all buffers, used slots or not."""
        return sum(b.nbytes for b in (*self._keys, *self._values) if b is not None)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Append ``[B, kv_heads, T, head_dim]`` to a layer; return views of all its tokens.

        Further arguments, which transformers gives to some of its own caches, are ignored.
        """
        tokens = key_states.shape[2]
        start = self._lengths[layer_idx]
        end = start + tokens
        if end > self._capacities[layer_idx]:
            self._grow(layer_idx, end, key_states, value_states)
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        assert keys is not None and values is not None  # _grow has allocated them
        keys.narrow(2, start, tokens).copy_(key_states)
        values.narrow(2, start, tokens).copy_(value_states)
        self._lengths[layer_idx] = end
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def states(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views of the keys and values that a layer holds; an error if it never held any."""
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            raise DeliberateError(f"layer {layer} of the cache has never been written")
        return keys.narrow(2, 0, self._lengths[layer]), values.narrow(2, 0, self._lengths[layer])

    def crop(self, length: int) -> None:
        """Forget every token at position ``length`` and after, in all layers; buffers stay."""
        if length < 0:
            raise DeliberateError(f"cannot crop a cache to {length} tokens: it must be >= 0")
        self._lengths = [min(held, length) for held in self._lengths]

    def check(self) -> None:
        """Raise RuntimeError unless lengths are non-increasing with depth."""
        for layer, (below, here) in enumerate(zip(self._lengths, self._lengths[1:], strict=False)):
            if here > below:
                raise RuntimeError(
                    f"cache layer {layer + 1} holds {here} tokens, more than the {below} "
                    f"of layer {layer} below it"
                )

    def _grow(self, layer: int, needed: int, key_states: Tensor, value_states: Tensor) -> None:
        if self._keys[layer] is None:
            capacity = max(self._initial_capacity, needed, MIN_CAPACITY)
        else:
            capacity = max(2 * self._capacities[layer], needed)
        held = self._lengths[layer]
        for buffers, new in ((self._keys, key_states), (self._values, value_states)):
            batch, heads, _, head_dim = new.shape
            old = buffers[layer]
            buffer = torch.empty(
                (batch, heads, capacity, head_dim), dtype=new.dtype, device=new.device
            )
            if old is not None:
                buffer[:, :, :held] = old[:, :, :held]
            buffers[layer] = buffer
        self._capacities[layer] = capacity
