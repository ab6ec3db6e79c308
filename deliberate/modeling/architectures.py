"""The supported architectures: where each keeps its parts and what its layers attend to.

An architecture that was tested is one entry of `ARCHITECTURES`, under its ``model_type`` in
transformers. Any other is described by what transformers' decoders have in common (`by_convention`)
and must then pass `deliberate.modeling.probe` before it is trusted.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import nn

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
        layer_arguments: further arguments that a decoder layer takes: ``position_ids``,
            ``use_cache``.
        rotary_by_type: the rotary module has a table for each layer type.
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
    layer_arguments: tuple[str, ...] = ()
    rotary_by_type: bool = False
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


# Layer types whose layers keep a state that is not one key and value a token.
RECURRENT = ("linear_attention", "mamba", "conv", "hybrid", "recurrent", "mlp", "moe")
_NORMS = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "ln_f", "norm_f")
_CACHES = ("past_key_values", "past_key_value", "layer_past")
# What a decoder layer may take beside the hidden states; other arguments must have a default.
_KNOWN = {
    *_CACHES,
    "hidden_states",
    "attention_mask",
    "position_ids",
    "position_embeddings",
    "use_cache",
    "output_attentions",
    "kwargs",
}


def architecture_of(model: Any) -> Architecture:
    """The entry of a model's architecture, or what `by_convention` finds.

    Raises:
        DeliberateError: as `by_convention`.
    """
    return ARCHITECTURES.get(str(model.config.model_type)) or by_convention(model)


def by_convention(model: Any) -> Architecture:
    """How a decoder that follows transformers' conventions is run; to be probed.

    They are: a base model with a token embedding, one list of decoder layers, a final norm and
    perhaps a rotary module; layers that take hidden states, mask, position embeddings and cache.

    Raises:
        DeliberateError: it does not follow them; the line says where.
    """
    config, base = model.config, model.base_model
    refuse_recurrent(config)
    parts = dict(base.named_children())
    lists = [name for name, part in parts.items() if isinstance(part, nn.ModuleList) and len(part)]
    embeds = [name for name, part in parts.items() if part is model.get_input_embeddings()]
    norms = [name for name in _NORMS if name in parts]
    if len(lists) != 1 or len(embeds) != 1 or not norms:
        raise _unlike(config, f"{type(base).__name__} has the parts {', '.join(parts) or 'none'}")
    rotary = parts.get("rotary_emb")
    dropouts = [name for name, part in parts.items() if type(part) is nn.Dropout]
    used = {lists[0], embeds[0], norms[0], *dropouts[:1], "rotary_emb"}
    if len(norms) > 1 or set(parts) - used:
        raise _unlike(config, f"the part {min(set(parts) - used)!r} of {type(base).__name__}")
    layer = parts[lists[0]][0]
    arguments = inspect.signature(layer.forward).parameters
    caches = [name for name in _CACHES if name in arguments]
    needed = [
        name
        for name, one in list(arguments.items())[1:]
        if name not in _KNOWN and one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
    ]
    if not caches or needed:
        what = f"the argument {needed[0]!r}" if needed else "no key/value cache"
        raise _unlike(config, f"{type(layer).__name__} takes {what}")
    return Architecture(
        embed=embeds[0],
        layers=lists[0],
        norm=norms[0],
        rotary="rotary_emb" if rotary is not None else None,
        dropout=dropouts[0] if dropouts else None,
        cache_argument=caches[0],
        attention=_attention(config),
        layer_arguments=tuple(n for n in ("position_ids", "use_cache") if n in arguments),
        rotary_by_type=rotary is not None
        and "layer_type" in inspect.signature(rotary.forward).parameters,
    )


def _attention(config: Any) -> Attention:
    if getattr(config, "layer_types", None):
        return Attention.BY_LAYER
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    return Attention.ONE_WINDOW if window is not None and used else Attention.FULL


def refuse_recurrent(config: Any) -> None:
    """Raises for layers that a token cannot skip and come back to later."""
    types = sorted(set(getattr(config, "layer_types", None) or ()) & set(RECURRENT))
    if types:
        raise DeliberateError(
            f"architecture {config.model_type!r} is not supported: its {types[0]!r} layers keep a "
            "state that every token changes in turn, and a token that exits early is run through "
            "them later; use a model whose layers all attend to keys and values"
        )


def _unlike(config: Any, what: str) -> DeliberateError:
    return DeliberateError(
        f"architecture {config.model_type!r} is not supported: {what}, which the conventions of "
        "transformers' decoders do not know; `deliberate architectures` lists those that run"
    )


def layer_types(config: Any, num_layers: int, attention: Attention) -> tuple[str, ...]:
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
    if attention is Attention.ONE_WINDOW:
        return (SLIDING if config.sliding_window is not None else FULL,) * num_layers
    if attention is Attention.FULL:
        return (FULL,) * num_layers
    types = tuple(config.layer_types[:num_layers])
    unknown = sorted(set(types) - {FULL, SLIDING})
    if unknown:
        raise DeliberateError(
            f"layer type {unknown[0]!r} of architecture {config.model_type!r} is not supported; "
            f"use {FULL} or {SLIDING}"
        )
    if SLIDING in types and config.sliding_window is None:
        raise DeliberateError("the model has sliding_attention layers but sliding_window is None")
    return types
