"""What the tests of fused share with others."""

from __future__ import annotations

import torch
from tiny_models import WINDOW, tiny_model

from deliberate.modeling.backbone import Backbone

# transformers computes norms in float32 whatever the model's dtype is.
TOLERANCE = 2e-5


FAMILIES = {
    "llama": ("llama", {}),
    "llama tied, with biases": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, one key head each": ("llama", {"num_key_value_heads": 4}),
    "llama, yarn": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama, dynamic": (
        "llama",
        {
            "rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            "max_position_embeddings": 16,
        },
    ),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
}


def family(name: str, **overrides):
    architecture, settings = FAMILIES[name]
    return tiny_model(architecture, **(settings | overrides))


@torch.inference_mode()
def stepwise(backbone: Backbone, ids: torch.Tensor, exits: tuple[int, ...] = (1, 3)):
    """Logits of a prompt, of single tokens by segments, and of several tokens at once."""
    depth = backbone.num_layers
    cache = backbone.new_cache()
    ctx = backbone.context(0, 11, device="cpu")
    hidden = backbone.run_layers(backbone.embed(ids[:, :11], ctx), 0, depth, ctx, cache)
    made = [backbone.logits(hidden)]
    for position in range(11, 14):
        ctx = backbone.context(position, 1, device="cpu")
        hidden = backbone.embed(ids[:, position : position + 1], ctx)
        for first, last in zip((0, *exits), (*exits, depth), strict=True):
            hidden = backbone.run_layers(hidden, first, last, ctx, cache)
        made.append(backbone.logits(hidden))
    rest = ids.shape[1] - 14
    ctx = backbone.context(14, rest, device="cpu")
    hidden = backbone.run_layers(backbone.embed(ids[:, 14:], ctx), 0, depth, ctx, cache)
    made.append(backbone.logits(hidden))
    return torch.cat(made, dim=1), cache


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())
