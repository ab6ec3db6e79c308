"""Every argument, model input and configuration field of transformers' `generate` has a fate."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, random_ids, tiny_model
from transformers import GenerationConfig, GenerationMixin, SynthIDTextWatermarkingConfig
from transformers.generation.configuration_utils import CompileConfig
from transformers.utils.generic import TransformersKwargs

from deliberate.api import generation_args
from deliberate.api.generation_args import ARGUMENTS, FIELDS, MODEL_INPUTS, RENAMED, Fate, Rule
from deliberate.api.model import AdaptiveModel
from deliberate.utils.errors import DeliberateError

NEW = 8
ENDS = list(range(5, 25))
INSTALLED = {name for name in vars(GenerationConfig()) if not name.startswith("_")}

# Values of refused settings; True where nothing else is said.
REFUSED_EXAMPLES: dict[str, Any] = {
    "num_beams": 4,
    "num_beam_groups": 2,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "constraints": [object()],
    "force_words_ids": [[3]],
    "guidance_scale": 2.0,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 2,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash",
    "cache_config": {"nbits": 4},
    "compile_config": CompileConfig(),
    "prefill_chunk_size": 2,
    "continuous_batching_config": object(),
    "cache_implementation": "paged",
    "assistant_model": object(),
    "assistant_tokenizer": object(),
    "custom_generate": "owner/name",
    "negative_prompt_ids": torch.ones(1, 3),
    "negative_prompt_attention_mask": torch.ones(1, 3),
    "inputs_embeds": torch.ones(1, 5, 32),
    "labels": torch.ones(1, 5),
}
# Values that change the greedy output or the scores, and whether transformers samples with them.
OBEYED_EXAMPLES: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 9},
    "max_new_tokens": {"max_new_tokens": 3},
    "eos_token_id": {"eos_token_id": ENDS},
    "pad_token_id": {"pad_token_id": 3, "eos_token_id": ENDS},
    "output_scores": {"output_scores": True, "return_dict_in_generate": True},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "max_time": {"max_time": 1e-6},
    "cache_implementation": {"cache_implementation": "static"},
    "max_cache_len": {"cache_implementation": "static", "max_cache_len": 40},
    "min_length": {"min_length": 12, "eos_token_id": list(range(60))},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": list(range(60))},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[28], [85, 82], [55]]},
    "renormalize_logits": {"renormalize_logits": True, "output_scores": True},
    "forced_bos_token_id": {"forced_bos_token_id": 7},
    "forced_eos_token_id": {"forced_eos_token_id": 11},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {
        "exponential_decay_length_penalty": (1, 3.0),
        "eos_token_id": 11,
    },
    "suppress_tokens": {"suppress_tokens": [28, 82, 85]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [28, 85, 58]},
    "sequence_bias": {"sequence_bias": [[[9], 20.0]]},
    "watermarking_config": {"watermarking_config": {"bias": 20.0, "seeding_scheme": "lefthash"}},
    "do_sample": {"do_sample": True},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "temperature": {"do_sample": True, "temperature": 0.5},
    "top_k": {"do_sample": True, "top_k": 3},
    "top_p": {"do_sample": True, "top_p": 0.4},
    "min_p": {"do_sample": True, "min_p": 0.3},
    "top_h": {"do_sample": True, "top_h": 0.5},
    "typical_p": {"do_sample": True, "typical_p": 0.3},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.03},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 0.03},
}
# Tested by name elsewhere: it needs a tokenizer.
OBEYED_ELSEWHERE = {"stop_strings"}
IRRELEVANT_EXAMPLES: dict[str, Any] = {
    "early_stopping": True,
    "length_penalty": 2.0,
    "diversity_penalty": 0.5,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "max_matching_ngram_size": 2,
    "assistant_confidence_threshold": 0.9,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "use_cache": False,
    "disable_compile": True,
    "bos_token_id": 5,
    "decoder_start_token_id": 5,
    "transformers_version": "5.0.0",
}


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=6), [1, 2, 4])


# -- the tables and the installed version ----------------------------------------------------------


def test_every_field_of_the_installed_generation_config_is_decided():
    assert INSTALLED - set(FIELDS) == set(), "enter the new fields in generation_args.FIELDS"


def test_every_argument_of_the_installed_generate_is_decided():
    known = set(ARGUMENTS) | {"self", "kwargs"}
    assert set(inspect.signature(GenerationMixin.generate).parameters) - known == set()
    # Taken out of the keyword arguments by its body.
    source = inspect.getsource(GenerationMixin._extract_generation_mode_kwargs)
    for name in ("tokenizer", "assistant_tokenizer"):
        assert f'"{name}"' in source and name in ARGUMENTS


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_input_of_a_supported_forward_is_decided(arch):
    inputs = set(inspect.signature(type(tiny_model(arch, layers=1)).forward).parameters)
    inputs -= {"self", "kwargs"}
    known = set(ARGUMENTS) | set(MODEL_INPUTS) | set(FIELDS)
    refused_as_unknown = {"output_router_logits"}
    assert inputs - known - refused_as_unknown == set()


def test_inputs_that_nobody_entered_are_refused(model):
    """What every transformers model accepts, such as packed lengths, reaches no forward here."""
    known = set(ARGUMENTS) | set(MODEL_INPUTS) | set(FIELDS)
    for name in set(TransformersKwargs.__optional_keys__) - known:
        with pytest.raises(DeliberateError, match=name):
            model.generate(random_ids(4), **{name: 1})


def test_a_field_that_is_new_in_transformers_is_refused_until_somebody_decides(model, monkeypatch):
    rules = {name: rule for name, rule in FIELDS.items() if name != "min_p"}
    monkeypatch.setattr(generation_args, "FIELDS", rules)
    generation_args._undecided.cache_clear()
    try:
        with pytest.raises(DeliberateError, match=r"min_p=0.1 is new in transformers"):
            model.generate(random_ids(4), do_sample=True, min_p=0.1)
        config = GenerationConfig(do_sample=True, min_p=0.1)
        with pytest.raises(DeliberateError, match=r"min_p=0.1 is new in transformers"):
            model.generate(random_ids(4), generation_config=config)
        model.generate(random_ids(4), max_new_tokens=1)
    finally:
        generation_args._undecided.cache_clear()


def test_an_entry_that_transformers_has_no_field_for_is_ignored_as_there(model):
    config = GenerationConfig(max_new_tokens=NEW, chat_format="chatml")
    ids = random_ids(5)
    expected = model.generate(ids, max_new_tokens=NEW)
    assert torch.equal(model.generate(ids, generation_config=config), expected)


def test_settings_that_are_not_obeyed_need_a_reason():
    with pytest.raises(DeliberateError, match="needs a reason"):
        Rule(Fate.REFUSED)
    for rules in (FIELDS, ARGUMENTS, MODEL_INPUTS):
        assert all(rule.reason for rule in rules.values())


# -- refused ---------------------------------------------------------------------------------------

REFUSED = sorted(
    name
    for rules in (FIELDS, ARGUMENTS, MODEL_INPUTS)
    for name, rule in rules.items()
    if rule.fate is Fate.REFUSED or name in REFUSED_EXAMPLES
)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_obeyed_is_refused_by_name(model, name):
    value = REFUSED_EXAMPLES.get(name, True)
    with pytest.raises(DeliberateError) as caught:
        model.generate(random_ids(5), **{name: value})
    assert str(caught.value).startswith(f"{name}=") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in REFUSED if name in FIELDS])
def test_what_cannot_be_obeyed_is_refused_in_a_generation_config_too(model, name):
    if name not in INSTALLED or name == "cache_implementation":  # "paged" only works by name
        pytest.skip("not of the installed version")
    config = GenerationConfig(max_new_tokens=2)
    setattr(config, name, REFUSED_EXAMPLES.get(name, True))
    with pytest.raises(DeliberateError, match=name) as caught:
        model.generate(random_ids(5), generation_config=config)
    assert "\n" not in str(caught.value)


def test_neutral_values_of_refused_settings_are_taken(model):
    ids = random_ids(5)
    settings = {"num_beams": 1, "penalty_alpha": 0.0, "guidance_scale": 1.0, "synced_gpus": False}
    settings |= {"output_attentions": False, "assistant_model": None, "constraints": []}
    out = model.generate(ids, max_new_tokens=NEW, **settings)
    assert torch.equal(out, model.generate(ids, max_new_tokens=NEW))


@pytest.mark.parametrize("value", ["offloaded", "quantized", "offloaded_static"])
def test_caches_that_promise_another_memory_are_refused(model, value):
    with pytest.raises(DeliberateError, match=f"cache_implementation='{value}'"):
        model.generate(random_ids(5), max_new_tokens=2, cache_implementation=value)


def test_a_watermark_that_counts_its_calls_is_refused(model):
    config = SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=2)
    with pytest.raises(DeliberateError, match="SynthIDTextWatermarkingConfig"):
        model.generate(random_ids(5), watermarking_config=config, do_sample=True)
    processor = config.construct_processor(97, "cpu")
    with pytest.raises(DeliberateError, match="SynthIDTextWatermarkLogitsProcessor"):
        model.generate(random_ids(5), logits_processor=[processor], max_new_tokens=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_new_token": 4}, "did you mean max_new_tokens?"),
        ({"fidelty": "dense"}, "did you mean fidelity?"),
        ({"generation_config": {"max_new_tokens": 3}}, "is not a GenerationConfig"),
    ],
)
def test_a_mistyped_argument_names_the_nearest(model, arguments, words):
    with pytest.raises(DeliberateError) as caught:
        model.generate(random_ids(5), **arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# -- obeyed ----------------------------------------------------------------------------------------


def test_every_obeyed_field_has_an_example():
    obeyed = {name for name, rule in FIELDS.items() if rule.fate is Fate.OBEYED}
    assert obeyed - OBEYED_ELSEWHERE == set(OBEYED_EXAMPLES)
    irrelevant = {name for name, rule in FIELDS.items() if rule.fate is Fate.IRRELEVANT}
    assert irrelevant == set(IRRELEVANT_EXAMPLES)


@pytest.mark.parametrize("name", sorted(set(OBEYED_EXAMPLES) & INSTALLED))
def test_an_obeyed_field_means_what_it_means_in_transformers(model, name):
    # The forced first token is that of an empty text: a prompt of one.
    ids = random_ids(1 if name == "forced_bos_token_id" else 5, batch=2, seed=3)
    settings = {"max_new_tokens": NEW} | OBEYED_EXAMPLES[name]
    if "max_length" in settings:
        del settings["max_new_tokens"]
    default = model.base.generate(ids, max_new_tokens=NEW, do_sample=False)
    sampled = settings.get("do_sample", False)
    scored = {"output_scores": True, "return_dict_in_generate": True}
    stock = model.base.generate(ids, **(settings | scored))
    for fidelity in ("dense", "exact"):
        own = {"fidelity": fidelity, "thresholds": 0.013, "online": False}
        out = model.generate(ids, **(settings | own | scored))
        if sampled:
            # Draws differ by design; what they are drawn from does not.
            assert out.sequences.shape == stock.sequences.shape
        else:
            assert torch.equal(out.sequences, stock.sequences)
        torch.testing.assert_close(out.scores[0], stock.scores[0], rtol=1e-4, atol=1e-4)
    plain = model.base.generate(ids, max_new_tokens=NEW, do_sample=False, **scored)
    same = ("output_scores", "return_dict_in_generate", "remove_invalid_values", "max_cache_len")
    if name not in (*same, "cache_implementation"):
        changed = stock.sequences.shape != default.shape or not torch.equal(
            stock.sequences, default
        )
        assert changed or not torch.allclose(stock.scores[0], plain.scores[0])


@pytest.mark.parametrize("name", sorted(set(IRRELEVANT_EXAMPLES) & INSTALLED))
def test_an_irrelevant_field_changes_nothing(model, name):
    ids = random_ids(5)
    config = GenerationConfig(max_new_tokens=NEW)
    setattr(config, name, IRRELEVANT_EXAMPLES[name])
    out = model.generate(ids, generation_config=config)
    assert torch.equal(out, model.generate(ids, max_new_tokens=NEW))
    assert torch.equal(out, model.base.generate(ids, generation_config=config))


def test_the_tables_say_what_the_docs_say():
    """The documentation lists what is refused; a name that is added must be added there."""
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "decoding.md").read_text()
    refused = [name for name, rule in FIELDS.items() if rule.fate is Fate.REFUSED]
    missing = [name for name in refused if f"`{name}`" not in text]
    assert not missing, json.dumps(missing)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_setting_is_refused_with_its_new_name(model, old, new):
    with pytest.raises(DeliberateError, match=rf"{old}=0.5 is now called {new}: use {new}="):
        model.generate(random_ids(4), fidelity="threshold", **{old: 0.5})
