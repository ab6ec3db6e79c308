"""The supported architectures: where each keeps its parts and what its layers attend to.

An architecture is one entry of `ARCHITECTURES`, under its ``model_type`` in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from deliberate.cache.attention_metadata import FULL, SLIDING
from deliberate.utils.errors import DeliberateError


class Attention(StrEnum):
    """What the layers of an architecture attend to.

    ``full``: every earlier token, in every layer.
    ``one_window``: the last ``config.sliding_window`` tokens in every layer; all where it is None.
    ``by_layer``: as ``config.layer_types`` lists for each layer.
    """

    FULL = "full"
    ONE_WINDOW = "one_window"
    BY_LAYER = "by_layer"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture, as transformers implements it.

    Attributes:
        embed, layers, norm: attribute names in the base model (``model.base_model``).
        rotary: its rotary module, or None.
        position_embed: its table of learned positions, or None.
        dropout: of the embeddings, or None.
        cache_argument: name under which a decoder layer takes the KV cache.
        attention: what the layers attend to.
        recomputes_longrope: where "longrope" changes its frequencies, all keys and values are
            computed anew, as `Phi3ForCausalLM.prepare_inputs_for_generation` does; other
            architectures go on with the old keys.
        fused: the fused executor runs its layers, which are then those of Llama: RMSNorm, rotary
            attention with grouped heads, SwiGLU.
    """

    embed: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    rotary: str | None = "rotary_emb"
    position_embed: str | None = None
    dropout: str | None = None
    cache_argument: str = "past_key_values"
    attention: Attention = Attention.FULL
    recomputes_longrope: bool = False
    fused: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "bitnet": Architecture(),
    # Its embedding module scales by sqrt(hidden_size) itself.
    "gemma2": Architecture(attention=Attention.BY_LAYER),
    "gpt2": Architecture(
        embed="wte", layers="h", norm="ln_f", rotary=None, position_embed="wpe", dropout="drop"
    ),
    "gpt_neox": Architecture(
        embed="embed_in",
        norm="final_layer_norm",
        dropout="emb_dropout",
        cache_argument="layer_past",
    ),
    "llama": Architecture(fused=True),
    "mistral": Architecture(attention=Attention.ONE_WINDOW, fused=True),
    "mixtral": Architecture(attention=Attention.ONE_WINDOW),
    "olmo2": Architecture(),
    "phi3": Architecture(attention=Attention.ONE_WINDOW, recomputes_longrope=True),
    "qwen2": Architecture(attention=Attention.BY_LAYER, fused=True),
    "qwen3": Architecture(attention=Attention.BY_LAYER, fused=True),
    "qwen3_moe": Architecture(attention=Attention.ONE_WINDOW),
}


def architecture_named(model_type: str) -> Architecture:
    """The entry of a transformers ``model_type``.

    Raises:
        DeliberateError: there is none; the line lists those that there are.
    """
    if model_type not in ARCHITECTURES:
        raise DeliberateError(
            f"architecture {model_type!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]


def layer_types(config: Any, num_layers: int) -> tuple[str, ...]:
    """ "full_attention" or "sliding_attention" of each layer of a model with this configuration.

    Raises:
        DeliberateError: attention in both directions, an unknown layer type, or sliding layers
            without a window.
    """
    if getattr(config, "use_bidirectional_attention", False) or not getattr(
        config, "is_causal", True
    ):
        raise DeliberateError(
            f"this {config.model_type} model attends in both directions; a causal one is needed"
        )
    attention = architecture_named(config.model_type).attention
    if attention is Attention.ONE_WINDOW:
        return (SLIDING if config.sliding_window is not None else FULL,) * num_layers
    if attention is Attention.FULL:
        return (FULL,) * num_layers
    types = tuple(config.layer_types[:num_layers])
    unknown = sorted(set(types) - {FULL, SLIDING})
    if unknown:
        raise DeliberateError(
            f"layer type {unknown[0]!r} is not supported; use {FULL} or {SLIDING}"
        )
    if SLIDING in types and config.sliding_window is None:
        raise DeliberateError("the model has sliding_attention layers but sliding_window is None")
    return types
