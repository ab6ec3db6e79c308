"""The fused executor's layers and heads by the C++ kernels: one call for a run of layers.

What a compiled graph costs beside its arithmetic (guards, one call per run of layers, a library's
product that packs its operands for 2 to 16 rows) is most of a small model's token; here a pass is
one call, and the weights stay where they are. The result of a token does not depend on how many
tokens ride in its pass: sums are taken in one order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deliberate.config import Measure
from deliberate.contexts import ContextBuilder, StepContext
from deliberate.fused.cache import StaticCache
from deliberate.fused.weights import LayerShape, LayerWeights
from deliberate.kernels import native, native_build
from deliberate.quantise import Matrix

# Where the kernel puts what a measure is.
STATISTICS = {Measure.MAX_PROB: 0, Measure.MARGIN: 1, Measure.ENTROPY: 2}
# Inputs of one product, tokens times width: as long as they stay in the second-level cache the
# kernel is as fast as the library, beyond it is not. A pass of few tokens is always the kernel's.
MOST_INPUTS = 1 << 17
FEW_TOKENS = 32


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
        arguments = [_layer(one, shape) for one, shape in zip(weights, shapes, strict=True)]
        self.layers = native.Layers(arguments, weights)
        widest = max(one.down.weight.shape[1] for one in weights)
        #: Tokens of one pass at most.
        self.most_tokens = max(FEW_TOKENS, MOST_INPUTS // widest)

    def run(
        self, hidden: Tensor, first: int, last: int, ctx: StepContext, cache: StaticCache
    ) -> Tensor:
        """As `Backbone.run_layers`, for ``[R, q, d]`` with R * q at most `most_tokens`.

        The cache has room for the pass; its lengths are the caller's to advance.
        """
        states = hidden.clone(memory_format=torch.contiguous_format)
        rows, q, _ = hidden.shape
        cos, sin = ctx.position_embeddings
        if ctx.ragged:
            where = native.spans(ctx.row_ids, ctx.starts, ctx.counts, q)
            rotary = cos.contiguous(), sin.contiguous()
        else:
            where = native.spans(range(rows), (ctx.start,) * rows, (q,) * rows, q)
            # One row of positions for all.
            rotary = (cos, sin) if rows == 1 else (_each(cos, rows), _each(sin, rows))
        self.layers.run(
            first, last, cache.addresses(), states, rotary, where, torch.get_num_threads()
        )
        return states


class NativeHead:
    """A head by the C++ kernels.

    Args:
        gain, eps: of the final norm.
        head: ``[V, d]``.
        factors: of a translator x -> x + ... F2 F1 x.
    """

    def __init__(
        self, gain: Tensor, eps: float, head: Matrix, factors: Sequence[Tensor] = ()
    ) -> None:
        plain = [factor.contiguous() for factor in factors]
        made = [native.matrix(factor) for factor in plain]
        self.head = native.Head(gain, eps, _matrix(head, None), made, (head, plain))

    def logits(self, states: Tensor) -> Tensor:
        """``[R, d]`` -> ``[R, V]``."""
        return self.head.logits(states.contiguous(), torch.get_num_threads())

    def read(self, states: Tensor, measure: Measure) -> tuple[Tensor, list[int], list[float]]:
        """Logits ``[R, V]``, tokens and scores of up to `native.MOST_ROWS` states ``[R, d]``."""
        rows = len(states)
        logits = self.head.logits(states.contiguous(), torch.get_num_threads(), stats=True)
        return logits, self.head.tokens(rows), self.head.statistic(STATISTICS[measure], rows)


class NativeAhead:
    """Greedy decoding of one sequence, several tokens in one call.

    Between two calls of the layers a decode loop in Python spends 50 us and more on a token. Where
    nothing but the exit's own answer decides the next step, the steps need not come back to it.

    Args:
        layers, top: of the model.
        heads: of the exits, by index.
        measure: what the exits are asked for.
        embedding: ``[V, d]``.
        contexts: for the rotary tables.
    """

    def __init__(
        self,
        layers: NativeLayers,
        top: NativeHead,
        heads: Mapping[int, NativeHead],
        measure: Measure,
        embedding: Tensor,
        contexts: ContextBuilder,
    ) -> None:
        self._layers = layers
        self._top = top
        self._heads = heads
        self._measure = measure
        self._embedding = embedding
        self._contexts = contexts

    @property
    def possible(self) -> bool:
        """Whether positions have tables, and the embedding is one that the kernel reads."""
        plain = self._embedding.dtype == torch.float32 and self._embedding.is_contiguous()
        return plain and self._contexts.rotary_tables(1, self._embedding.device) is not None

    def asks(self, exit_index: int) -> bool:
        """Whether this exit can be asked."""
        return exit_index in self._heads

    def decode(
        self,
        exit_index: int | None,
        last: int,
        token: int,
        start: int,
        cache: StaticCache,
        *,
        steps: int,
        asked: int,
        threshold: float,
        stops: Collection[int],
        stops_stand: bool,
    ) -> native.Decoded:
        """Decodes through layers 0..last-1, which hold `start` tokens each; see `Layers.decode`.

        Args:
            exit_index: which exit is asked; None for the top, whose score is its probability.
        """
        head = self._top if exit_index is None else self._heads[exit_index]
        measure = Measure.MAX_PROB if exit_index is None else self._measure
        tables = self._contexts.rotary_tables(start + steps, self._embedding.device)
        assert tables is not None
        cache.reserve(start + steps)
        decoded = self._layers.layers.decode(
            last,
            cache.addresses(),
            self._embedding,
            token,
            start,
            tables,
            head.head,
            steps=steps,
            asked=asked,
            statistic=STATISTICS[measure],
            threshold=threshold,
            stops=tuple(stops),
            stops_stand=stops_stand,
            threads=torch.get_num_threads(),
        )
        cache.extend(last, len(decoded.states))
        return decoded


def _each(table: Tensor, rows: int) -> Tensor:
    return table.expand(rows, -1, -1).contiguous()


def _matrix(matrix: Matrix, bias: Tensor | None) -> Any:
    return native.matrix(matrix.weight, matrix.scale, bias)


def _layer(weights: LayerWeights, shape: LayerShape) -> Any:
    return native.LayerArgument(
        _matrix(weights.qkv, weights.qkv_bias),
        _matrix(weights.out, weights.out_bias),
        _matrix(weights.gate_up, weights.gate_up_bias),
        _matrix(weights.down, weights.down_bias),
        native.address(weights.attention_norm),
        native.address(weights.query_norm),
        native.address(weights.key_norm),
        native.address(weights.mlp_norm),
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.window or 0,
        shape.scaling,
        shape.eps,
        shape.head_eps,
    )
