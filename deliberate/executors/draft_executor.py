"""Runs a draft layer while decoding: by the C++ kernels where they can, else by torch.

Its weights are read once a draft, so on a CPU they are kept in int8: a draft that rounding changed
is still verified by the full-depth model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deliberate.executors.fused.native import NativeHead, unavailable, weight_of
from deliberate.executors.quantization import Storage, Stored, store
from deliberate.kernels.blocks import BlockWeight
from deliberate.kernels.native import Layers
from deliberate.kernels.native_inputs import KeysValues, LayerTensors, Span, Weight
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.block_modules import BlockLinear
from deliberate.modeling.draft_layer import DraftLayer, rms_norm
from deliberate.modeling.measures import MAX_PROB
from deliberate.utils.errors import DeliberateError

# Tokens that keys and values have room for at first.
_ROOM = 512


class DraftKeysValues:
    """Keys and values of a draft layer for one sequence: `length` entries are valid.

    Attributes:
        keys, values: ``[1, kv_heads, capacity, head_dim]``.
    """

    def __init__(self, kv_heads: int, head_dim: int, like: Tensor) -> None:
        self._like = like
        self.keys = self._buffer(kv_heads, _ROOM, head_dim)
        self.values = self._buffer(kv_heads, _ROOM, head_dim)
        self.addresses: KeysValues | None = None
        self.length = 0

    @property
    def capacity(self) -> int:
        """Entries that there is room for."""
        return self.keys.shape[2]

    def reserve(self, entries: int) -> None:
        """Makes room for this many entries."""
        if entries <= self.capacity:
            return
        _, heads, _, dim = self.keys.shape
        wanted = max(entries, 2 * self.capacity)
        for name in ("keys", "values"):
            old, new = getattr(self, name), self._buffer(heads, wanted, dim)
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)
        self.addresses = None

    def crop(self, length: int) -> None:
        """Drops the entries at `length` and after."""
        if length < 0:
            raise DeliberateError(f"cannot crop a draft layer's cache to {length}: 0 or more")
        self.length = min(self.length, length)

    def _buffer(self, heads: int, capacity: int, dim: int) -> Tensor:
        # An ordinary tensor also under inference mode: it outlives the pass.
        with torch.inference_mode(False):
            return torch.zeros(
                (1, heads, capacity, dim), dtype=self._like.dtype, device=self._like.device
            )


class DraftExecutor:
    """One draft layer on one model, for inference; threads may share it.

    Args:
        layer: the trained layer; it is read once, here.
        backbone: the model's embedding, final norm and head.
        storage: of the matrices under the C++ kernels.

    Attributes:
        native: the C++ kernels run it.

    Raises:
        DeliberateError: the layer is of a model with another width or a smaller vocabulary.
    """

    def __init__(
        self, layer: DraftLayer, backbone: Backbone, storage: Storage = Storage.INT8
    ) -> None:
        check_fits(layer, backbone)
        config, ids = layer.config, layer.vocabulary
        like = backbone.embed_tokens(torch.zeros(1, dtype=torch.int64, device=backbone.device))
        self._backbone = backbone
        self._like = like
        self._config = config
        with torch.inference_mode(False), torch.no_grad():
            self._layer = DraftLayer(config).to(device=like.device, dtype=like.dtype)
            self._layer.load_state_dict(layer.state_dict())
            self._layer.requires_grad_(False)
            self._ids: list[int] = ids.tolist()
            self._rows = ids.to(like.device)
            self._bias = getattr(backbone.lm_head, "bias", None)
            self.native = unavailable(like) is None and self._plain_head()
            self._tables = self._layer.rotary(torch.arange(_ROOM, device=like.device))
            if self.native:
                self._take_native(storage)
            else:
                self._head = self._head_rows()

    @property
    def vocabulary(self) -> int:
        """Tokens that it can draft."""
        return len(self._ids)

    @property
    def dtype(self) -> torch.dtype:
        """Of states."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._like.device

    def new_cache(self) -> DraftKeysValues:
        """No entries yet."""
        return DraftKeysValues(self._config.kv_heads, self._config.head_dim, self._like)

    @torch.inference_mode()
    def extend(self, cache: DraftKeysValues, states: Tensor, tokens: Sequence[int]) -> Tensor:
        """Appends entries; their outputs ``[n, d]``, which take the place of states for drafts.

        Args:
            states: ``[n, d]``, after the last layer, or outputs of this layer.
            tokens: after each state's position.
        """
        layer, start, count = self._layer, cache.length, len(tokens)
        cache.reserve(start + count)
        self._reserve_tables(start + count)
        ids = torch.tensor(list(tokens), device=self._like.device)
        embedded = self._backbone.embed_tokens(ids)
        normed = self._backbone.norm(states)
        cos, sin = (table[start : start + count] for table in self._tables)
        if self.native:
            embedded = rms_norm(embedded, layer.embedding_norm, self._config.eps)
            hidden = self._joining.logits(torch.cat([embedded, normed], dim=-1))
            if cache.addresses is None:
                cache.addresses = KeysValues([(cache.keys, cache.values)])
            spans = [Span(0, start, count)]
            threads = torch.get_num_threads()
            self._layers.run(0, 1, cache.addresses, hidden, (cos, sin), spans, count, threads)
            cache.length += count
            return hidden
        joined = layer.join(embedded[None], normed[None])
        places = torch.arange(start, start + count, device=joined.device)
        keys, values = layer.keys_values(joined, places)
        cache.keys[:, :, start : start + count] = keys
        cache.values[:, :, start : start + count] = values
        cache.length += count
        every = torch.arange(cache.length, device=joined.device)
        later = every[None, :] > places[:, None]
        attended = layer.attend(
            layer.queries(joined, places),
            cache.keys[:, :, : cache.length],
            cache.values[:, :, : cache.length],
            later,
        )
        return layer.after_attention(joined, attended)[0]

    @torch.inference_mode()
    def read(self, output: Tensor) -> tuple[int, float]:
        """The most likely token of the draft vocabulary after an output ``[1, d]``, and its
        probability within that vocabulary."""
        normed = self._backbone.norm(output)
        if self.native:
            _, places, scores = self._native_head.read(normed, MAX_PROB)
            return self._ids[places[0]], scores[0]
        logits = self._backbone.softcap(F.linear(normed, self._head, self._head_bias()))[0]
        best = logits.float().softmax(dim=-1).max(dim=-1)
        return self._ids[int(best.indices)], float(best.values)

    def _reserve_tables(self, entries: int) -> None:
        if len(self._tables[0]) < entries:
            with torch.inference_mode(False):
                places = torch.arange(2 * entries, device=self._like.device)
                self._tables = self._layer.rotary(places)

    def _head_rows(self) -> Tensor:
        head: Any = self._backbone.lm_head
        if isinstance(head, BlockLinear):
            return head.blocks.widen(self._ids)
        rows: Tensor = head.weight.detach()[self._rows]
        return rows.to(self._like.dtype).contiguous()

    def _head_bias(self) -> Tensor | None:
        return None if self._bias is None else self._bias.detach()[self._rows]

    def _plain_head(self) -> bool:
        """Whether the C++ kernels read the head as it is: no cap on its logits."""
        probe = torch.full((1,), 100.0)
        return bool(self._backbone.softcap(probe).equal(probe))

    def _take_native(self, storage: Storage) -> None:
        layer, config = self._layer, self._config

        def matrix(weight: Tensor) -> Stored:
            return store(weight.detach(), storage)

        def weight(one: Tensor) -> Weight | BlockWeight:
            return weight_of(matrix(one))

        self._joining = NativeHead(None, config.eps, matrix(layer.joining))
        self._native_head = NativeHead(
            None, config.eps, matrix(self._head_rows()), bias=self._head_bias()
        )
        self._layers = Layers(
            [
                LayerTensors(
                    qkv=weight(layer.qkv),
                    out=weight(layer.out),
                    gate_up=weight(layer.gate_up),
                    down=weight(layer.down),
                    attention_norm=layer.attention_norm.detach(),
                    query_norm=None,
                    key_norm=None,
                    mlp_norm=layer.mlp_norm.detach(),
                    heads=config.heads,
                    kv_heads=config.kv_heads,
                    head_dim=config.head_dim,
                    window=0,
                    scaling=config.head_dim**-0.5,
                    eps=config.eps,
                    head_eps=config.eps,
                )
            ]
        )


def check_fits(layer: DraftLayer, backbone: Backbone) -> None:
    """Raises `DeliberateError` where a layer is of a model of another width or fewer tokens."""
    width, last = layer.config.hidden_size, int(layer.vocabulary.max())
    if width != backbone.hidden_size or last >= backbone.vocab_size:
        raise DeliberateError(
            f"the draft layer is for states of width {width} and tokens up to {last}; the model "
            f"has width {backbone.hidden_size} and {backbone.vocab_size} tokens"
        )
