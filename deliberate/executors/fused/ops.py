"""Arithmetic of a run of Llama-family layers over a static cache, as plain functions of tensors.

The same functions run eagerly and inside ``torch.compile``. Everything that changes from step to
step is a tensor (positions, rows, slots), because a changing Python number would be compiled in.
A token's key goes to the cache slot of its position; slots after it are masked, so one graph
serves every context length.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

import torch
from torch import Tensor
from torch.nn import functional as F

from deliberate.executors.fused.weights import LayerShape, LayerWeights
from deliberate.executors.quantization import Matrix, Rows, product


class Attention(Enum):
    """Ways to compute the same attention.

    KERNEL: torch's own fused one, for many queries or anywhere but in compiled code on a CPU.
    PRODUCTS: two matrix products, for a few queries, where the kernel's own overhead shows.
    SUMS: multiply and add, for one query: the compiler joins them with what is around.
    """

    KERNEL = auto()
    PRODUCTS = auto()
    SUMS = auto()


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, in float32 as transformers computes it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return gain * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``[R, q, heads, D]`` with cos and sin ``[1 or R, q, 1, D]``."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def run_block(
    hidden: Tensor,
    weights: Sequence[LayerWeights],
    kv: Sequence[tuple[Tensor, Tensor]],
    positions: Tensor,
    rotary: tuple[Tensor, Tensor],
    slots: Tensor,
    row_ids: Tensor | None,
    holes: Tensor | None,
    shapes: Sequence[LayerShape],
    rows: Rows | None,
) -> Tensor:
    """Runs consecutive layers and writes their keys and values.

    Args:
        hidden: ``[R, q, d]``.
        weights, shapes: one per layer.
        kv: of each layer its keys and values, ``[B, kv_heads, capacity, D]``; written in place.
        positions: int64 ``[1 or R, q]``.
        rotary: (cos, sin), each ``[1 or R, q, D]``.
        slots: ``0..T-1``, int64 ``[T]``: the slots that are looked at.
        row_ids: cache rows of the R rows, int64 ``[R]``, or None where R = B in order.
        holes: bool ``[R, T or more]``, True where a slot holds nothing, or None.
        rows: class of R * q; None takes it from the shape, which compiled code must not do.

    Returns:
        ``[R, q, d]``.
    """
    cos, sin = (part.unsqueeze(2) for part in rotary)
    attend: dict[int | None, Tensor] = {}
    form = Attention.KERNEL
    if hidden.device.type == "cpu" and torch.compiler.is_compiling():
        form = Attention.SUMS if rows is Rows.ONE else Attention.PRODUCTS
    for index, (layer, shape) in enumerate(zip(weights, shapes, strict=True)):
        normed = rms_norm(hidden, layer.attention_norm, shape.eps)
        joined = product(normed, layer.qkv, rows)
        if layer.qkv_bias is not None:
            joined = joined + layer.qkv_bias
        split = joined.unflatten(-1, (-1, shape.head_dim))
        query, key, value = split.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=2)
        if layer.query_norm is not None and layer.key_norm is not None:
            query = rms_norm(query, layer.query_norm, shape.head_eps)
            key = rms_norm(key, layer.key_norm, shape.head_eps)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        write(kv[index], key, value, positions, row_ids)
        if shape.window not in attend:
            attend[shape.window] = visible(positions, slots, shape.window, holes)
        mixed = attention(query, kv[index], attend[shape.window], row_ids, slots, shape, form=form)
        hidden = hidden + _biased(product(mixed, layer.out, rows), layer.out_bias)
        normed = rms_norm(hidden, layer.mlp_norm, shape.eps)
        gate_up = _biased(product(normed, layer.gate_up, rows), layer.gate_up_bias)
        gate, up = gate_up.chunk(2, dim=-1)
        down = product(F.silu(gate) * up, layer.down, rows)
        hidden = hidden + _biased(down, layer.down_bias)
    return hidden


def fill_block(
    hidden: Tensor,
    weights: Sequence[LayerWeights],
    kv: Sequence[tuple[Tensor, Tensor]],
    positions: Tensor,
    rotary: tuple[Tensor, Tensor],
    row_ids: Tensor | None,
    shapes: Sequence[LayerShape],
    rows: Rows | None,
) -> None:
    """Writes the keys and values that consecutive layers would make of one hidden state.

    Arguments as in `run_block`.
    """
    cos, sin = (part.unsqueeze(2) for part in rotary)
    for index, (layer, shape) in enumerate(zip(weights, shapes, strict=True)):
        start = shape.heads * shape.head_dim
        assert isinstance(layer.qkv, Matrix)  # blocks are read by the C++ kernels alone
        scale = layer.qkv.scale
        part = Matrix(layer.qkv.weight[start:], None if scale is None else scale[start:])
        bias = None if layer.qkv_bias is None else layer.qkv_bias[start:]
        normed = rms_norm(hidden, layer.attention_norm, shape.eps)
        joined = _biased(product(normed, part, rows), bias)
        key, value = joined.unflatten(-1, (-1, shape.head_dim)).chunk(2, dim=2)
        if layer.key_norm is not None:
            key = rms_norm(key, layer.key_norm, shape.head_eps)
        write(kv[index], rotate(key, cos, sin), value, positions, row_ids)


def visible(positions: Tensor, slots: Tensor, window: int | None, holes: Tensor | None) -> Tensor:
    """Which slots each token sees: bool ``[1 or R, 1, q, T]``."""
    at = positions[:, None, :, None]
    seen = slots <= at
    if window is not None:
        seen = seen & (slots > at - window)
    if holes is not None:
        seen = seen & ~holes[:, None, None, : slots.shape[0]]
    return seen


def write(
    kv: tuple[Tensor, Tensor],
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    row_ids: Tensor | None,
) -> None:
    """Puts ``[R, q, kv_heads, D]`` into a layer's buffers ``[B, kv_heads, capacity, D]``."""
    for buffer, new in zip(kv, (key, value), strict=True):
        if row_ids is None and positions.shape[0] == 1:
            buffer.index_copy_(2, positions[0], new.transpose(1, 2))
            continue
        rows = torch.arange(len(new), device=new.device) if row_ids is None else row_ids
        # [R, 1] and [R, q] around a slice: the indexed axes come first.
        buffer[rows[:, None], :, positions] = new


def attention(
    query: Tensor,
    kv: tuple[Tensor, Tensor],
    seen: Tensor,
    row_ids: Tensor | None,
    slots: Tensor,
    shape: LayerShape,
    *,
    form: Attention,
) -> Tensor:
    """Attention of ``[R, q, heads, D]`` over one layer's cache -> ``[R, q, heads * D]``.

    Args:
        seen: bool ``[1 or R, 1, q, T]``.
        form: how it is computed.
    """
    keys, values = (buffer[:, :, : slots.shape[0]] for buffer in kv)
    if row_ids is not None:
        keys, values = keys.index_select(0, row_ids), values.index_select(0, row_ids)
    groups = shape.heads // shape.kv_heads
    if form is Attention.SUMS:
        grouped = query.unflatten(2, (shape.kv_heads, groups)).squeeze(1).unsqueeze(3)
        scores = (grouped * keys.unsqueeze(2)).sum(-1) * shape.scaling  # [R, kv_heads, groups, T]
        shares = _shares(scores, seen).unsqueeze(-1)
        mixed = (shares * values.unsqueeze(2)).sum(-2)
        return mixed.flatten(1).unsqueeze(1)
    if form is Attention.PRODUCTS:
        # [R, q, kv_heads, groups, D] -> [R, kv_heads, groups * q, D]: one product a head of keys.
        grouped = query.unflatten(2, (shape.kv_heads, groups)).permute(0, 2, 3, 1, 4)
        scores = torch.matmul(grouped.flatten(2, 3), keys.transpose(2, 3)) * shape.scaling
        shares = _shares(scores.unflatten(2, (groups, -1)), seen.unsqueeze(2)).flatten(2, 3)
        mixed = torch.matmul(shares, values).unflatten(2, (groups, -1))
        return mixed.permute(0, 3, 1, 2, 4).flatten(2)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys,
        values,
        attn_mask=seen,
        scale=shape.scaling,
        enable_gqa=shape.heads != shape.kv_heads,
    )
    return out.transpose(1, 2).flatten(2)


def _shares(scores: Tensor, seen: Tensor) -> Tensor:
    """Softmax over the slots that are seen. The lowest number, not -inf: no row becomes NaN."""
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
