"""Tiny random vision-language models and what their processors would give."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

IMAGE = 90  # the placeholder's token id
_TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EYES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 2,
    "initializer_range": 0.3,
}
_QWEN: dict[str, Any] = {
    "text_config": {
        **_TEXT,
        "rope_parameters": {
            "type": "mrope",
            "rope_type": "default",
            "mrope_section": [1, 1, 2],
            "rope_theta": 10000.0,
        },
    },
    "vision_config": {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "initializer_range": 0.3,
    },
    "image_token_id": IMAGE,
    "vision_start_token_id": 91,
    "vision_end_token_id": 92,
    "video_token_id": 93,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "smolvlm": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": _EYES,
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "tie_word_embeddings": False,
    },
    "idefics3": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": _EYES,
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "tie_word_embeddings": False,
    },
    "llava": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "clip_vision_model", **_EYES},
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
        "tie_word_embeddings": False,
    },
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **_TEXT, "sliding_window": 16},
        "vision_config": {"model_type": "siglip_vision_model", **_EYES},
        "image_token_id": IMAGE,
        "image_token_index": IMAGE,
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **_TEXT},
        "vision_config": {"model_type": "pixtral", **_EYES},
        "image_token_index": IMAGE,
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
    },
    "idefics2": {
        "text_config": {"model_type": "mistral", **_TEXT},
        "vision_config": _EYES,
        "image_token_id": IMAGE,
        "perceiver_config": {
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "num_key_value_heads": 1,
            "resampler_head_dim": 16,
        },
    },
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": {
        **_QWEN,
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "window_size": 8,
            "fullatt_block_indexes": [1],
        },
    },
}
# Positions of one image in a prompt.
POSITIONS = dict.fromkeys(_CONFIGS, 4) | {"llava": 16}


def seeing(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A tiny random model in eval mode; the same at every call."""
    # Some configurations change what they are given.
    config = AutoConfig.for_model(name, **copy.deepcopy(_CONFIGS[name]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.pad_token_id = 0
    return model.eval()


def shown(name: str, seed: int = 0, rows: int = 1, dtype: torch.dtype = torch.float64) -> dict:
    """Ids ``[rows, n]``, an image in each row, and pixels, as its processor would give them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE, (rows, 6 + POSITIONS[name]), generator=generator)
    ids[:, 2 : 2 + POSITIONS[name]] = IMAGE
    given: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "qwen2_vl":
        ids[:, 1] = 91
        pixels = torch.randn(rows * 16, 3 * 1 * 2 * 2, generator=generator)
        given["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
        given["mm_token_type_ids"] = (ids == IMAGE).int()
    else:
        pixels = torch.randn(rows, 3, 8, 8, generator=generator)
        if name.startswith(("smolvlm", "idefics")):
            pixels = pixels[:, None]
        if name == "mistral3":
            given["image_sizes"] = torch.tensor([[8, 8]] * rows)
    return {**given, "pixel_values": pixels.to(dtype)}
