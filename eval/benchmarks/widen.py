"""A wider model that computes the same function: what depth is worth where weights fill memory.

The bundled model fits a processor's cache, where reading weights costs next to nothing; a model
that people serve does not. Trained exits of such a size are not at hand, but Net2Net's widening
(Chen et al., arXiv:1511.05641) makes them: every hidden unit is repeated, and the weights that read
it are divided by the number of copies. Tokens, confidences and exits stay those of the narrow model
up to rounding; time and memory are those of the wide one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deliberate.api.model import AdaptiveModel
from deliberate.modeling.exit_heads import FullTranslator, LowRankTranslator
from deliberate.utils.errors import DeliberateError


def _rows(weight: Tensor, times: int) -> Tensor:
    """Every output repeated."""
    return weight.repeat(times, *(1,) * (weight.dim() - 1))


def _columns(weight: Tensor, times: int) -> Tensor:
    """Every input repeated; their sum is what it was."""
    return weight.repeat(1, times) / times


@torch.no_grad()
def widen(model: AdaptiveModel, times: int, **how: Any) -> AdaptiveModel:
    """A model of `times` the width (hidden, heads, MLP), about `times`² the parameters.

    Args:
        model: of the Llama architecture, without a deliberation gate.
        **how: executor, engine and weights of the new one, see `AdaptiveModel`.

    Raises:
        DeliberateError: another architecture, a gate, or `times` below 1.
    """
    config = copy.deepcopy(model.base.config)
    if times < 1:
        raise DeliberateError(f"widen={times} must be at least 1")
    if config.model_type != "llama" or model.gate is not None:
        raise DeliberateError(
            f"widen={times} repeats units of Llama models without a gate, not of "
            f"{config.model_type}{' with one' if model.gate is not None else ''}"
        )
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        setattr(config, name, getattr(config, name) * times)
    config.head_dim = model.base.config.hidden_size // model.base.config.num_attention_heads
    # The head reads repeated units and the embedding makes them: they are no longer one matrix.
    config.tie_word_embeddings = False
    dtype = next(model.base.parameters()).dtype
    base = AutoModelForCausalLM.from_config(config, dtype=dtype).to(model.device)
    narrow: Any = model.base
    wide: Any = base
    wide.model.embed_tokens.weight.copy_(narrow.model.embed_tokens.weight.repeat(1, times))
    wide.lm_head.weight.copy_(_columns(narrow.lm_head.weight, times))
    wide.model.norm.weight.copy_(_rows(narrow.model.norm.weight, times))
    for mine, other in zip(wide.model.layers, narrow.model.layers, strict=True):
        for part, name in (
            ("self_attn", "q_proj k_proj v_proj o_proj"),
            ("mlp", "gate_proj up_proj down_proj"),
        ):
            for linear in name.split():
                to, of = getattr(getattr(mine, part), linear), getattr(getattr(other, part), linear)
                to.weight.copy_(_columns(_rows(of.weight, times), times))
                if of.bias is not None:
                    to.bias.copy_(_rows(of.bias, times))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            getattr(mine, norm).weight.copy_(_rows(getattr(other, norm).weight, times))
    base.generation_config = copy.deepcopy(model.base.generation_config)
    made = AdaptiveModel(base.eval(), model.exit_config, fidelity=model.fidelity, **how)
    if made.exits.vocabulary is not None and model.exits.vocabulary is not None:
        made.exits.vocabulary.copy_(model.exits.vocabulary)
    pairs: Any = zip(made.exits.translators, model.exits.translators, strict=True)
    for mine, other in pairs:
        if isinstance(other, LowRankTranslator):
            mine.down.weight.copy_(_columns(other.down.weight, times))
            mine.up.weight.copy_(_rows(other.up.weight, times))
        elif isinstance(other, FullTranslator):
            mine.delta.weight.copy_(_columns(_rows(other.delta.weight, times), times))
    pairs = zip(made.exits.gates, model.exits.gates, strict=True)
    for mine, other in pairs:
        mine.weight.copy_(_columns(other.weight, times))
        mine.bias.copy_(other.bias)
    return made
