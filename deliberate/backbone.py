"""One view of a Hugging Face causal language model: embedding, layers, final norm, head.

Each supported architecture is run exactly as its own ``Model.forward`` in transformers runs it,
but layer by layer, so that a caller may stop at any depth and go on later, for one token or
several (:meth:`Backbone.run_layers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deliberate.cache import SegmentCache
from deliberate.errors import DeliberateError

FULL = "full_attention"
SLIDING = "sliding_attention"

# Rope types whose frequencies follow the length of the sequence; the others are fixed functions
# of the position.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where an architecture keeps its parts, as attribute names of the base model."""

    embed: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    rotary: str | None = "rotary_emb"
    position_embed: str | None = None
    dropout: str | None = None
    cache_argument: str = "past_key_values"


_LLAMA_LIKE = _Layout()
_LAYOUTS: dict[str, _Layout] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "phi3": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,  # its embedding module scales by sqrt(hidden_size) itself
    "bitnet": _LLAMA_LIKE,
    "gpt_neox": _Layout(
        embed="embed_in",
        norm="final_layer_norm",
        dropout="emb_dropout",
        cache_argument="layer_past",
    ),
    "gpt2": _Layout(
        embed="wte", layers="h", norm="ln_f", rotary=None, position_embed="wpe", dropout="drop"
    ),
}
ARCHITECTURES = tuple(sorted(_LAYOUTS))

# Architectures that give every layer its own type, and those with one window for all layers.
_TYPED_LAYERS = ("gemma2", "qwen2", "qwen3")
_UNIFORM_WINDOW = ("mistral", "phi3")


@dataclass(frozen=True, slots=True)
class StepContext:
    """What every layer of one pass over q consecutive tokens shares.

    ``positions``: int64 ``[1, q]``, the same for all rows of a batch. ``position_embeddings``:
    rotary (cos, sin), each ``[1, q, rotary_dim]`` in the model's dtype, or None. ``masks``: by
    layer type, None (nothing to mask) or ``[1, 1, q, start + q]``: boolean with True = attend for
    sdpa, additive in the model's dtype for eager. ``start``: absolute position of the first token.
    """

    positions: Tensor
    position_embeddings: Any
    masks: Mapping[str, Tensor | None]
    start: int


class Backbone:
    """The parts of ``model`` under one set of names; holds no weights of its own.

    Build it after any surgery on the model's layers: it keeps references to them. Supports the
    ``model_type``s in :data:`ARCHITECTURES` with attention implementation "sdpa" or "eager".

    Attributes: ``model``, ``config``, ``architecture`` (the model type), ``num_layers``,
    ``hidden_size``, ``vocab_size`` (rows of the head), ``max_positions`` (int or None), ``layers``,
    ``norm``, ``lm_head``, ``layer_types`` (per layer, "full_attention" or "sliding_attention").

    Raises DeliberateError for an architecture, a head or an attention setting it cannot run.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config
        architecture = str(config.model_type)
        if architecture not in _LAYOUTS:
            raise DeliberateError(
                f"architecture {architecture!r} is not supported; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        head = model.get_output_embeddings()
        if head is None:
            raise DeliberateError(
                f"{type(model).__name__} has no language-model head; "
                "load the model with AutoModelForCausalLM"
            )
        layout = _LAYOUTS[architecture]
        base: Any = model.base_model
        self.model = model
        self.config = config
        self.architecture = architecture
        self.layers: nn.ModuleList = getattr(base, layout.layers)
        self.norm: nn.Module = getattr(base, layout.norm)
        self.lm_head: nn.Module = head
        self.num_layers = len(self.layers)
        self.hidden_size = int(config.hidden_size)
        self.vocab_size = int(getattr(head, "out_features", config.vocab_size))
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self.layer_types = _layer_types(architecture, config, self.num_layers)
        self._window: int | None = config.sliding_window if SLIDING in self.layer_types else None
        self._eager = _is_eager(config)
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._embed: Any = getattr(base, layout.embed)
        self._position_embed: Any = _optional(base, layout.position_embed)
        self._dropout: Any = _optional(base, layout.dropout)
        self._rotary: Any = _optional(base, layout.rotary)
        rope_type = getattr(self._rotary, "rope_type", "default")
        self._rope_follows_length = any(name in rope_type for name in LENGTH_DEPENDENT_ROPE)
        self._cache_argument = layout.cache_argument
        self._steps = tuple(zip(self.layers, self.layer_types, strict=True))
        self._no_masks: dict[str, Tensor | None] = dict.fromkeys((FULL, SLIDING))
        self._tables: _Tables | None = None

    @property
    def device(self) -> torch.device:
        """Where the embedding is, and with it the inputs of a pass."""
        return self._embed.weight.device

    def new_cache(self, capacity: int = 0) -> SegmentCache:
        """An empty cache for this model with room for ``capacity`` tokens."""
        return SegmentCache(self.num_layers, capacity)

    def context(self, start: int, q: int, *, device: torch.device | str) -> StepContext:
        """Context of a causal pass over q tokens at positions start..start+q-1.

        The tokens see the keys 0..start+q-1 that are not after them, and in sliding-window layers
        only the last ``window`` of those, themselves included. Where the rotary frequencies
        depend on the sequence length ("dynamic" and "longrope"), a pass at start 0 takes those of
        its full length and a later pass those that each of its tokens would have got alone.
        """
        end = start + q
        if q < 1 or start < 0:
            raise DeliberateError(f"a pass needs start >= 0 and q >= 1, got start={start}, q={q}")
        if self._position_embed is not None and end > self._position_embed.num_embeddings:
            raise DeliberateError(
                f"{end} tokens do not fit the {self._position_embed.num_embeddings} learned "
                f"positions of this {self.architecture} model; shorten the prompt or the answer"
            )
        tables = self._tables
        dtype = self._embed.weight.dtype
        if tables is None or tables.size < end or tables.key != (device, dtype):
            tables = self._tables = self._build_tables(end, device, dtype)
        positions = tables.positions.narrow(1, start, q)
        rotary: tuple[Tensor, Tensor] | None = None
        if tables.cos is not None and tables.sin is not None:
            rotary = tables.cos.narrow(1, start, q), tables.sin.narrow(1, start, q)
        elif self._rotary is not None:
            rotary = self._rotary_now(positions, start, dtype)
        return StepContext(positions, rotary, self._masks(tables, start, end, dtype), start)

    def embed(self, input_ids: Tensor, ctx: StepContext) -> Tensor:
        """Token ids ``[B, q]`` -> input of the first layer, ``[B, q, d]``."""
        hidden = self._embed(input_ids)
        if self._position_embed is not None:
            hidden = hidden + self._position_embed(ctx.positions)
        if self._dropout is not None:
            hidden = self._dropout(hidden)
        return hidden

    def run_layers(
        self, hidden: Tensor, first: int, last: int, ctx: StepContext, cache: SegmentCache
    ) -> Tensor:
        """Run layers first..last-1 on ``[B, q, d]`` and append their keys and values to ``cache``.

        These layers must hold exactly the ``ctx.start`` tokens before the pass.
        """
        if first < last and not cache.length(first) == ctx.start == cache.length(last - 1):
            raise RuntimeError(
                f"a pass from position {ctx.start} through layers {first}..{last - 1} meets "
                f"{cache.length(first)}..{cache.length(last - 1)} cached tokens"
            )
        rotary, masks = ctx.position_embeddings, ctx.masks
        if self._rotary is None:
            for layer, kind in self._steps[first:last]:
                hidden = layer(hidden, past_key_values=cache, attention_mask=masks[kind])
        else:
            arguments = {self._cache_argument: cache, "position_embeddings": rotary}
            for layer, kind in self._steps[first:last]:
                hidden = layer(hidden, attention_mask=masks[kind], **arguments)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm, head and softcapping: ``[..., d]`` -> ``[..., V]``."""
        return self.head_logits(self.norm(hidden))

    def head_logits(self, normed: Tensor) -> Tensor:
        """Head and softcapping of what has been normed already: ``[..., d]`` -> ``[..., V]``."""
        return self.softcap(self.lm_head(normed))

    def softcap(self, logits: Tensor) -> Tensor:
        """The architecture's cap on its logits (Gemma-2), the identity elsewhere."""
        if self._softcap is None:
            return logits
        return torch.tanh(logits / self._softcap) * self._softcap

    def _masks(
        self, tables: _Tables, start: int, end: int, dtype: torch.dtype
    ) -> Mapping[str, Tensor | None]:
        q = end - start
        window = self._window
        windowed = window is not None and end > window
        # sdpa masks causally by itself, but from the first key on: right only when start == 0.
        causal_needed = q > 1 and (self._eager or start > 0)
        if not windowed and not causal_needed:
            return self._no_masks
        keys = tables.positions.narrow(1, 0, end).view(1, 1, 1, end)
        queries = tables.positions.narrow(1, start, q).view(1, 1, q, 1)
        causal = keys <= queries
        full = self._form(causal, dtype) if causal_needed else None
        if windowed and window is not None:
            return {FULL: full, SLIDING: self._form(causal & (keys > queries - window), dtype)}
        return {FULL: full, SLIDING: full}

    def _form(self, attend: Tensor, dtype: torch.dtype) -> Tensor:
        """A boolean mask in the form that the attention implementation takes."""
        if not self._eager:
            return attend
        blocked = torch.finfo(dtype).min
        return torch.zeros(attend.shape, dtype=dtype, device=attend.device).masked_fill_(
            ~attend, blocked
        )

    def _build_tables(self, needed: int, device: torch.device | str, dtype: torch.dtype) -> _Tables:
        size = 1 << max(needed - 1, 255).bit_length()  # powers of two: few rebuilds
        # Outside inference mode, so that the tables serve every later pass, with gradients or not.
        with torch.inference_mode(False), torch.no_grad():
            positions = torch.arange(size, device=device).unsqueeze(0)
            cos = sin = None
            if self._rotary is not None and not self._rope_follows_length:
                cos, sin = self._rotary(torch.empty(0, dtype=dtype, device=device), positions)
        return _Tables((device, dtype), size, positions, cos, sin)

    def _rotary_now(
        self, positions: Tensor, start: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Rotary embeddings that depend on the sequence length, from the model's own module."""
        like = torch.empty(0, dtype=dtype, device=positions.device)
        if start == 0 or positions.shape[1] == 1:
            return self._rotary(like, positions)
        # One at a time: the module takes the frequencies of the last position that it is shown.
        pairs = [self._rotary(like, one) for one in positions.split(1, dim=1)]
        return torch.cat([c for c, _ in pairs], dim=1), torch.cat([s for _, s in pairs], dim=1)


@dataclass(frozen=True, slots=True)
class _Tables:
    """Positions ``[1, size]`` and rotary tables ``[1, size, rotary_dim]``, sliced by each pass."""

    key: tuple[torch.device | str, torch.dtype]
    size: int
    positions: Tensor
    cos: Tensor | None
    sin: Tensor | None


def _optional(base: Any, name: str | None) -> Any:
    return None if name is None else getattr(base, name)


def _is_eager(config: Any) -> bool:
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise DeliberateError(
            f"attention implementation {implementation!r} is not supported; "
            'load the model with attn_implementation="sdpa" or "eager"'
        )
    if implementation == "sdpa" and getattr(config, "attn_logit_softcapping", None) is not None:
        raise DeliberateError(
            "attention implementation 'sdpa' cannot softcap attention logits; "
            'load the model with attn_implementation="eager"'
        )
    return implementation == "eager"


def _layer_types(architecture: str, config: Any, num_layers: int) -> tuple[str, ...]:
    if getattr(config, "use_bidirectional_attention", False) or not getattr(
        config, "is_causal", True
    ):
        raise DeliberateError(
            f"this {architecture} model attends in both directions; a causal one is needed"
        )
    if architecture in _UNIFORM_WINDOW:
        return (SLIDING if config.sliding_window is not None else FULL,) * num_layers
    if architecture not in _TYPED_LAYERS:
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
