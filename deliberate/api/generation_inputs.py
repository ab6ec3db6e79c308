"""transformers' conventions around a generation: what a prompt and its settings may be."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from deliberate.engine.sampler import TokenChooser
from deliberate.trace import GenerationTrace
from deliberate.utils.errors import DeliberateError

# transformers' own default where neither a length nor a configuration says otherwise
DEFAULT_NEW_TOKENS = 20


def within_context(limit: int, prompt: int, context: int | None) -> int:
    """At most `limit` new tokens, fewer where the context ends.

    Args:
        prompt: its tokens.
        context: positions that there are; None for rotary models, which go on.

    Raises:
        DeliberateError: no new token is allowed or none would fit.
    """
    if limit < 1:
        raise DeliberateError(
            f"the length limit leaves {limit} new tokens after a prompt of {prompt}: it must "
            "leave at least 1"
        )
    if context is None:
        return limit
    if prompt >= context:
        raise DeliberateError(
            f"the prompt has {prompt} tokens but the model's context is {context}: shorten it"
        )
    return min(limit, context - prompt)


def warn_of_context(
    traces: Sequence[GenerationTrace], requested: int, positions: int | None
) -> None:
    """Says where an answer ended with the positions, or went on past them as in transformers.

    Args:
        requested: the limit of new tokens before it was cut to what there is room for.
        positions: that the model was made for.
    """
    longest = max(traces, key=lambda trace: trace.prompt_tokens + len(trace.records))
    tokens, made = longest.prompt_tokens + len(longest.records), len(longest.records)
    if positions is None or tokens < positions:
        return
    if tokens > positions:
        warnings.warn(
            f"prompt and answer are too long for a model that was made for {positions} positions: "
            "decoding went on, as in transformers, and the text may be worse",
            stacklevel=2,
        )
    elif made < requested and longest.finish == "length":
        warnings.warn(
            f"the answer ended after {made} of max_new_tokens={requested}: the model has "
            f"{positions} positions, {longest.prompt_tokens} of them for the prompt",
            stacklevel=2,
        )


def as_mask(attention_mask: Any, ids: Tensor) -> Tensor:
    """A mask of 0 and 1, int64, of the shape of the prompts ``[B, n]``.

    Raises:
        DeliberateError: not a tensor, another shape, or other values.
    """
    if not isinstance(attention_mask, Tensor):
        raise DeliberateError(
            f"attention_mask is a {type(attention_mask).__name__}: a tensor of shape "
            f"{list(ids.shape)} is needed, 1 for real tokens and 0 for padding"
        )
    if attention_mask.shape != ids.shape:
        raise DeliberateError(
            f"attention_mask has shape {list(attention_mask.shape)}, the prompt {list(ids.shape)}"
        )
    other = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
    if other.numel():
        raise DeliberateError(
            f"attention_mask holds {other[0].item()}: give 1 for real tokens and 0 for padding"
        )
    return attention_mask.to(torch.int64)


def check_positions(position_ids: Any, mask: Tensor | None, ids: Tensor) -> None:
    """Refuses positions that are not 0, 1, 2, ... from each prompt's first real token.

    Args:
        position_ids: ``[n]``, ``[1, n]`` or ``[B, n]``; values at padding do not matter.
        mask: int64 ``[B, n]``; None where nothing is padded.
        ids: ``[B, n]``.

    Raises:
        DeliberateError: other positions, which the decode loop cannot follow.
    """
    if position_ids is None:
        return
    every = torch.ones_like(ids) if mask is None else mask.to(ids.device)
    expected = every.cumsum(-1) - 1
    fits = isinstance(position_ids, Tensor) and position_ids.shape[-1:] == ids.shape[-1:]
    fits = fits and position_ids.dim() <= 2 and position_ids.shape[:-1] in ((), (1,), ids.shape[:1])
    if not fits or bool(((position_ids.to(ids.device) != expected) & (every == 1)).any()):
        raise DeliberateError(
            "position_ids are not 0, 1, 2, ... from the first real token of each prompt "
            f"(shape {list(ids.shape)}): other positions are not supported, leave them out"
        )


def unpadded(ids: Tensor, attention_mask: Tensor | None, pad: int | None = None) -> list[Tensor]:
    """The prompts ``[n_i]`` of a left-padded batch ``[B, n]``.

    Args:
        pad: the pad token, from which transformers infers a mask where none is given.

    Raises:
        DeliberateError: a mask of another shape, padding on the right, or an empty prompt.
    """
    if attention_mask is None:
        return list(ids)
    prompts = []
    masks = as_mask(attention_mask, ids).tolist()
    for row, (own, mask) in enumerate(zip(ids, masks, strict=True)):
        padding = len(mask) - sum(mask)
        if padding == len(mask):
            raise DeliberateError(
                f"the prompt is empty: attention_mask is 0 everywhere in row {row}"
            )
        if any(mask[:padding]):
            hole = mask.index(0, mask.index(1))
            if pad is not None and int(own[hole]) == pad:
                raise DeliberateError(
                    f"prompt {row} holds pad token {pad} at position {hole}, behind its first real "
                    "token: pad on the left, or give attention_mask=torch.ones_like(input_ids) if "
                    "it is text"
                )
            raise DeliberateError(
                f"attention_mask of prompt {row} has zeros after the first token: pad on the left"
            )
        prompts.append(own[padding:])
    return prompts


def take_stop_strings(kwargs: dict[str, Any]) -> None:
    """Turns `stop_strings` into a criterion, which needs the tokenizer that transformers drops."""
    tokenizer = kwargs.pop("tokenizer", None)
    config = kwargs.get("generation_config")
    strings = kwargs.pop("stop_strings", None) or getattr(config, "stop_strings", None)
    if not strings:
        return
    if tokenizer is None:
        raise DeliberateError(f"stop_strings={strings!r} need the tokenizer: pass tokenizer=...")
    if config is not None:
        kwargs["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    own = StopStringCriteria(tokenizer, strings)
    kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), own]


def check_prompt(
    inputs: Tensor | None, kwargs: dict[str, Any], context: int | None, defaults: GenerationConfig
) -> None:
    """Checks what transformers would fail on, and makes the attention mask one of 0 and 1.

    Padding, positions and the room for new tokens are checked once transformers has prepared the
    generation.

    Args:
        context: positions that there are; None for rotary models, which go on.
        defaults: of the model, for the pad token.

    Raises:
        DeliberateError: no prompt or two, an empty or too long one, ids of another shape or dtype,
            or an impossible mask.
    """
    given = kwargs.get("input_ids")
    if (inputs is None) == (given is None):
        raise DeliberateError("give the prompt as `inputs` or as `input_ids`, one of the two")
    ids = given if inputs is None else inputs
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        shape = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        dtype = ids.dtype if isinstance(ids, Tensor) else "-"
        raise DeliberateError(
            f"prompt ids have shape {shape} and dtype {dtype}: [B, n] of int64 is needed"
        )
    if ids.shape[0] == 0 or ids.shape[1] == 0:
        raise DeliberateError("the prompt is empty: give at least one token")
    mask = kwargs.get("attention_mask")
    if mask is not None:
        mask = kwargs["attention_mask"] = as_mask(mask, ids)
    if context is None or ids.shape[1] < context:
        return
    if mask is not None:
        within_context(1, int(mask.sum(-1).max()), context)
        return
    given = (kwargs.get("pad_token_id"), kwargs.get("generation_config"), defaults)
    pads = [one if isinstance(one, int) else getattr(one, "pad_token_id", None) for one in given]
    pad = next((one for one in pads if one is not None), None)
    if pad is None or not bool((ids == pad).any()):  # else transformers infers a mask from them
        within_context(1, ids.shape[1], context)


def token_chooser(
    processors: LogitsProcessorList | None,
    config: GenerationConfig,
    seed: int | None,
    batch: int,
    pad: int,
    together: bool = False,
) -> TokenChooser:
    sample = bool(config.do_sample)
    if seed is None:
        # As in transformers, torch.manual_seed governs what is drawn.
        seed = int(torch.randint(2**62, ())) if sample else 0
    return TokenChooser(
        processors or (), sample=sample, seed=seed, batch=batch, pad=pad, together=together
    )


def pad_token(config: GenerationConfig, ends: Sequence[int]) -> int:
    pad = config.pad_token_id
    if pad is not None:
        return int(pad)
    return ends[0] if ends else 0


def own_criteria(
    criteria: StoppingCriteriaList | None, config: GenerationConfig, ends: Sequence[int]
) -> list[Any]:
    """Criteria that the loop does not check by itself."""

    def held(criterion: Any) -> bool:
        if isinstance(criterion, MaxLengthCriteria):
            return config.max_length is not None and criterion.max_length >= config.max_length
        if isinstance(criterion, EosTokenCriteria):
            return set(criterion.eos_token_id.reshape(-1).tolist()) <= set(ends)
        return False

    return [criterion for criterion in criteria or () if not held(criterion)]
