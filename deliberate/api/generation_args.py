"""What becomes of every argument of transformers' `generate` and every field of `GenerationConfig`.

Each is obeyed, refused by name, or irrelevant for a stated reason; nothing is silently ignored. A
test compares the tables with the installed version of transformers, and a name that is new there is
refused at run time until it is entered here. The tables may hold names that a version lacks.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import transformers
from torch import Tensor
from transformers import GenerationConfig

from deliberate.utils.errors import DeliberateError


class Fate(StrEnum):
    """What becomes of a setting."""

    OBEYED = "obeyed"
    REFUSED = "refused"
    IRRELEVANT = "irrelevant"


@dataclass(frozen=True)
class Rule:
    """The fate of one setting.

    Attributes:
        fate: refused settings raise unless their value is None or one of `allowed`.
        reason: why it is refused or irrelevant, or what obeys it.
        allowed: values that are taken; None: all of an obeyed or irrelevant setting, none of a
            refused one.

    Raises:
        DeliberateError: there is no reason for what is not obeyed.
    """

    fate: Fate
    reason: str = ""
    allowed: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        if self.fate is not Fate.OBEYED and not self.reason:
            raise DeliberateError(f"a setting that is {self.fate} needs a reason")

    def takes(self, value: Any) -> bool:
        """Whether a value may be given."""
        if value is None or (isinstance(value, list | tuple | dict) and not value):
            return True
        if self.allowed is None:
            return self.fate is not Fate.REFUSED
        return isinstance(value, bool | int | float | str) and value in self.allowed


def _all(fate: Fate, reason: str, *names: str) -> dict[str, Rule]:
    return {name: Rule(fate, reason) for name in names}


def _refused(name: str, reason: str, *neutral: Any) -> dict[str, Rule]:
    return {name: Rule(Fate.REFUSED, reason, neutral)}


_OTHER_WAY = "adaptive depth decodes greedily or by sampling"
_ASSISTED = "the exits draft here; there is no assistant and no lookup"
_FULL_PRECISION = "keys and values stay on the device, in the model's dtype, while decoding"
_NOT_KEPT = "the layers above an exit may not have run when a token is chosen"
_BEAMS = "only beams and contrastive search use it, which are refused"
_ASSISTANTS = "only assisted decoding uses it, which is refused"
_PROCESSOR = "by transformers' logits processor, at exits and at full depth"

# Fields of `GenerationConfig`, also as keyword arguments of `generate`.
FIELDS: dict[str, Rule] = {
    **_all(
        Fate.OBEYED,
        "by the decode loop",
        *("max_length", "max_new_tokens", "eos_token_id", "pad_token_id", "do_sample"),
        *("num_return_sequences", "return_dict_in_generate", "output_scores"),
    ),
    **_all(Fate.OBEYED, "by transformers' stopping criterion", "max_time", "stop_strings"),
    **_all(
        Fate.OBEYED,
        _PROCESSOR,
        *("min_length", "min_new_tokens", "temperature", "top_k", "top_p", "min_p", "top_h"),
        *("typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty"),
        *("encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        *("bad_words_ids", "renormalize_logits", "forced_bos_token_id", "forced_eos_token_id"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
        *("begin_suppress_tokens", "sequence_bias", "watermarking_config"),
    ),
    "cache_implementation": Rule(
        Fate.OBEYED,
        f"{_FULL_PRECISION}; use 'dynamic' or 'static'",
        ("dynamic", "static", "hybrid", "hybrid_chunked", "sliding_window"),
    ),
    **_all(Fate.OBEYED, "by the cache that transformers prepares", "max_cache_len"),
    **_refused("num_beams", _OTHER_WAY, 1),
    **_refused("num_beam_groups", _OTHER_WAY, 1),
    **_refused("penalty_alpha", _OTHER_WAY, 0),
    **_refused("dola_layers", _OTHER_WAY),
    **_refused("constraints", _OTHER_WAY),
    **_refused("force_words_ids", _OTHER_WAY),
    **_refused("guidance_scale", _OTHER_WAY, 1),
    **_refused("token_healing", _OTHER_WAY, False),
    **_refused("low_memory", _OTHER_WAY, False),
    **_refused("use_mtp", _ASSISTED, False),
    **_refused("prompt_lookup_num_tokens", _ASSISTED),
    **_refused("assistant_early_exit", _ASSISTED),
    **_refused("assistant_ensemble_weight", _ASSISTED),
    **_refused("speculation_type", _ASSISTED),
    **_refused("is_assistant", "this model cannot be another's assistant", False),
    **_refused("output_attentions", _NOT_KEPT, False),
    **_refused("output_hidden_states", _NOT_KEPT, False),
    **_refused("output_logits", "scores are kept after the processors: use output_scores", False),
    **_refused("cache_config", _FULL_PRECISION),
    **_refused("compile_config", "transformers' compiled forward is not used: see executor="),
    **_refused("prefill_chunk_size", "the prompt runs in one pass"),
    **_refused("continuous_batching_config", "the decode loop schedules its own batch"),
    **_all(
        Fate.IRRELEVANT,
        _BEAMS,
        *("early_stopping", "length_penalty", "diversity_penalty"),
    ),
    **_all(
        Fate.IRRELEVANT,
        _ASSISTANTS,
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "max_matching_ngram_size"),
        *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
    ),
    **_all(
        Fate.IRRELEVANT, "the loop always keeps keys and values; tokens are the same", "use_cache"
    ),
    **_all(Fate.IRRELEVANT, "transformers' forward is never compiled here", "disable_compile"),
    **_all(Fate.IRRELEVANT, "it starts a generation without a prompt", "bos_token_id"),
    **_all(Fate.IRRELEVANT, "it belongs to encoder-decoder models", "decoder_start_token_id"),
    **_all(Fate.IRRELEVANT, "it says who wrote the configuration", "transformers_version"),
}

# Arguments of `generate` itself, and those that it takes out of its keyword arguments.
ARGUMENTS: dict[str, Rule] = {
    **_all(Fate.OBEYED, "the prompt", "inputs", "input_ids"),
    **_all(
        Fate.OBEYED,
        "as in transformers",
        *("generation_config", "logits_processor", "stopping_criteria", "streamer"),
        *("prefix_allowed_tokens_fn", "tokenizer"),
    ),
    **_refused("synced_gpus", "ranks would run different numbers of passes", False),
    **_refused("assistant_model", _ASSISTED),
    **_refused("assistant_tokenizer", _ASSISTED),
    **_refused("negative_prompt_ids", "guidance by a negative prompt is another way of decoding"),
    **_refused(
        "negative_prompt_attention_mask", "guidance by a negative prompt is another way of decoding"
    ),
    **_refused(
        "custom_generate", "this generate is one itself; give AdaptiveDecoding to the base model"
    ),
    **_all(Fate.IRRELEVANT, "no code is loaded from a repository", "trust_remote_code"),
}

# Renamed settings of `generate`: the old name and the new one.
RENAMED = {"price": "lambda_", "pacer": "exit_policy"}

# What transformers hands on to the model's forward.
MODEL_INPUTS: dict[str, Rule] = {
    **_all(Fate.OBEYED, "left padding is taken off", "attention_mask"),
    **_all(Fate.OBEYED, "refused unless they follow from attention_mask", "position_ids"),
    **_all(Fate.OBEYED, "read at the start and filled at the end", "past_key_values"),
    **_all(Fate.IRRELEVANT, "the loop always keeps keys and values", "use_cache"),
    **_all(Fate.IRRELEVANT, "only the last logits of the prompt are computed", "logits_to_keep"),
    **_all(Fate.IRRELEVANT, "older versions derive it from the cache", "cache_position"),
    **_refused("inputs_embeds", "the executors embed token ids: give the prompt as input_ids"),
    **_refused("token_type_ids", "the decode loop has no token types"),
    **_refused("labels", "generate computes no loss: call the model itself"),
    **_refused("encoder_hidden_states", "cross-attention is not supported"),
    **_refused("encoder_attention_mask", "cross-attention is not supported"),
}


def check_arguments(given: Mapping[str, Any], own: Collection[str]) -> None:
    """Refuses keyword arguments of `generate` that are unknown or cannot be obeyed.

    Args:
        given: those that go to transformers.
        own: names of this package's settings, for the hint at a mistyped one.

    Raises:
        DeliberateError: names the argument, its value and why.
    """
    for old, new in RENAMED.items():
        if old in given:
            raise DeliberateError(f"{old}={_shown(given[old])} is now called {new}: use {new}=")
    for name, value in given.items():
        rule = ARGUMENTS.get(name) or MODEL_INPUTS.get(name) or FIELDS.get(name)
        if rule is None and value is not None:
            raise DeliberateError(_unknown(name, value, own))
        if rule is not None and not rule.takes(value):
            raise _refusal(name, value, rule)
    config = given.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise DeliberateError(
            f"generation_config={_shown(config)} is not a GenerationConfig: use "
            "GenerationConfig(max_new_tokens=100)"
        )
    healing = getattr(config, "token_healing", None)
    if "token_healing" not in given and not FIELDS["token_healing"].takes(healing):
        # All other fields are checked in the configuration that transformers makes of arguments,
        # this one and the defaults (`check_config`); with this one it does not get there.
        raise _refusal("token_healing", healing, FIELDS["token_healing"])
    _refuse_state(given)


def check_config(config: GenerationConfig) -> None:
    """Refuses fields of a whole configuration that cannot be obeyed.

    Entries that `GenerationConfig` has no field for are ignored, as transformers ignores them.

    Raises:
        DeliberateError: names the field, its value and why.
    """
    settings = vars(config)
    for name, rule in _RESTRICTED.items():
        if not rule.takes(settings.get(name)):
            raise _refusal(name, settings[name], rule)
    for name in _undecided():
        if settings.get(name) is not None:
            raise DeliberateError(_unknown(name, settings[name], ()))
    _refuse_state(settings)


def check_model_inputs(given: Mapping[str, Any]) -> None:
    """Refuses what transformers would hand to the model's forward and the loop cannot.

    Raises:
        DeliberateError: names the input.
    """
    for name, value in given.items():
        rule = MODEL_INPUTS.get(name) or FIELDS.get(name)
        if rule is None and value is not None:
            raise DeliberateError(_unknown(name, value, ()))
        if rule is not None and not rule.takes(value):
            raise _refusal(name, value, rule)


_RESTRICTED = {
    name: rule
    for name, rule in FIELDS.items()
    if rule.fate is Fate.REFUSED or rule.allowed is not None
}


@functools.cache
def _undecided() -> tuple[str, ...]:
    """Fields of the installed version that the tables here lack."""
    return tuple(name for name in vars(GenerationConfig()) if name not in FIELDS and name[0] != "_")


def _refuse_state(settings: Mapping[str, Any]) -> None:
    """A watermark that counts its calls would count rejected drafts."""
    value = settings.get("watermarking_config")
    if type(value).__name__ == "SynthIDTextWatermarkingConfig":
        raise DeliberateError(
            "watermarking_config=SynthIDTextWatermarkingConfig is not supported: it keeps state "
            "from token to token, and a rejected draft would change it; use WatermarkingConfig"
        )


def _refusal(name: str, value: Any, rule: Rule) -> DeliberateError:
    return DeliberateError(f"{name}={_shown(value)} is not supported: {rule.reason}")


def _unknown(name: str, value: Any, own: Collection[str]) -> str:
    if name in _undecided():
        return (
            f"{name}={_shown(value)} is new in transformers {transformers.__version__} and this "
            "version of deliberate does not know it: leave it out"
        )
    close = difflib.get_close_matches(name, [*own, *FIELDS, *ARGUMENTS, *MODEL_INPUTS], n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{name}={_shown(value)} is not an argument of generate, nor a model input{hint}"


def _shown(value: Any) -> str:
    """A value in an error of one line."""
    if isinstance(value, Tensor):
        return f"<tensor {list(value.shape)}>"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
