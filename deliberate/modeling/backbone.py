"""One view of a Hugging Face causal language model: embedding, layers, final norm, head.

Each supported architecture is run exactly as its own ``Model.forward`` in transformers runs it,
but layer by layer, so that a caller may stop at any depth and run the remaining layers later, for
one token or several (:meth:`Backbone.run_layers`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deliberate.cache.attention_metadata import SLIDING, ContextBuilder, StepContext
from deliberate.cache.block_cache import BLOCK_SIZE, BlockCache
from deliberate.cache.int8_cache import Int8Cache
from deliberate.cache.kv_cache import KeysWritten, SegmentCache
from deliberate.config import KVStorage, as_kv_storage
from deliberate.modeling.architectures import architecture_of, layer_types
from deliberate.modeling.head_output import HeadOutput
from deliberate.modeling.head_rows import times_rows
from deliberate.modeling.seen_rows import SeenRows, SeenRun, positions_of
from deliberate.utils.errors import DeliberateError

# Rope types whose frequencies follow the length of the sequence; the others are fixed functions
# of the position.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class Backbone:
    """The parts of ``model`` under one set of names; holds no weights of its own.

    Build it after any surgery on the model's layers: it keeps references to them. Runs the entries
    of `deliberate.modeling.architectures.ARCHITECTURES`, and others by the conventions of
    transformers' decoders (`check_architecture` tells whether rightly), with attention
    implementation "sdpa" or "eager".

    Attributes: ``model``, ``config``, ``architecture`` (the model type), ``num_layers``,
    ``hidden_size``, ``vocab_size`` (rows of the head), ``max_positions`` (int or None), ``layers``,
    ``norm``, ``lm_head``, ``layer_types`` (per layer, "full_attention" or "sliding_attention"),
    ``window`` (tokens that sliding-window layers attend to, themselves included, or None),
    ``learned_positions`` (rows of the table of positions, or None: rotary models have no end),
    ``rope_follows_length`` (the rotary frequencies depend on the length of the sequence),
    ``rope_switch`` (position from which keys and values are computed anew with other frequencies,
    or None).

    Raises DeliberateError for an architecture, a head or an attention setting it cannot run.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config
        architecture = str(config.model_type)
        head = model.get_output_embeddings()
        if head is None:
            raise DeliberateError(
                f"{type(model).__name__} has no language-model head; "
                "load the model with AutoModelForCausalLM"
            )
        layout = architecture_of(model)
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
        self.layer_types = layer_types(config, self.num_layers, layout.attention)
        self.window: int | None = config.sliding_window if SLIDING in self.layer_types else None
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._embed: Any = getattr(base, layout.embed)
        # Embeddings of images, where the model sees.
        self._seen: SeenRows | None = getattr(model, "seen", None)
        self._position_embed: Any = _optional(base, layout.position_embed)
        self._dropout: Any = _optional(base, layout.dropout)
        self._rotary: Any = _optional(base, layout.rotary)
        rope_type = getattr(self._rotary, "rope_type", "default")
        self.rope_follows_length = any(name in rope_type for name in LENGTH_DEPENDENT_ROPE)
        self.rope_switch: int | None = None
        if layout.recomputes_longrope and "longrope" in rope_type:
            self.rope_switch = int(config.original_max_position_embeddings)
        self.learned_positions: int | None = getattr(self._position_embed, "num_embeddings", None)
        self.contexts = ContextBuilder(
            self._embed,
            self._rotary,
            rope_follows_length=self.rope_follows_length,
            eager=_is_eager(config),
            window=self.window,
            learned_positions=self.learned_positions,
            rotary_types=sorted(set(self.layer_types)) if layout.rotary_by_type else (),
        )
        self._embed_scale: float | None = getattr(config, "embedding_multiplier", None)
        self._logit_scale: float | None = getattr(config, "logit_scale", None)
        self._logit_divisor: float | None = getattr(config, "logits_scaling", None)
        self._by_type = layout.rotary_by_type
        self._takes_positions = "position_ids" in layout.layer_arguments
        self._takes_use_cache = "use_cache" in layout.layer_arguments
        self._cache_argument = layout.cache_argument
        self._steps = tuple(zip(self.layers, self.layer_types, strict=True))

    @property
    def device(self) -> torch.device:
        """Where the embedding is, and with it the inputs of a pass."""
        return self._reference().device

    @property
    def embeddings(self) -> int:
        """Token ids that have an embedding: those below this number."""
        return int(self._embed.num_embeddings)

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states, keys and values."""
        return self._reference().dtype

    def _reference(self) -> Tensor:
        """The embedding, or the final norm where its weights are in blocks: the model's first
        parameter lies behind many modules then, and this is asked for in every pass."""
        weight: Tensor | None = self._embed._parameters.get("weight")
        return next(self.norm.parameters()) if weight is None else weight

    def new_cache(self, capacity: int = 0, batch: int = 1) -> SegmentCache:
        """An empty cache for this model with room for ``capacity`` tokens in ``batch`` rows."""
        return SegmentCache(self.num_layers, capacity, batch)

    def new_int8_cache(self, capacity: int = 0, batch: int = 1) -> SegmentCache:
        """As `new_cache`, with keys and values in 8 bits.

        Raises:
            DeliberateError: the executor reads keys and values in the model's dtype only.
        """
        if type(self) is not Backbone:
            raise DeliberateError(
                "kv_storage='int8' with a fused executor that reads keys and values in the model's "
                "dtype: load the model with executor='generic', or in float32 on a CPU, where the "
                "C++ kernels read them"
            )
        return Int8Cache(self.num_layers, capacity, batch)

    def cache_maker(self, storage: KVStorage) -> Callable[[int, int], SegmentCache]:
        """What makes caches of this storage, of so many tokens and rows."""
        return self.new_cache if storage is KVStorage.NATIVE else self.new_int8_cache

    def new_block_cache(
        self,
        blocks: int,
        *,
        block_size: int = BLOCK_SIZE,
        reuse_key: str = "",
        max_rows: int = 0,
        storage: KVStorage | str = KVStorage.NATIVE,
    ) -> BlockCache:
        """An empty cache in blocks, whose rows are opened and closed one by one.

        Args:
            blocks: blocks of each layer at most.
            block_size: tokens a block.
            max_rows: rows that may be open at once; 0: any number.
            reuse_key: of weights and adapter: rows share beginnings within the same key. Where
                rotary frequencies follow the length, keys do too and nothing is shared.
            storage: of keys and values; in 8 bits only where the C++ kernels read them.

        Raises:
            DeliberateError: a storage that this executor does not keep in blocks.
        """
        check_block_storage(storage)
        return BlockCache(
            self.windows,
            blocks,
            block_size=block_size,
            reuse_key=reuse_key,
            max_rows=max_rows,
            share=not self.rope_follows_length,
        )

    @property
    def windows(self) -> list[int]:
        """Sliding window of each layer in tokens, 0 for none."""
        window = self.window or 0
        return [window if kind == SLIDING else 0 for kind in self.layer_types]

    def context(self, start: int, q: int, *, device: torch.device | str) -> StepContext:
        """Context of a causal pass over q tokens at positions start..start+q-1 of every row."""
        return self.contexts.uniform(start, q, device=device)

    def placed(self, positions: Tensor) -> Backbone:
        """The same layers for one prompt whose tokens have rotary positions of their own.

        Args:
            positions: ``[axes, n]``; see `ContextBuilder.placed`.

        Raises:
            DeliberateError: positions that follow the length, or a table for each layer type.
        """
        self.check_places()
        made = copy.copy(self)
        made.contexts = self.contexts.placed(positions)
        return made

    def check_places(self) -> None:
        """Raises where tokens cannot have rotary positions of their own.

        Raises:
            DeliberateError: as `placed`.
        """
        if self._rotary is None or self.rope_follows_length or self._by_type:
            raise DeliberateError(
                f"architecture {self.architecture!r} has no single rotary table to place images in"
            )
        if type(self) is not Backbone:
            raise DeliberateError(
                f"{type(self).__name__} reads rotary tables by position: use executor='generic' "
                "for images that are placed by M-RoPE"
            )

    def with_rows(self) -> Backbone:
        """The same layers for an engine's cache, whose rows it may place by `place_row`; itself
        where no prompt can have places."""
        if self._seen is None or type(self) is not Backbone:
            return self
        made = copy.copy(self)
        made.contexts = self.contexts.with_rows()
        return made

    def place_row(self, row: int, ids: Sequence[int] = (), seen: Sequence[SeenRun] = ()) -> None:
        """A row of the cache begins with this prompt, whose images may have places of their own."""
        if self._seen is not None:
            self.contexts.place_row(row, positions_of(ids, seen))

    def pass_context(
        self,
        rows: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        *,
        batch: int,
        holes: Tensor | None = None,
    ) -> StepContext:
        """Context of a pass over rows of a cache of ``batch`` rows, uniform where it can be.

        Args:
            rows: rows that take part, rising; ``starts`` and ``counts`` belong to them.
            holes: bool ``[R, keys]``, True where a slot of the row holds nothing.
        """
        alike = len(rows) == batch and len(set(starts)) == 1 and len(set(counts)) == 1
        if alike and holes is None and not self.contexts.places_rows:
            return self.contexts.uniform(starts[0], counts[0], device=self.device)
        return self.contexts.ragged(
            rows, starts, counts, batch=batch, device=self.device, holes=holes
        )

    def embed(self, input_ids: Tensor, ctx: StepContext) -> Tensor:
        """Token ids ``[B, q]`` -> input of the first layer, ``[B, q, d]``."""
        hidden = self.embed_tokens(input_ids)
        if self._embed_scale is not None:
            hidden = hidden * self._embed_scale
        if self._position_embed is not None:
            hidden = hidden + self._position_embed(ctx.positions)
        if self._dropout is not None:
            hidden = self._dropout(hidden)
        return hidden

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Embeddings ``[..., d]`` of token ids, without positions or dropout."""
        if self._seen is not None:
            return self._seen.look_up(ids, self._embed)
        embedded: Tensor = self._embed(ids)
        return embedded

    def has_embedding(self, token: int) -> bool:
        """Whether an id is a token's, or that of an image that is kept."""
        return token < self.embeddings or (self._seen is not None and self._seen.knows(token))

    def hold(self, ids: Sequence[int]) -> tuple[SeenRun, ...]:
        """Embeddings of the images among a prompt's ids, kept by whoever keeps what is returned."""
        return () if self._seen is None else self._seen.hold(ids)

    def run_layers(
        self, hidden: Tensor, first: int, last: int, ctx: StepContext, cache: SegmentCache
    ) -> Tensor:
        """Run layers first..last-1 on ``[R, q, d]`` and append their keys and values to ``cache``.

        In these layers each row must hold exactly the tokens before its own start.
        """
        cache.begin(ctx, first, last)
        masks, arguments = ctx.masks, self._layer_arguments(ctx, cache)
        for layer, kind in self._steps[first:last]:
            hidden = layer(hidden, attention_mask=masks[kind], **arguments[kind])
            if not isinstance(hidden, Tensor):
                hidden = hidden[0]
        return hidden

    def _layer_arguments(self, ctx: StepContext, cache: SegmentCache) -> dict[str, dict[str, Any]]:
        """What the layers of each type take beside hidden states and mask."""
        shared: dict[str, Any] = {self._cache_argument: cache}
        if self._takes_positions:
            shared["position_ids"] = ctx.positions
        if self._takes_use_cache:
            shared["use_cache"] = True
        rotary = ctx.position_embeddings
        if self._by_type:
            return {kind: shared | {"position_embeddings": one} for kind, one in rotary.items()}
        if self._rotary is not None:
            shared["position_embeddings"] = rotary
        return dict.fromkeys(ctx.masks, shared)

    def fill_layers(
        self, hidden: Tensor, first: int, last: int, ctx: StepContext, cache: SegmentCache
    ) -> None:
        """Gives layers first..last-1 keys and values computed from one hidden state ``[R, q, d]``.

        For the layers that an early-exiting token skips in the "propagate" mode (CALM,
        arXiv:2207.07061). Each layer stops once it has written them: attention, output projection
        and MLP are not run.
        """
        cache.begin(ctx, first, last, write_only=True)
        arguments = self._layer_arguments(ctx, cache)
        try:
            for layer, kind in self._steps[first:last]:
                with contextlib.suppress(KeysWritten):
                    layer(hidden, attention_mask=ctx.masks[kind], **arguments[kind])
        finally:
            cache.end_write_only()

    def multi_step(self, reader: Any) -> Any:
        """An object that decodes several tokens of one sequence in one call, or None.

        Transformers' modules have none; see `FusedBackbone.multi_step` for one.

        Args:
            reader: of the exits, or None.
        """
        return None

    def take_discarded(self, cache: SegmentCache, *, final: bool = False) -> list[Any]:
        """Passes over a cache that were launched speculatively and then discarded: none here; see
        `deliberate.executors.fused.cuda.backbone.CudaFusedBackbone`."""
        return []

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm, head and softcapping: ``[..., d]`` -> ``[..., V]``."""
        return self.head_logits(self.norm(hidden))

    def read_full_depth(self, hidden: Tensor) -> HeadOutput:
        """The full-depth model's predictions from states ``[R, d]`` after the last layer."""
        return HeadOutput(self.logits(hidden))

    def head_logits(self, normed: Tensor, rows: Tensor | None = None) -> Tensor:
        """Head, scaling and softcapping of normed states: ``[..., d]`` -> ``[..., V]``, or of
        the tokens `rows` alone."""
        logits = self.lm_head(normed) if rows is None else times_rows(self.lm_head, normed, rows)
        if self._logit_scale is not None:
            logits = logits * self._logit_scale
        if self._logit_divisor is not None:
            logits = logits / self._logit_divisor
        return self.softcap(logits)

    def softcap(self, logits: Tensor) -> Tensor:
        """The architecture's cap on its logits (Gemma-2), the identity elsewhere."""
        if self._softcap is None:
            return logits
        return torch.tanh(logits / self._softcap) * self._softcap


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


def check_block_storage(storage: KVStorage | str) -> None:
    """Raises `DeliberateError` for keys and values in 8 bits, which most executors have no blocks
    of."""
    if as_kv_storage(storage) is not KVStorage.NATIVE:
        raise DeliberateError(
            f"storage={str(storage)!r} of a cache in blocks: the C++ kernels alone (float32 on a "
            "CPU) read one; leave storage out"
        )
