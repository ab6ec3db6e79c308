"""Runs a draft layer while decoding: by the C++ kernels where they can, by graphs on CUDA, else by
torch.

Its weights are read once a draft, so on a CPU they are kept in int8: a draft that rounding changed
is still verified by the full-depth model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deliberate.executors.draft_cache import DraftKeysValues, DraftRows
from deliberate.executors.fused.cuda.draft_passes import CudaDraftPasses
from deliberate.executors.fused.native import NativeHead, unavailable
from deliberate.executors.fused.native_weights import weight_of
from deliberate.executors.fused.weights import hooked, is_rms_norm
from deliberate.executors.quantization import Storage, Stored, joined_rows, store
from deliberate.kernels.blocks import BlockWeight
from deliberate.kernels.draft_rules import ChainRule
from deliberate.kernels.native import Layers
from deliberate.kernels.native_draft_layer import DraftLayerCall
from deliberate.kernels.native_drafted import LayerPart
from deliberate.kernels.native_inputs import LayerTensors, Span, Weight
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.block_modules import BlockEmbedding, BlockLinear
from deliberate.modeling.draft_layer import DraftLayer, rms_norm
from deliberate.modeling.measures import MAX_PROB
from deliberate.utils.errors import DeliberateError

# Positions that rotary tables are made for at first.
_ROOM = 512


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
            self._ids: list[int] = ids.tolist()
            self._rows = ids.to(like.device)
            self._bias = getattr(backbone.lm_head, "bias", None)
            plain = self._plain_head()
            by_ops = getattr(backbone, "by_ops", False) and plain and self._bias is None
            self.native = unavailable(like) is None and plain and not by_ops
            self._layer = self._norms_of(layer) if self.native else self._copy_of(layer)
            self._tables = self._layer.rotary(torch.arange(_ROOM, device=like.device))
            self._graphs: CudaDraftPasses | None = None
            self._call: DraftLayerCall | None = None
            if self.native:
                self._take_native(layer, storage)
            else:
                self._head = self._head_rows()
            if by_ops:
                self._graphs = CudaDraftPasses(self._layer, backbone, self._head)

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

    def new_rows(self) -> DraftRows:
        """Keys and values of sequences that share calls; none yet."""
        return DraftRows(self._config.kv_heads, self._config.head_dim, self._like)

    def new_cache(self) -> DraftKeysValues:
        """Of a sequence that is by itself; no entries yet."""
        return self.new_rows().open()

    def extend(self, cache: DraftKeysValues, states: Tensor, tokens: Sequence[int]) -> Tensor:
        """Appends entries of one sequence; their outputs ``[n, d]``.

        Args:
            states: ``[n, d]``, after the last layer, or outputs of this layer.
            tokens: after each state's position.
        """
        return self.extend_rows([cache], states, [tokens])

    @torch.inference_mode()
    def extend_rows(
        self,
        caches: Sequence[DraftKeysValues],
        states: Tensor,
        tokens: Sequence[Sequence[int]],
    ) -> Tensor:
        """Appends entries of several sequences in one call.

        Args:
            caches: rows of one `DraftRows`.
            states: ``[n, d]``, those of each sequence after those of the one before.
            tokens: of each sequence, after each state's position.

        Returns:
            Outputs ``[n, d]``, which take the place of states for drafts.
        """
        counts = [len(own) for own in tokens]
        starts = [cache.length for cache in caches]
        end = max(start + count for start, count in zip(starts, counts, strict=True))
        rows = caches[0].rows
        rows.reserve(end)
        indexes = [cache.index for cache in caches]
        if self._graphs is not None and self._graphs.takes(counts):
            outputs = self._graphs.extend(rows, indexes, starts, counts, tokens, states)
        else:
            outputs = self._extend(rows, indexes, starts, counts, tokens, states)
        for cache, count in zip(caches, counts, strict=True):
            cache.length += count
        return outputs

    def part(
        self,
        cache: DraftKeysValues,
        states: Tensor,
        tokens: Sequence[int],
        rule: ChainRule,
        room: int,
    ) -> LayerPart | None:
        """What drafts inside a call of the C++ kernels that decodes; None where they cannot.

        Args:
            states, tokens: as for `extend`; they have no entries yet.
            rule: how far to draft.
            room: entries beyond those.
        """
        call = self._call
        if call is None or max(tokens) >= call.tokens:
            return None
        end = cache.length + len(tokens) + room
        cache.rows.reserve(end)
        self._reserve_tables(end)
        kv, head = cache.rows.addresses(), self._native_head.head
        tables, states = self._tables, states.contiguous()
        return LayerPart(call, kv, head, tables, cache.index, cache.length, states, rule)

    def _extend(
        self,
        rows: DraftRows,
        indexes: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        tokens: Sequence[Sequence[int]],
        states: Tensor,
    ) -> Tensor:
        self._reserve_tables(max(start + n for start, n in zip(starts, counts, strict=True)))
        call = self._call
        if call is not None:
            flat = [token for own in tokens for token in own]
            if max(flat) < call.tokens:  # an image's ids lie beyond the embedding
                return call.extend(
                    rows.addresses(),
                    states.contiguous(),
                    flat,
                    self._rotary(starts, counts),
                    [Span(*one) for one in zip(indexes, starts, counts, strict=True)],
                    torch.get_num_threads(),
                )
        ids = torch.tensor([token for own in tokens for token in own], device=self._like.device)
        embedded, normed = self._backbone.embed_tokens(ids), self._backbone.norm(states)
        run = self._extend_native if self.native else self._extend_by_torch
        return run(rows, indexes, starts, counts, embedded, normed)

    def _extend_native(
        self,
        rows: DraftRows,
        indexes: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        embedded: Tensor,
        normed: Tensor,
    ) -> Tensor:
        embedded = rms_norm(embedded, self._layer.embedding_norm, self._config.eps)
        hidden = self._joining.logits(torch.cat([embedded, normed], dim=-1))
        cos, sin = self._rotary(starts, counts)
        spans = [Span(*one) for one in zip(indexes, starts, counts, strict=True)]
        threads = torch.get_num_threads()
        self._layers.run(0, 1, rows.addresses(), hidden, (cos, sin), spans, 0, threads)
        return hidden

    def _extend_by_torch(
        self,
        rows: DraftRows,
        indexes: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        embedded: Tensor,
        normed: Tensor,
    ) -> Tensor:
        layer, device = self._layer, embedded.device
        joined = layer.join(embedded, normed)
        padded = torch.nn.utils.rnn.pad_sequence(list(joined.split(list(counts))), True)
        end = max(start + count for start, count in zip(starts, counts, strict=True))
        places = torch.tensor(starts, device=device)[:, None]
        places = places + torch.arange(max(counts), device=device)
        keys, values = layer.keys_values(padded, places)
        for at, (row, start, count) in enumerate(zip(indexes, starts, counts, strict=True)):
            rows.keys[row, :, start : start + count] = keys[at, :, :count]
            rows.values[row, :, start : start + count] = values[at, :, :count]
        later = torch.arange(end, device=device) > places[..., None]
        which = torch.tensor(indexes, device=device)
        attended = layer.attend(
            layer.queries(padded, places),
            rows.keys[which, :, :end],
            rows.values[which, :, :end],
            later[:, None],
        )
        outputs = layer.after_attention(padded, attended)
        return torch.cat([own[:count] for own, count in zip(outputs, counts, strict=True)])

    def _rotary(self, starts: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions, one after another."""
        parts = [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]
        if len(parts) == 1:
            return self._tables[0][parts[0]], self._tables[1][parts[0]]
        cos, sin = (torch.cat([table[part] for part in parts]) for table in self._tables)
        return cos, sin

    def read(self, output: Tensor) -> tuple[int, float]:
        """As `read_rows`, of an output ``[1, d]``."""
        return self.read_rows(output)[0]

    @torch.inference_mode()
    def read_rows(self, outputs: Tensor) -> list[tuple[int, float]]:
        """The most likely token of the draft vocabulary after each output ``[R, d]``, and its
        probability within that vocabulary."""
        if self._graphs is not None:
            read = zip(*self._graphs.read(outputs), strict=True)
            return [(self._ids[at], score) for at, score in read]
        if self.native:
            normed = outputs if self._call is not None else self._backbone.norm(outputs)
            _, tokens, scores = self._native_head.read(normed, MAX_PROB)
            return list(zip(tokens, scores, strict=True))
        normed = self._backbone.norm(outputs)
        logits = self._backbone.softcap(F.linear(normed, self._head, self._head_bias()))
        best = logits.float().softmax(dim=-1).max(dim=-1)
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [(self._ids[at], score) for at, score in found]

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

    def _copy_of(self, layer: DraftLayer) -> DraftLayer:
        made = DraftLayer(self._config).to(device=self._like.device, dtype=self._like.dtype)
        made.load_state_dict(layer.state_dict())
        return made.requires_grad_(False)

    def _norms_of(self, layer: DraftLayer) -> DraftLayer:
        """A layer without matrices, which the C++ kernels hold in a form of their own."""
        with torch.device("meta"):
            made = DraftLayer(self._config)
        for name in ("embedding_norm", "attention_norm", "mlp_norm"):
            gain = getattr(layer, name).detach().to(self._like.dtype, copy=True)
            setattr(made, name, nn.Parameter(gain, requires_grad=False))
        return made

    def _take_native(self, trained: DraftLayer, storage: Storage) -> None:
        layer, config = self._layer, self._config

        def matrix(weight: Tensor) -> Stored:
            return store(weight.detach().to(self._like), storage, panels=True)

        def weight(one: Tensor) -> Weight | BlockWeight:
            return weight_of(matrix(one))

        joining = matrix(trained.joining)
        self._joining = NativeHead(None, config.eps, joining)
        self._layers = Layers(
            [
                LayerTensors(
                    qkv=weight_of(joined_rows(matrix, trained.qkv, config.heads * config.head_dim)),
                    out=weight(trained.out),
                    gate_up=weight(trained.gate_up),
                    down=weight(trained.down),
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
        norm: Any = self._backbone.norm
        embedding, gain = self._plain_embedding(), None
        if embedding is not None and is_rms_norm(norm) and not hooked(norm):
            gain = norm.weight.detach()
            self._call = DraftLayerCall(
                self._layers,
                embedding,
                weight_of(joining),
                (layer.embedding_norm.detach(), config.eps),
                (gain, norm.variance_epsilon),
            )
        self._native_head = NativeHead(
            gain,
            config.eps if gain is None else norm.variance_epsilon,
            matrix(self._head_rows()),
            bias=self._head_bias(),
            ids=self._rows,
        )

    def _plain_embedding(self) -> Weight | BlockWeight | None:
        """The model's embedding, where the C++ kernels read it and nothing is done to its rows."""
        module: Any = self._backbone.model.get_input_embeddings()
        if type(module) is BlockEmbedding and not hooked(module):
            return module.blocks
        if type(module) is not nn.Embedding or hooked(module):
            return None
        rows = module.weight.detach()
        plain = rows.dtype == torch.float32 and rows.is_contiguous()
        ids = torch.tensor([0, 1])
        return Weight(rows) if plain and self._backbone.embed_tokens(ids).equal(rows[:2]) else None


def check_fits(layer: DraftLayer, backbone: Backbone) -> None:
    """Raises `DeliberateError` where a layer is of a model of another width or fewer tokens."""
    width, last = layer.config.hidden_size, int(layer.vocabulary.max())
    if width != backbone.hidden_size or last >= backbone.vocab_size:
        raise DeliberateError(
            f"the draft layer is for states of width {width} and tokens up to {last}; the model "
            f"has width {backbone.hidden_size} and {backbone.vocab_size} tokens"
        )
