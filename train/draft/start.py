"""The start of a draft layer: the model's own last layer, and a joining matrix in closed form.

Entry t of a draft layer stands for position t + 1 of the model. There the last layer reads a state
that a linear map of (embedding of token t + 1, state at position t) predicts best in the sense of
ridge regression, so that is where the joining matrix starts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deliberate.modeling.backbone import Backbone
from deliberate.modeling.draft_layer import DraftLayer, DraftLayerConfig, rms_norm
from deliberate.train.draft.ridge import Ridge


def draft_config(backbone: Backbone, vocabulary: int) -> DraftLayerConfig:
    """Sizes of the model's own last layer, where it is of Llama's form; else usual ones."""
    config: Any = backbone.config
    last = _llama_layer(backbone)
    d = backbone.hidden_size
    if last is None:
        head_dim = max(2, d // max(1, int(getattr(config, "num_attention_heads", 8))) // 2 * 2)
        heads = max(1, d // head_dim)
        return DraftLayerConfig(d, heads, heads, head_dim, 8 * d // 3 // 2 * 2, vocabulary)
    attention = last.self_attn
    head_dim = int(attention.head_dim)
    return DraftLayerConfig(
        hidden_size=d,
        heads=attention.q_proj.out_features // head_dim,
        kv_heads=attention.k_proj.out_features // head_dim,
        head_dim=head_dim,
        intermediate_size=last.mlp.gate_proj.out_features,
        vocabulary=vocabulary,
        rope_theta=_rope_theta(config),
        eps=float(last.input_layernorm.variance_epsilon),
    )


@torch.no_grad()
def start_from_model(layer: DraftLayer, backbone: Backbone) -> bool:
    """Copies the model's last layer, where it is of the same form; whether it did."""
    last = _llama_layer(backbone)
    if last is None:
        return False
    attention, mlp = last.self_attn, last.mlp
    parts = [one.weight for one in (attention.q_proj, attention.k_proj, attention.v_proj)]
    layer.qkv.copy_(torch.cat(parts).float())
    layer.out.copy_(attention.o_proj.weight)
    layer.gate_up.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).float())
    layer.down.copy_(mlp.down_proj.weight)
    layer.attention_norm.copy_(last.input_layernorm.weight)
    layer.mlp_norm.copy_(last.post_attention_layernorm.weight)
    return True


@torch.no_grad()
def fit_joining(
    layer: DraftLayer, pairs: list[tuple[Tensor, Tensor, Tensor]], *, penalty: float = 1e-3
) -> None:
    """Sets the joining matrix by ridge regression.

    Args:
        pairs: for each text the embeddings ``[n - 1, d]`` of tokens 1.., the normed states
            ``[n - 1, d]`` at positions 0.., and the inputs ``[n - 1, d]`` of the model's last layer
            at positions 1.. .
        penalty: relative to the mean square of the inputs.
    """
    d = layer.config.hidden_size
    ridge = Ridge(2 * d, d)
    for embedded, normed, wanted in pairs:
        embedded = rms_norm(embedded, layer.embedding_norm, layer.config.eps)
        ridge.add(torch.cat([embedded, normed], dim=-1), wanted)
    layer.joining.copy_(ridge.solve(penalty))


def _llama_layer(backbone: Backbone) -> Any:
    """The model's last layer where a draft layer can begin as a copy of it, or None."""
    last: Any = backbone.layers[-1]
    attention, mlp = getattr(last, "self_attn", None), getattr(last, "mlp", None)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    parts = [getattr(attention, name, None) for name in names]
    parts += [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    plain = all(isinstance(one, torch.nn.Linear) and one.bias is None for one in parts)
    norms = ("input_layernorm", "post_attention_layernorm")
    normed = all(hasattr(getattr(last, name, None), "variance_epsilon") for name in norms)
    silu = getattr(backbone.config, "hidden_act", None) == "silu"
    plain = plain and normed and silu and getattr(attention, "q_norm", None) is None
    return last if plain else None


def _rope_theta(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta", getattr(config, "rope_theta", 10000.0)))
