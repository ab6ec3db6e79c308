"""Keys and values to and from transformers' own caches, so that a generation can be continued.

transformers pads a batch on the left and counts slots from there; this package counts a row's slots
from its own first token.

Each class of cache layer keeps its tokens in a place of its own: a growing layer holds them all, a
growing window the last ones, a static layer its first slots, and so does a static window until it
is full. `held_states` is the only place that knows this. A class that is not known here is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from deliberate.cache.attention_metadata import SLIDING
from deliberate.cache.kv_cache import SegmentCache
from deliberate.config import KVStorage
from deliberate.engine.decode_loop import DecodeLoop
from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError

# The most derived first: the class of a layer is the first of these that it is an instance of.
_LAYERS = (DynamicSlidingWindowLayer, DynamicLayer, StaticSlidingWindowLayer, StaticLayer)
# A subclass that defines one of these anew keeps its tokens in a way that is not known here.
_LAYER_METHODS = ("update", "get_seq_length", "get_mask_sizes", "lazy_initialization")
_CACHE_METHODS = ("update", "get_seq_length", "get_mask_sizes", "get_query_offset")


def from_transformers(
    cache: object,
    backbone: Backbone,
    prompt_lengths: Sequence[int],
    max_new_tokens: int,
    *,
    width: int | None = None,
    hand_over: bool = True,
    storage: KVStorage = KVStorage.NATIVE,
) -> SegmentCache | None:
    """What a caller's cache holds of the beginning of each prompt, or None where it is empty.

    Args:
        prompt_lengths: tokens of each prompt, padding not counted.
        width: slots of the padded prompts; the longest prompt where nothing is padded.
        hand_over: the output will be written to the cache, so that it must have room.
        storage: in which form the result keeps them.

    Raises:
        DeliberateError: a class of cache that is not known, a cache of another model or batch, one
            that is too small, or one that covers the whole prompt, so that nothing is left to run.
    """
    if cache is None:
        return None
    if not isinstance(cache, Cache):
        raise DeliberateError(
            f"past_key_values is a {type(cache).__name__}: give a DynamicCache or a StaticCache"
        )
    _check_class(cache)
    held = int(cache.get_seq_length()) if len(cache.layers) else 0
    if held == 0 and not hand_over:
        return None
    width = max(prompt_lengths) if width is None else width
    if held >= width:
        raise DeliberateError(
            f"past_key_values holds {held} tokens and the prompt has {width}: the prompt must "
            "contain what the cache holds and at least one token more"
        )
    _check_room(cache, backbone, width + max_new_tokens - 1, f"a prompt of {width} tokens")
    if held == 0 or _outgrown(backbone, held, max(prompt_lengths)):
        return None
    if len(cache.layers) != backbone.num_layers:
        raise DeliberateError(
            f"past_key_values has {len(cache.layers)} layers, the model {backbone.num_layers}: "
            "give a cache of this model"
        )
    make = backbone.cache_maker(storage)
    ours = make(max(prompt_lengths) + min(max_new_tokens, 512), len(prompt_lengths))
    for layer, source in enumerate(cache.layers):
        keys, values = held_states(source, held)
        _check_states(backbone, layer, source, keys, held, len(prompt_lengths))
        keys, values = (_in_dtype(part, backbone) for part in (keys, values))
        for row, length in enumerate(prompt_lengths):
            # Of the row itself, behind its padding; a row may begin after what the cache holds.
            own = min(keys.shape[2], held - (width - length))
            if own < 1:
                continue
            end = held - (width - length)
            ours.adopt(layer, row, end - own, keys[row, :, -own:], values[row, :, -own:])
    return ours


def held_states(layer: Any, held: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, kv_heads, n, head_dim]`` of the last n tokens that a layer holds.

    Args:
        layer: of a transformers cache that has been given `held` tokens.
    """
    keys, values = layer.keys, layer.values
    if isinstance(layer, StaticLayer):
        # A static window is filled from the left, and rolled once it is full.
        filled = min(held, layer.max_cache_len)
        keys, values = keys[:, :, :filled], values[:, :, :filled]
    device = getattr(layer, "device", keys.device)  # offloaded layers are elsewhere
    return keys.to(device), values.to(device)


def _check_class(cache: Cache) -> None:
    """Raises DeliberateError for a class whose layout is not known."""
    name = type(cache).__name__
    if any(getattr(type(cache), m, None) is not getattr(Cache, m, None) for m in _CACHE_METHODS):
        raise DeliberateError(
            f"past_key_values is a {name}, which counts or keeps its tokens in its own way: give a "
            "DynamicCache or a StaticCache"
        )
    kinds = {type(layer): layer for layer in cache.layers}
    for kind in kinds:
        known = next((one for one in _LAYERS if issubclass(kind, one)), None)
        if known is None or any(
            getattr(kind, method) is not getattr(known, method) for method in _LAYER_METHODS
        ):
            raise DeliberateError(
                f"past_key_values is a {name} with layers of class {kind.__name__}, which are not "
                "supported: give a DynamicCache or a StaticCache"
            )


def _check_room(cache: Cache, backbone: Backbone, total: int, prompt: str) -> None:
    """Raises DeliberateError where a layer would drop tokens that are attended to."""
    for layer, source in enumerate(cache.layers[: backbone.num_layers]):
        room = getattr(source, "max_cache_len", None) or getattr(source, "sliding_window", None)
        needed = total
        if backbone.window is not None and backbone.layer_types[layer] == SLIDING:
            needed = min(total, backbone.window)
        if room is not None and room < needed:
            raise DeliberateError(
                f"past_key_values keeps {room} tokens in layer {layer}, {needed} are needed for "
                f"{prompt} and the longest answer: give a larger cache or a smaller max_new_tokens"
            )


def _check_states(
    backbone: Backbone, layer: int, source: Any, keys: Tensor, held: int, batch: int
) -> None:
    """Raises DeliberateError where a layer cannot be the beginning of this model's prompts."""
    if int(source.get_seq_length()) != held:
        raise DeliberateError(
            f"past_key_values holds {held} tokens in layer 0 and {int(source.get_seq_length())} in "
            f"layer {layer}: give a cache that every layer has filled"
        )
    config = backbone.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = (keys.shape[0], keys.shape[1], keys.shape[3])
    if found != (batch, heads, size):
        raise DeliberateError(
            f"past_key_values holds (rows, heads, head size) {found} in layer {layer}, the prompts "
            f"and the model need {(batch, heads, size)}: give a cache of this model and batch"
        )
    # A window needs the tokens before the next one, itself not counted.
    sliding = backbone.window is not None and backbone.layer_types[layer] == SLIDING
    needed = min(held, (backbone.window or 1) - 1) if sliding else held
    if keys.shape[2] < needed:
        raise DeliberateError(
            f"past_key_values keeps {keys.shape[2]} of {held} tokens in layer {layer}, the "
            f"model looks at {needed}: give a cache made for this model"
        )


def _in_dtype(states: Tensor, backbone: Backbone) -> Tensor:
    """Cached states in the model's dtype, promoted as transformers does; never narrowed."""
    dtype = backbone.model.dtype
    if states.dtype == dtype or torch.is_autocast_enabled(states.device.type):
        return states
    if torch.promote_types(states.dtype, dtype) != dtype:
        raise DeliberateError(
            f"past_key_values holds {states.dtype} and the model is {dtype}: give a cache of the "
            "model's dtype"
        )
    return states.to(dtype)


def _outgrown(backbone: Backbone, held: int, tokens: int) -> bool:
    """Whether cached tokens are computed anew, with other frequencies, for a longer sequence."""
    switch = backbone.rope_switch
    return switch is not None and held <= switch < tokens


def to_transformers(loop: DecodeLoop, cache: Cache, prompt_width: int) -> None:
    """Gives the caller's cache the keys and values of every token but the last.

    Rows are aligned as transformers would have left them: padding before the prompt and behind a
    finished row holds zeros, which no token attends to.
    """
    loop.catch_up()
    held = int(cache.get_seq_length())
    made = max(len(sequence.records) for sequence in loop.sequences)
    fed = max(one.prompt_tokens + len(one.records) - 1 for one in loop.sequences)
    if _outgrown(loop.backbone, held, fed):
        cache.reset()
        held = 0
    total = prompt_width + made - 1
    for layer in range(loop.backbone.num_layers):
        keys, values = loop.cache.states(layer)
        shape = (len(loop.sequences), keys.shape[1], total, keys.shape[3])
        padded = keys.new_zeros(shape), values.new_zeros((*shape[:3], values.shape[3]))
        for sequence in loop.sequences:
            offset = prompt_width - sequence.prompt_tokens
            # The last token of the output was never fed; a stop may have dropped more.
            fed = sequence.prompt_tokens + len(sequence.records) - 1
            own = min(fed, loop.cache.length(layer, sequence.row))
            for target, source in zip(padded, (keys, values), strict=True):
                target[sequence.index, :, offset : offset + own] = source[sequence.row, :, :own]
        # Ordinary tensors, unless the caller filled the cache in inference mode.
        held_keys = getattr(cache.layers[layer], "keys", None) if held else None
        inference = held_keys is not None and held_keys.is_inference()
        with torch.inference_mode(inference), torch.no_grad():
            fresh_keys, fresh_values = (part[:, :, held:].clone() for part in padded)
            cache.update(fresh_keys, fresh_values, layer)
