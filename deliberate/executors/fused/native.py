"""The fused executor's layers and heads by the C++ kernels: one call for a run of layers.

What a compiled graph costs beside its arithmetic (guards, one call per run of layers, a library's
product that packs its operands for 2 to 16 rows) is most of a small model's token; here a pass is
one call, and the weights stay where they are. The result of a token does not depend on how many
tokens are in its pass, of which sequences: every row is computed by the same instructions, whatever
is beside it and however long the pass is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deliberate.cache.attention_metadata import ContextBuilder, StepContext
from deliberate.executors.fused.native_blocks import NativeBlockCache
from deliberate.executors.fused.native_weights import layer_of, weight_of
from deliberate.executors.fused.static_cache import HOLES, StaticCache
from deliberate.executors.fused.weights import LayerShape, LayerWeights
from deliberate.executors.quantization import Stored
from deliberate.kernels import native, native_build
from deliberate.kernels.blocks import BlockWeight
from deliberate.kernels.draft_rules import ChainRule
from deliberate.kernels.native_drafted import DraftedDecoding, DraftedTokens, ModelPart
from deliberate.kernels.native_drafts import Decoded, DraftedRows, DraftRow
from deliberate.kernels.native_heads import Head
from deliberate.kernels.native_inputs import Span
from deliberate.kernels.native_sampling import Sampled, SampledRow, sample_rows
from deliberate.modeling.block_modules import BlockEmbedding
from deliberate.modeling.measures import MAX_PROB, Measure, require_known

NativeCache = StaticCache | NativeBlockCache
CPP_KERNELS = "the C++ kernels"  # in errors


def unavailable(like: Tensor) -> str | None:
    """Why weights of this dtype and device cannot be run by the C++ kernels, or None."""
    if like.device.type != "cpu" or like.dtype != torch.float32:
        return f"the C++ kernels take float32 on the CPU, not {like.dtype} on {like.device}"
    return native_build.unavailable()


class NativeLayers:
    """All layers of one model by the C++ kernels.

    Args:
        weights, shapes: one per layer.
    """

    def __init__(self, weights: Sequence[LayerWeights], shapes: Sequence[LayerShape]) -> None:
        self.layers = native.Layers(
            [layer_of(one, shape) for one, shape in zip(weights, shapes, strict=True)]
        )

    def run(
        self, hidden: Tensor, first: int, last: int, ctx: StepContext, cache: NativeCache
    ) -> Tensor:
        """As `Backbone.run_layers`.

        The cache has room for the pass; its lengths are the caller's to advance.
        """
        states = hidden.clone(memory_format=torch.contiguous_format)
        self._run(states, first, last, ctx, cache, write_only=False)
        return states

    def fill(
        self, hidden: Tensor, first: int, last: int, ctx: StepContext, cache: NativeCache
    ) -> None:
        """As `Backbone.fill_layers`, under the same conditions."""
        self._run(hidden.contiguous(), first, last, ctx, cache, write_only=True)

    def _run(
        self,
        states: Tensor,
        first: int,
        last: int,
        ctx: StepContext,
        cache: NativeCache,
        *,
        write_only: bool,
    ) -> None:
        rows, q, width = states.shape
        cos, sin = ctx.position_embeddings
        real = None
        pooled = isinstance(cache, NativeBlockCache)
        holes = ctx.masks[HOLES]
        if holes is not None:
            holes = holes.contiguous()
        if ctx.ragged:
            spans = [
                Span(
                    0 if pooled else row,
                    start,
                    count,
                    None if holes is None else holes[index],
                    cache.runs(row),
                )
                for index, (row, start, count) in enumerate(
                    zip(ctx.row_ids, ctx.starts, ctx.counts, strict=True)
                )
            ]
            rotary = cos.contiguous(), sin.contiguous()
            if min(ctx.counts) < q:
                # Padding would go through all layers as tokens do.
                real = _real(ctx.counts, q)
                rotary = _chosen(cos, real), _chosen(sin, real)
        else:
            assert holes is None  # they come with ragged contexts only
            if isinstance(cache, NativeBlockCache):
                open_rows = cache.tables.open_rows
                spans = [Span(0, ctx.start, q, None, cache.runs(row)) for row in open_rows]
            else:
                spans = [Span(row, ctx.start, q) for row in range(rows)]
            # One row of positions for all.
            rotary = (cos, sin) if rows == 1 else (_each(cos, rows), _each(sin, rows))
        tokens = states if real is None else _chosen(states, real)
        self.layers.run(
            first,
            last,
            cache.addresses(),
            tokens,
            rotary,
            spans,
            q if real is None else 0,
            torch.get_num_threads(),
            write_only=write_only,
        )
        if real is not None and not write_only:
            states.view(-1, width).index_copy_(0, real, tokens)


def _real(counts: Sequence[int], q: int) -> Tensor:
    """Of the tokens of a ragged pass ``[R, q]``, flattened, those that are no padding."""
    return torch.cat([torch.arange(i * q, i * q + count) for i, count in enumerate(counts)])


def _chosen(tokens: Tensor, real: Tensor) -> Tensor:
    """``[R, q, d]`` -> ``[n, d]``."""
    return tokens.flatten(0, 1).index_select(0, real)


class NativeHead:
    """A head by the C++ kernels.

    Args:
        gain, eps: of the final norm; a gain of None reads states that have been normed already.
        head: ``[V, d]``.
        factors: of a translator x -> x + ... F2 F1 x.
        bias: ``[V]``, or None.
        ids: int64 ``[V]``, the token of each row; None: row i is of token i.
    """

    def __init__(
        self,
        gain: Tensor | None,
        eps: float,
        head: Stored,
        factors: Sequence[Tensor] = (),
        bias: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> None:
        plain = [factor.contiguous() for factor in factors]
        self.head = Head(gain, eps, weight_of(head, bias), plain, ids)

    def logits(self, states: Tensor) -> Tensor:
        """``[R, d]`` -> ``[R, V]``."""
        return self.head.logits(states.contiguous(), torch.get_num_threads())

    def read(self, states: Tensor, measure: Measure) -> tuple[Tensor, list[int], list[float]]:
        """Logits ``[R, V]``, tokens and scores of states ``[R, d]``."""
        reading = self.head.read(states.contiguous(), torch.get_num_threads())
        return reading.logits, reading.tokens, reading.statistic(_statistic(measure))

    def every_statistic(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[R]`` and all statistics ``[R, 3]`` of states ``[R, d]``, in the order of
        `Measure.cpp_statistic`."""
        reading = self.head.read(states.contiguous(), torch.get_num_threads())
        columns = [torch.tensor(reading.statistic(which)) for which in range(3)]
        return torch.tensor(reading.tokens, dtype=torch.int64), torch.stack(columns, dim=1)


class NativeMultiStep:
    """Greedy decoding of one sequence, several tokens in one call.

    Between two calls of the layers a decode loop in Python spends 50 us and more on a token. Where
    nothing but the exit's own token decides the next step, several steps run in one call.

    Args:
        layers, top: of the model.
        heads: of the exits, by index.
        measure: the confidence that the exits compute.
        embedding: of tokens.
        contexts: for the rotary tables.
    """

    def __init__(
        self,
        layers: NativeLayers,
        top: NativeHead,
        heads: Mapping[int, NativeHead],
        measure: Measure,
        embedding: nn.Embedding | BlockEmbedding,
        contexts: ContextBuilder,
    ) -> None:
        self._layers = layers
        self._drafted = DraftedDecoding(layers.layers)
        self._top = top
        self._heads = heads
        self._measure = measure
        self._embedding: Any = (
            embedding.blocks if isinstance(embedding, BlockEmbedding) else embedding.weight.detach()
        )
        self._rows = embedding.num_embeddings
        self._contexts = contexts

    @property
    def possible(self) -> bool:
        """Whether positions have tables, and the embedding is one that the kernel reads: with a
        row for every token that a head may choose."""
        plain = isinstance(self._embedding, BlockWeight) or (
            self._embedding.dtype == torch.float32 and self._embedding.is_contiguous()
        )
        heads = (self._top, *self._heads.values())
        plain = plain and all(one.head.tokens_end <= self._rows for one in heads)
        return plain and self._contexts.rotary_tables(1, "cpu") is not None

    def can_evaluate(self, exit_index: int) -> bool:
        """Whether this exit can be evaluated."""
        return exit_index in self._heads

    def decode(
        self,
        exit_index: int | None,
        last: int,
        token: int,
        start: int,
        cache: NativeCache,
        *,
        steps: int,
        requested: int,
        threshold: float,
        stops: Collection[int],
        accept_stops: bool,
        row: int = 0,
    ) -> Decoded:
        """Decodes through layers 0..last-1, which hold `start` tokens each; see `Layers.decode`.

        Args:
            exit_index: which exit is evaluated; None for full depth, whose score is a probability.
            row: of the cache.
        """
        head = self._top if exit_index is None else self._heads[exit_index]
        measure = MAX_PROB if exit_index is None else self._measure
        tables = self._contexts.rotary_tables(start + steps, "cpu")
        assert tables is not None
        cache.reserve_steps(last, start, start + steps, row)
        decoded = self._layers.layers.decode(
            last,
            cache.addresses(),
            self._embedding,
            token,
            start,
            tables,
            head.head,
            steps=steps,
            requested=requested,
            statistic=_statistic(measure),
            threshold=threshold,
            stops=tuple(stops),
            accept_stops=accept_stops,
            threads=torch.get_num_threads(),
            row=0 if isinstance(cache, NativeBlockCache) else row,
            runs=cache.runs(row),
        )
        cache.extend(last, len(decoded.states), row)
        return decoded

    def decode_drafted(
        self,
        text: Sequence[int],
        cache: NativeCache,
        *,
        room: int,
        left: int,
        row: int = 0,
        **how: Any,
    ) -> DraftedTokens:
        """Decodes through all layers with drafts; see `DraftedDecoding.decode`.

        All layers hold all tokens of the text but the newest.

        Args:
            row: of the cache.
        """
        start, last = len(text) - 1, cache.num_layers
        tables = self._contexts.rotary_tables(start + room, "cpu")
        assert tables is not None
        cache.reserve_steps(last, start, start + min(room, left), row)
        made = self._drafted.decode(
            cache.addresses(),
            self._embedding,
            text,
            tables,
            self._top.head,
            room=room,
            left=left,
            threads=torch.get_num_threads(),
            row=0 if isinstance(cache, NativeBlockCache) else row,
            runs=cache.runs(row),
            **how,
        )
        cache.extend(last, len(made.tokens), row)
        return made

    def model_part(self, ranges: Sequence[tuple[int, int]], rule: ChainRule) -> ModelPart:
        """What drafts by these runs of layers in a call that decodes with drafts."""
        return ModelPart(self._layers.layers, tuple(ranges), self._top.head, rule)

    def draft_rows(
        self,
        exit_index: int,
        last: int,
        rows: Sequence[DraftRow],
        cache: NativeCache,
        *,
        enough: int,
        patience: int,
        waiting: bool,
    ) -> DraftedRows:
        """Drafts for several sequences, in rising rows; see `Layers.draft_rows`.

        Their layers 0..last-1 hold the tokens before each one's `start`.

        Args:
            exit_index: which exit is evaluated.
        """
        given, tables = self._reserved(rows, last, cache)
        made = self._layers.layers.draft_rows(
            last,
            cache.addresses(),
            self._embedding,
            given,
            tables,
            self._heads[exit_index].head,
            statistic=_statistic(self._measure),
            enough=enough,
            patience=patience,
            waiting=waiting,
            threads=torch.get_num_threads(),
        )
        for one, decoded in zip(rows, made.rows, strict=True):
            cache.extend(last, len(decoded.states), one.row)
        return made

    def sample_rows(self, rows: Sequence[SampledRow], cache: NativeCache) -> list[Sampled]:
        """Full-depth tokens of several sequences; see `deliberate.kernels.native_sampling`."""
        last, threads = cache.num_layers, torch.get_num_threads()
        given, tables = self._reserved(rows, last, cache)
        layers, head, kv = self._layers.layers, self._top.head, cache.addresses()
        made = sample_rows(layers, last, kv, self._embedding, given, tables, head, threads)
        for one, sampled in zip(rows, made, strict=True):
            cache.extend(last, sampled.passes, one.row)
        return made

    def _reserved(self, rows: Sequence[Any], last: int, cache: NativeCache) -> tuple[Any, Any]:
        """Takes room for the steps of rows: the rows as the kernels take them, rotary tables."""
        for one in rows:
            cache.reserve_steps(last, one.start, one.start + one.steps, one.row)
        if isinstance(cache, NativeBlockCache):
            rows = [dataclasses.replace(one, row=0, runs=cache.runs(one.row)) for one in rows]
        tables = self._contexts.rotary_tables(max(one.start + one.steps for one in rows), "cpu")
        assert tables is not None
        return list(rows), tables


def _statistic(measure: Measure) -> int:
    require_known(measure, CPP_KERNELS, lambda one: one.cpp_statistic is not None)
    assert measure.cpp_statistic is not None
    return measure.cpp_statistic


def _each(table: Tensor, rows: int) -> Tensor:
    return table.expand(rows, -1, -1).contiguous()
