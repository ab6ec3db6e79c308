"""Stored weights of the fused executor as the C++ kernels take them."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from deliberate.executors.fused.weights import LayerShape, LayerWeights
from deliberate.executors.quantization import Stored
from deliberate.kernels.blocks import BlockWeight
from deliberate.kernels.native_inputs import LayerTensors, Weight


def weight_of(matrix: Stored, bias: Tensor | None = None) -> Weight | BlockWeight:
    """A stored matrix and its bias as the kernels take them."""
    if isinstance(matrix, BlockWeight):
        return dataclasses.replace(matrix, bias=bias)
    return Weight(matrix.weight, bias)


def layer_of(weights: LayerWeights, shape: LayerShape) -> LayerTensors:
    """A layer's weights as the kernels take them."""
    return LayerTensors(
        qkv=weight_of(weights.qkv, weights.qkv_bias),
        out=weight_of(weights.out, weights.out_bias),
        gate_up=weight_of(weights.gate_up, weights.gate_up_bias),
        down=weight_of(weights.down, weights.down_bias),
        attention_norm=weights.attention_norm,
        query_norm=weights.query_norm,
        key_norm=weights.key_norm,
        mlp_norm=weights.mlp_norm,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        window=shape.window or 0,
        scaling=shape.scaling,
        eps=shape.eps,
        head_eps=shape.head_eps,
    )
