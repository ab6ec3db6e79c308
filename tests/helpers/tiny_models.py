"""Tiny random models of every supported architecture, for tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ARCHITECTURES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "olmo2",
    "phi3",
    "gemma2",
    "gpt_neox",
    "gpt2",
    "bitnet",
    "mixtral",
    "qwen3_moe",
]
VOCAB = 97
WINDOW = 8
MAX_POSITIONS = 128

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_PER_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "qwen3": {"head_dim": 8},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 2,
    },
    "gemma2": {
        "sliding_window": WINDOW,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_implementation": "eager",  # the only one that softcaps attention logits
    },
    "gpt_neox": {"num_key_value_heads": None},
    "gpt2": {"num_key_value_heads": None, "n_inner": 64},
}


def tiny_model(
    arch: str,
    *,
    layers: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A random model in eval mode that never stops early: it has no special token.

    ``overrides`` go to the config; ``attn_implementation`` is "sdpa" unless the architecture
    needs "eager". Norm weights and biases are perturbed too, so that leaving one out shows.
    """
    settings = _COMMON | {"num_hidden_layers": layers} | _PER_ARCHITECTURE.get(arch, {}) | overrides
    if settings["num_key_value_heads"] is None:
        del settings["num_key_value_heads"]
    implementation = settings.pop("attn_implementation", "sdpa")
    # Only this implementation of mixtures of experts multiplies in double precision.
    experts = {"experts_implementation": "eager"} if "moe" in arch or arch == "mixtral" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(arch, **settings, **experts),
            dtype=dtype,
            attn_implementation=implementation,
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def random_ids(length: int, *, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """Random token ids, int64 ``[batch, length]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (batch, length), generator=generator)


def left_padded(lengths, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask ``[B, longest]`` of random prompts."""
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = random_ids(length, seed=seed + row)[0]
        mask[row, width - length :] = 1
    return ids, mask
