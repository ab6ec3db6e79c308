"""A run of Llama-family layers through the kernel registry's ops, for a few tokens at a time.

Which implementation of an op runs is the registry's choice: Triton kernels on CUDA, torch elsewhere
or where an override says so. Nothing here looks at a value, so that all of it may be captured in a
graph: who takes part is a list of rows with its count, both on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from deliberate.executors.fused.weights import LayerShape, LayerWeights
from deliberate.executors.quantization import Matrix, Stored, widened
from deliberate.kernels.ops.add_rmsnorm import add_rmsnorm
from deliberate.kernels.ops.decode_attention import decode_attention
from deliberate.kernels.ops.int8_linear import int8_linear
from deliberate.kernels.ops.kv_fill import fold_kv_weights, kv_fill
from deliberate.kernels.ops.rope_write import rope_write
from deliberate.kernels.ops.skip_mlp import skip_mlp


@dataclass(frozen=True, slots=True)
class Listed:
    """Who takes part in a pass, all on the device; T = rows of the cache times `tokens`.

    Attributes:
        positions: int32 ``[T]``: position of each token, and slot of the cache.
        lengths: int32 ``[T]``: positions + 1, what each token sees of its row.
        rows: int32 ``[T]``: the tokens that take part, first ``count`` entries.
        count: int32 ``[1]``.
        tokens: of each row of the cache.
    """

    positions: Tensor
    lengths: Tensor
    rows: Tensor
    count: Tensor
    tokens: int


def run_listed(
    residual: Tensor,
    weights: Sequence[LayerWeights],
    keys: Sequence[Tensor] | Tensor,
    values: Sequence[Tensor] | Tensor,
    shapes: Sequence[LayerShape],
    cos: Tensor,
    sin: Tensor,
    listed: Listed,
    tables: Sequence[Tensor | None] | None = None,
) -> None:
    """Runs consecutive layers on ``residual [T, d]`` in place and writes their keys and values.

    Args:
        residual: contiguous; rows that are not listed hold anything afterwards.
        weights, shapes: one per layer.
        keys, values: of each layer ``[B, kv_heads, capacity, D]``, or, where it has a table,
            ``[blocks, kv_heads, block size, D]``.
        tables: of each layer: the blocks of every row, int32 ``[B, M]``, or None.
        cos, sin: rotary tables by position, ``[capacity, D]``.
    """
    heads, head_dim = shapes[0].heads, shapes[0].head_dim
    normed = torch.empty_like(residual)
    query = residual.new_empty((len(residual), heads, head_dim))
    mixed = torch.empty_like(query)
    rows, count = listed.rows, listed.count
    addition: Tensor | None = None
    for index, (layer, shape) in enumerate(zip(weights, shapes, strict=True)):
        table = None if tables is None else tables[index]
        add_rmsnorm(residual, addition, layer.attention_norm, shape.eps, normed, rows, count)
        rope_write(
            linear(normed, layer.qkv),
            layer.qkv_bias,
            layer.query_norm,
            layer.key_norm,
            cos,
            sin,
            listed.positions,
            keys[index],
            values[index],
            query,
            shape.head_eps,
            rows,
            count,
            listed.tokens,
            table,
        )
        decode_attention(
            query,
            keys[index],
            values[index],
            listed.lengths,
            shape.scaling,
            mixed,
            shape.window or 0,
            rows,
            count,
            listed.tokens,
            table,
        )
        addition = linear(mixed.flatten(1), layer.out, layer.out_bias)
        add_rmsnorm(residual, addition, layer.mlp_norm, shape.eps, normed, rows, count)
        if _skips(layer, residual):
            gate_up, down = layer.gate_up, layer.down
            # Blocks are read by the C++ kernels alone.
            assert isinstance(gate_up, Matrix) and isinstance(down, Matrix)
            skip_mlp(residual, normed, gate_up.weight, down.weight, rows, count)
            addition = None
        else:
            gate, up = linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
            addition = linear(F.silu(gate) * up, layer.down, layer.down_bias)
    if addition is not None:
        residual.add_(addition)


def linear(x: Tensor, matrix: Stored, bias: Tensor | None = None) -> Tensor:
    """``x [T, K]`` times the transpose of a stored weight, plus a bias: ``[T, N]``."""
    assert isinstance(matrix, Matrix)  # blocks are read by the C++ kernels alone
    if matrix.scale is not None:
        return int8_linear(x, matrix.weight, matrix.scale, bias)
    return F.linear(x, matrix.weight.to(x.dtype), bias)


def _skips(layer: LayerWeights, x: Tensor) -> bool:
    """Whether `skip_mlp` can serve: it takes no bias, and weights in the dtype of the states."""
    plain = layer.gate_up_bias is None and layer.down_bias is None
    matrices = [one for one in (layer.gate_up, layer.down) if isinstance(one, Matrix)]
    return plain and {one.weight.dtype for one in matrices} == {x.dtype}


@dataclass(frozen=True, slots=True, eq=False)
class FillWeights:
    """What `kv_fill` reads of all layers from ``start`` on, n of them.

    ``weight`` ``[n, 2, kv, D, d]``, ``bias`` ``[n, 2, kv, D]`` or None, ``key_gain`` ``[n, D]`` or
    None.
    """

    start: int
    weight: Tensor
    bias: Tensor | None
    key_gain: Tensor | None

    @staticmethod
    def of(
        weights: Sequence[LayerWeights],
        shapes: Sequence[LayerShape],
        start: int,
        dtype: torch.dtype,
    ) -> FillWeights:
        """Folds the norms of layers start.. into copies of their key and value projections."""
        chosen, shape = weights[start:], shapes[start]
        first = shape.heads * shape.head_dim
        half = shape.kv_heads * shape.head_dim
        keys, values, biases = [], [], []
        for layer in chosen:
            whole = widened(layer.qkv, dtype)
            keys.append(whole[first : first + half])
            values.append(whole[first + half :])
            if layer.qkv_bias is not None:
                biases.append(layer.qkv_bias[first:].view(2, shape.kv_heads, shape.head_dim))
        gains = [layer.key_norm for layer in chosen if layer.key_norm is not None]
        return FillWeights(
            start,
            fold_kv_weights(
                keys, values, [layer.attention_norm for layer in chosen], shape.head_dim
            ),
            torch.stack(biases).contiguous() if biases else None,
            torch.stack(gains).contiguous() if gains else None,
        )


def fill_listed(
    hidden: Tensor,
    weights: FillWeights,
    first: int,
    last: int,
    keys: Tensor,
    values: Tensor,
    shape: LayerShape,
    cos: Tensor,
    sin: Tensor,
    listed: Listed,
) -> None:
    """Gives layers first..last-1 keys and values of the listed ``hidden [B, d]``: one launch.

    Args:
        keys, values: of these layers, ``[last - first, B, kv_heads, capacity, D]``.
    """
    part = slice(first - weights.start, last - weights.start)
    kv_fill(
        hidden,
        weights.weight[part],
        None if weights.bias is None else weights.bias[part],
        None if weights.key_gain is None else weights.key_gain[part],
        cos,
        sin,
        listed.positions,
        keys,
        values,
        shape.eps,
        shape.head_eps,
        listed.rows,
        listed.count,
    )
