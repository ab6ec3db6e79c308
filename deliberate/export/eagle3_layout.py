"""A draft layer in EAGLE-3's layout (Li et al., arXiv:2503.01840), with the same outputs.

As vLLM and its library `speculators` read that layout, the first layer attends over [normed
embedding; normed state], and its residual stream begins as the normed state. A draft layer of ours
joins both by a matrix before its only layer. Two layers of theirs hold one of ours: the attention
of the first sees its own position alone, by biases of queries and keys that rotary positions turn
apart, and adds what the joining matrix makes of both; its MLP is zero. The second layer is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deliberate.modeling.draft_layer import DraftLayer, rms_norm, rotate
from deliberate.utils.errors import DeliberateError

# By how many nats the first layer's attention prefers its own position to any other: the others'
# weights are below the precision of float32.
_PREFERRED = 40.0
# Least difference of a rotary frequency's cosines, mean over those that are used: below it the
# biases would be too large for bfloat16.
_LEAST = 0.01
# Tensors that are not of the layers.
_UNREAD = ("embed_tokens.weight", "lm_head.weight", "t2d", "d2t")
_CHUNK = 1 << 16  # positions that are looked at together


def own_position_bias(head_dim: int, rope_theta: float, positions: int) -> Tensor:
    """A query and key ``[head_dim]`` that attends to its own position alone.

    Between positions that lie n apart, the product of the rotated vectors is a sum of
    ``cos(n * frequency)``: largest for n = 0, and nowhere near it again if some of the highest
    frequencies are used.

    Args:
        positions: distances up to here are kept apart.

    Raises:
        DeliberateError: the frequencies do not keep them apart.
    """
    halves = torch.arange(0, head_dim, 2, dtype=torch.float64)
    frequencies = rope_theta ** (-halves / head_dim)
    least = torch.full_like(frequencies, math.inf)
    for start in range(1, positions, _CHUNK):
        apart = torch.arange(start, min(start + _CHUNK, positions), dtype=torch.float64)
        lost = (1 - torch.cos(apart[:, None] * frequencies)).cumsum(-1)
        least = torch.minimum(least, lost.amin(0))
    mean = least / torch.arange(1, len(frequencies) + 1)
    used = int(mean.argmax())
    if not mean[used] >= _LEAST:
        raise DeliberateError(
            f"rotary frequencies of heads of {head_dim} with rope_theta {rope_theta:g} do not keep "
            f"{positions} positions apart: this draft layer has no EAGLE-3 layout"
        )
    size = math.sqrt(_PREFERRED * math.sqrt(head_dim) / float(least[used]))
    made = torch.zeros(head_dim)
    made[: used + 1] = size
    return made


@torch.no_grad()
def eagle3_tensors(
    layer: DraftLayer, final_norm: Tensor, head: Tensor, embedding: Tensor, *, positions: int
) -> dict[str, Tensor]:
    """Tensors of the layout by their names, in bfloat16 where that rounds nothing, else float32.

    Args:
        layer: trained.
        final_norm: gain ``[d]`` of the model's last norm.
        head: rows ``[vocabulary, d]`` of the model's head, those of the layer's vocabulary.
        embedding: of the model, ``[V, d]``.
        positions: as `own_position_bias`.

    Raises:
        DeliberateError: heads that are together narrower than the model, or see above.
    """
    config = layer.config
    d, heads, width = config.hidden_size, config.heads, config.head_dim
    inner = heads * width
    if inner < d:
        raise DeliberateError(
            f"a draft layer with {heads} heads of {width} in a model of width {d} has no EAGLE-3 "
            f"layout: its heads must be {d} wide together"
        )
    bias = own_position_bias(width, config.rope_theta, positions).repeat(heads)
    # What the first layer adds to a residual stream that begins as the normed state.
    added = layer.joining.detach().float().clone()
    added[:, d:] -= torch.eye(d)
    values = torch.zeros(inner, 2 * d)
    values[:d] = added
    out = torch.zeros(d, inner)
    out[:, :d] = torch.eye(d)
    one, none, unread = torch.ones(d), torch.zeros(inner), torch.zeros(inner, 2 * d)
    made = {
        "fc.weight": torch.cat([torch.zeros(d, 2 * d), torch.eye(d)], dim=1),
        **_layer(0, unread, unread, values, out, (bias, bias)),
        **_mlp(0, torch.zeros(2 * config.intermediate_size, d),
               torch.zeros(d, config.intermediate_size)),
        "layers.0.input_layernorm.weight": layer.embedding_norm,
        "layers.0.hidden_norm.weight": final_norm,
        "layers.0.post_attention_layernorm.weight": one,
    }  # fmt: skip
    kv = config.kv_heads * width
    queries, keys, own_values = layer.qkv.split([inner, kv, kv])
    made |= {
        **_layer(1, queries, _repeated(keys, config.kv_heads, heads),
                 _repeated(own_values, config.kv_heads, heads), layer.out, (none, none)),
        **_mlp(1, layer.gate_up, layer.down),
        "layers.1.input_layernorm.weight": layer.attention_norm,
        "layers.1.post_attention_layernorm.weight": layer.mlp_norm,
        "norm.weight": final_norm,
        "lm_head.weight": head,
        "embed_tokens.weight": embedding,
    }  # fmt: skip
    ready = {name: _compact(one) for name, one in made.items()}
    vocabulary = layer.vocabulary.cpu()
    if len(vocabulary) < len(embedding):
        drafted = torch.zeros(len(embedding), dtype=torch.bool)
        drafted[vocabulary] = True
        ready["t2d"], ready["d2t"] = drafted, vocabulary - torch.arange(len(vocabulary))
    return ready


def _compact(x: Tensor) -> Tensor:
    plain = x.detach().float().cpu()
    rounded = plain.to(torch.bfloat16)
    lossless = torch.equal(rounded.float(), plain)
    return (rounded if lossless else plain).contiguous().clone()


def _layer(
    number: int, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor,
    biases: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    name = f"layers.{number}.self_attn"
    zero = torch.zeros(len(values))
    return {
        f"{name}.q_proj.weight": queries, f"{name}.q_proj.bias": biases[0],
        f"{name}.k_proj.weight": keys, f"{name}.k_proj.bias": biases[1],
        f"{name}.v_proj.weight": values, f"{name}.v_proj.bias": zero,
        f"{name}.o_proj.weight": out, f"{name}.o_proj.bias": torch.zeros(len(out)),
    }  # fmt: skip


def _mlp(number: int, gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    gate, up = gate_up.chunk(2)
    name = f"layers.{number}.mlp"
    return {
        f"{name}.gate_proj.weight": gate,
        f"{name}.up_proj.weight": up,
        f"{name}.down_proj.weight": down,
    }


def _repeated(rows: Tensor, kv_heads: int, heads: int) -> Tensor:
    """Rows of each key-value head once for every head that reads it."""
    return rows.unflatten(0, (kv_heads, -1)).repeat_interleave(heads // kv_heads, 0).flatten(0, 1)


@torch.no_grad()
def eagle3_outputs(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], embedded: Tensor, states: Tensor
) -> Tensor:
    """Outputs ``[T, d]`` of the two layers, as `speculators` 0.9 and vLLM compute them.

    Args:
        config: of the layers, ``transformer_layer_config`` of the format.
        embedded: embeddings ``[T, d]`` of the tokens after each state's position.
        states: ``[T, d]``, what the first layer's residual stream begins with before its norm.
    """
    eps, heads = config["rms_norm_eps"], config["num_attention_heads"]
    width = config["head_dim"]
    half = torch.arange(0, width, 2).float()
    angles = torch.arange(len(states)).float()[:, None] / config["rope_theta"] ** (half / width)
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = angles.cos(), angles.sin()

    tensors = {name: one.float() for name, one in tensors.items() if name not in _UNREAD}

    def norm(x: Tensor, name: str) -> Tensor:
        return rms_norm(x, tensors[f"{name}.weight"], eps)

    def split(x: Tensor, name: str) -> Tensor:
        flat = F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
        return flat.unflatten(-1, (heads, width)).transpose(0, 1)[None]

    hidden = norm(states, "layers.0.hidden_norm")
    read = torch.cat([norm(embedded, "layers.0.input_layernorm"), hidden], dim=-1)
    for number in range(config["num_hidden_layers"]):
        here = f"layers.{number}"
        if number:
            read = norm(hidden, f"{here}.input_layernorm")
        queries, keys, values = (split(read, f"{here}.self_attn.{one}_proj") for one in "qkv")
        attended = F.scaled_dot_product_attention(
            rotate(queries, cos, sin), rotate(keys, cos, sin), values, is_causal=True
        )
        flat = attended[0].transpose(0, 1).flatten(1)
        out = f"{here}.self_attn.o_proj"
        hidden = hidden + F.linear(flat, tensors[f"{out}.weight"], tensors[f"{out}.bias"])
        read = norm(hidden, f"{here}.post_attention_layernorm")
        gate, up = (
            F.linear(read, tensors[f"{here}.mlp.{one}_proj.weight"]) for one in ("gate", "up")
        )
        hidden = hidden + F.linear(F.silu(gate) * up, tensors[f"{here}.mlp.down_proj.weight"])
    return hidden
