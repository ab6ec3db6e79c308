"""`generate` with transformers' conventions around the decode loop."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from deliberate.config import Fidelity
from deliberate.decoding import DecodeLoop
from deliberate.errors import DeliberateError
from deliberate.trace import GenerationTrace

if TYPE_CHECKING:
    from deliberate.model import AdaptiveModel

# transformers' own default where neither a length nor a configuration says otherwise
DEFAULT_NEW_TOKENS = 20

# Settings that change the output of a greedy search, with the value that leaves it alone.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0, 0.0),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "repetition_penalty": (1, 1.0),
    "encoder_repetition_penalty": (1, 1.0),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1, 1.0),
    "watermarking_config": (),
    "stop_strings": (),
    "max_time": (),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}


@dataclass
class AdaptiveGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output with the trace of the generation.

    Attributes:
        sequences: prompt and generated ids, ``[1, n + new]``.
        trace: where each token was chosen and what was run for it.
    """

    trace: GenerationTrace | None = None


@torch.inference_mode()
def generate(
    model: AdaptiveModel,
    inputs: Tensor | None = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer: Any = None,
    fidelity: Fidelity | str | None = None,
    thresholds: float | tuple[float, ...] | None = None,
    return_dict_in_generate: bool | None = None,
    **kwargs: Any,
) -> Tensor | AdaptiveGenerateOutput:
    """Greedy generation for one prompt, leaving early where the exits allow it.

    Args:
        inputs, input_ids: prompt ids ``[1, n]``, one of the two.
        attention_mask: ``[1, n]``; zeros may only pad on the left.
        generation_config, **kwargs: as in transformers: max_new_tokens, max_length, eos_token_id.
            What this release cannot do (sampling, beams, penalties, ...) is refused by name.
        logits_processor: must be empty.
        stopping_criteria: called on every prefix of the output that stands.
        streamer: gets the prompt, then tokens as they stand (exact mode: once verified).
        fidelity: ``dense``, ``exact`` or ``threshold``; the model's own by default.
        thresholds: least confidence to leave, one or one per exit; the model's own by default.
        return_dict_in_generate: return `AdaptiveGenerateOutput` with the trace.

    Returns:
        Ids ``[1, n + new]``, prompt included.

    Raises:
        DeliberateError: an empty or too long prompt, a batch, an unsupported setting.
    """
    ids = _prompt(inputs, input_ids)
    settings = _settings(model, generation_config, kwargs)
    if return_dict_in_generate is None:
        return_dict_in_generate = bool(settings.return_dict_in_generate)
    if logits_processor:
        raise DeliberateError("logits_processor is not supported yet: decoding is plain greedy")
    kept = _unpadded(ids, attention_mask).to(model.device)
    limit = _new_token_limit(settings, kept.shape[1], model.backbone.max_positions)
    loop = start_loop(
        model, fidelity, thresholds, max_new_tokens=limit, end_tokens=_end_tokens(settings)
    )
    if streamer is not None:
        streamer.put(ids.cpu())
    made: list[int] = []
    for fresh in loop.run(kept):
        count = _first_stop(ids, made, fresh, stopping_criteria)
        made += fresh if count is None else fresh[:count]
        if streamer is not None:
            for token in fresh if count is None else fresh[:count]:
                streamer.put(torch.tensor([token]))
        if count is not None:
            loop.stop_at(len(made))
            break
    if streamer is not None:
        streamer.end()
    sequences = torch.cat((ids.to(model.device), torch.tensor([made], device=model.device)), dim=1)
    if not return_dict_in_generate:
        return sequences
    return AdaptiveGenerateOutput(sequences=sequences, trace=loop.trace)  # type: ignore[arg-type]


def start_loop(
    model: AdaptiveModel,
    fidelity: Fidelity | str | None,
    thresholds: float | tuple[float, ...] | None,
    *,
    max_new_tokens: int,
    end_tokens: Collection[int],
) -> DecodeLoop:
    """A decode loop over `model`; its own fidelity and thresholds where None is given.

    Raises:
        DeliberateError: an unknown fidelity or an impossible threshold.
    """
    from deliberate.model import as_fidelity

    chosen = model.fidelity if fidelity is None else as_fidelity(fidelity)
    exits = model.exit_config
    if thresholds is not None:
        exits = exits.with_thresholds(thresholds)
    return DecodeLoop(
        model.backbone,
        None if chosen is Fidelity.DENSE else model.reader(),
        exits=exits.layers,
        thresholds=exits.thresholds,
        fidelity=chosen,
        max_pending=exits.max_pending,
        max_new_tokens=max_new_tokens,
        end_tokens=end_tokens,
    )


def within_context(limit: int, prompt: int, context: int | None) -> int:
    """At most `limit` new tokens, fewer where the context ends; an error where none would fit."""
    if context is None:
        return limit
    if prompt >= context:
        raise DeliberateError(
            f"the prompt has {prompt} tokens but the model's context is {context}: shorten it"
        )
    return min(limit, context - prompt)


def _prompt(inputs: Tensor | None, input_ids: Tensor | None) -> Tensor:
    if (inputs is None) == (input_ids is None):
        raise DeliberateError("give the prompt as `inputs` or as `input_ids`, one of the two")
    ids = inputs if input_ids is None else input_ids
    assert ids is not None
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise DeliberateError(
            f"prompt ids have shape {list(ids.shape)} and dtype {ids.dtype}: [1, n] of int64 is "
            "needed"
        )
    if ids.shape[0] != 1:
        raise DeliberateError(
            f"a batch of {ids.shape[0]} prompts: this release decodes one prompt at a time"
        )
    if ids.shape[1] == 0:
        raise DeliberateError("the prompt is empty: give at least one token")
    return ids


def _unpadded(ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return ids
    if attention_mask.shape != ids.shape:
        raise DeliberateError(
            f"attention_mask has shape {list(attention_mask.shape)}, the prompt {list(ids.shape)}"
        )
    padding = int((attention_mask[0] == 0).sum())
    if padding and not bool((attention_mask[0, :padding] == 0).all()):
        raise DeliberateError("attention_mask has zeros after the first token: pad on the left")
    if padding == ids.shape[1]:
        raise DeliberateError("the prompt is empty: attention_mask is 0 everywhere")
    return ids[:, padding:]


def _settings(
    model: AdaptiveModel, given: GenerationConfig | None, kwargs: dict[str, Any]
) -> GenerationConfig:
    base = model.base.generation_config if given is None else given
    settings = copy.deepcopy(base) if base is not None else GenerationConfig()
    try:
        unused = settings.update(**kwargs)
    except ValueError as error:
        raise DeliberateError(str(error).splitlines()[0]) from None
    unused.pop("use_cache", None)
    if unused:
        raise DeliberateError(f"generate does not know the argument {sorted(unused)[0]!r}")
    for name, neutral in _NEUTRAL.items():
        value = getattr(settings, name, None)
        if value is not None and value not in neutral and value != []:
            raise DeliberateError(
                f"{name}={value!r} is not supported yet: decoding is plain greedy"
            )
    return settings


def _new_token_limit(settings: GenerationConfig, prompt: int, context: int | None) -> int:
    """Most tokens to generate: what was asked for, within the model's context."""
    if settings.max_new_tokens is not None:
        limit = settings.max_new_tokens  # at least 1: GenerationConfig has checked it
    elif settings.max_length is not None and settings.max_length != DEFAULT_NEW_TOKENS:
        limit = settings.max_length - prompt
        if limit < 1:
            raise DeliberateError(
                f"max_length={settings.max_length} leaves no room after a prompt of {prompt} tokens"
            )
    else:
        limit = DEFAULT_NEW_TOKENS
    return within_context(limit, prompt, context)


def _end_tokens(settings: GenerationConfig) -> tuple[int, ...]:
    end = settings.eos_token_id
    if end is None:
        return ()
    return tuple(end) if isinstance(end, list | tuple) else (int(end),)


def _first_stop(
    ids: Tensor, made: list[int], fresh: list[int], criteria: StoppingCriteriaList | None
) -> int | None:
    """How many of `fresh` are in the output when a criterion holds, or None where none does."""
    if not criteria:
        return None
    criteria = StoppingCriteriaList(criteria)
    for count in range(1, len(fresh) + 1):
        so_far = torch.tensor([made + fresh[:count]], dtype=ids.dtype, device=ids.device)
        if bool(criteria(torch.cat((ids, so_far), dim=1), None).all()):  # type: ignore[arg-type]
            return count
    return None
