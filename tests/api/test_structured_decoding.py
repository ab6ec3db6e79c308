"""Structured output while decoding: valid, equal to dense under the same constraint, and forced
tokens without passes of their own."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LogitsProcessor

from deliberate.api import checkpoint, generation
from deliberate.api.model import AdaptiveModel
from deliberate.modeling.exit_config import ExitConfig
from deliberate.utils.errors import DeliberateError

pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["red", "green"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
LIST = {
    "type": "array",
    "items": {"anyOf": [{"type": "boolean"}, {"enum": ["a", None]}]},
    "minItems": 1,
    "maxItems": 4,
}
NEW = 64


def is_person(value):
    return (
        list(value) == ["name", "age", "kind"]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 4
        and value["age"] in range(151)
        and value["kind"] in ("red", "green")
    )


def is_list(value):
    return 1 <= len(value) <= 4 and all(one in (True, False, "a", None) for one in value)


SCHEMAS = {"person": (PERSON, is_person), "list": (LIST, is_list)}


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load_tokenizer("tiny")


@pytest.fixture(scope="module")
def model():
    """Random, so that early exits and full depth often differ; by transformers' modules."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        eos_token_id=2,
        pad_token_id=0,
        max_position_embeddings=512,
    )
    return AdaptiveModel(LlamaForCausalLM(config).float().eval(), ExitConfig((1, 2), (0.5, 0.5)))


@pytest.fixture(scope="module")
def tiny():
    return AdaptiveModel.from_pretrained("tiny")


def prompts(tokenizer, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, len(tokenizer), (count, 5), generator=generator)


def written(tokenizer, ids, given):
    return tokenizer.decode(ids[given.shape[1] :], skip_special_tokens=True)


OUTPUTS = 0
DENSE: dict[tuple[str, bool], torch.Tensor] = {}


@pytest.mark.parametrize("drafts", range(1, 9))
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("name", SCHEMAS)
def test_outputs_of_a_batch_are_valid_at_every_draft_length_and_equal_to_dense(
    model, tokenizer, name, sample, drafts
):
    """1,024 outputs."""
    schema, valid = SCHEMAS[name]
    given = prompts(tokenizer, 32)
    settings = {
        "structured": {"json_schema": schema},
        "tokenizer": tokenizer,
        "max_new_tokens": NEW,
        "do_sample": sample,
        "seed": 5,
    }
    if (name, sample) not in DENSE:
        DENSE[name, sample] = model.generate(given, fidelity="dense", **settings)
    dense = DENSE[name, sample]
    out = model.generate(
        given,
        fidelity="exact",
        thresholds=0.02,
        online=False,
        max_pending=drafts,
        return_dict_in_generate=True,
        **settings,
    )
    assert torch.equal(out.sequences, dense)
    for row, trace in zip(out.sequences, out.traces, strict=True):
        assert trace.finish == "stop" and trace.tokens[-1] == 2
        assert valid(json.loads(written(tokenizer, row, given)))
    assert sum(trace.drafted for trace in out.traces) > 10
    if name == "person":
        assert sum(trace.rejected for trace in out.traces) > 3


@pytest.mark.parametrize("drafts", [1, 3, 8])
@pytest.mark.parametrize("sample", [False, True])
def test_one_prompt_by_our_kernels_is_valid_and_equal_to_dense(tiny, tokenizer, drafts, sample):
    given = torch.tensor([tokenizer.encode("Tom has 3 apples and")])
    for structured, valid in (
        ({"json_schema": PERSON}, lambda text: is_person(json.loads(text))),
        (
            {"regex": "[a-z]{3,9} (is|are) [0-9]{1,3}\\."},
            re.compile("[a-z]+ (is|are) [0-9]+\\.").match,
        ),
        ({"choice": ["apples", "pears", "plums"]}, {"apples", "pears", "plums"}.__contains__),
        ({"grammar": 'root ::= n "+" n\nn ::= [0-9] [0-9]?'}, re.compile(r"\d+\+\d+$").match),
    ):
        settings = {"structured": structured, "tokenizer": tokenizer, "max_new_tokens": 90}
        settings |= {"do_sample": sample, "seed": 3, "eos_token_id": 2, "pad_token_id": 0}
        dense = tiny.generate(given, fidelity="dense", **settings)
        for more in ({"online": False, "thresholds": 0.2, "max_pending": drafts}, {}):
            exact = tiny.generate(given, fidelity="exact", **settings, **more)
            assert torch.equal(exact, dense)
        loose = tiny.generate(given, fidelity="threshold", thresholds=0.2, **settings)
        for ids in (dense, loose):
            assert ids[0, -1] == 2 and valid(written(tokenizer, ids[0], given))


def test_a_ragged_batch_equals_each_prompt_alone(tiny, tokenizer):
    texts = ["Tom", "Ann has 12 pears and eats", "In the shop there are"]
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    settings = {"structured": {"json_schema": PERSON}, "tokenizer": tokenizer}
    settings |= {"max_new_tokens": 90, "eos_token_id": 2, "pad_token_id": 0}
    for fidelity in ("dense", "exact", "threshold"):
        whole = tiny.generate(**batch, fidelity=fidelity, **settings)
        for row, text in enumerate(texts):
            alone = tiny.generate(
                torch.tensor([tokenizer.encode(text)]), fidelity=fidelity, **settings
            )
            made = alone[0, len(tokenizer.encode(text)) :]
            assert torch.equal(whole[row, batch["input_ids"].shape[1] :][: len(made)], made)


def test_looked_up_drafts_obey_the_constraint(model, tokenizer):
    text = '["a", "a", "a", "a", true, "a", true'
    given = torch.tensor([tokenizer.encode(text)])
    settings = {"structured": {"json_schema": LIST}, "tokenizer": tokenizer, "max_new_tokens": NEW}
    dense = model.generate(given, fidelity="dense", **settings)
    out = model.generate(
        given, fidelity="exact", lookup_tokens=6, return_dict_in_generate=True, **settings
    )
    assert torch.equal(out.sequences, dense)
    assert is_list(json.loads(written(tokenizer, dense[0], given)))


# -- forced tokens ---------------------------------------------------------------------------------


def test_forced_tokens_take_no_pass_of_their_own(model, tokenizer):
    given = prompts(tokenizer, 1)
    settings = {"tokenizer": tokenizer, "max_new_tokens": NEW, "return_dict_in_generate": True}
    text = "an answer that is known"
    out = model.generate(given, fidelity="dense", structured={"choice": [text]}, **settings)
    assert written(tokenizer, out.sequences[0], given) == text
    # All of it is forced at the start, its end too: nothing is run after the prompt.
    assert (len(out.batch.passes), out.trace.finish) == (0, "stop")
    structured = {"regex": "[ab]: this follows\\. [cd]!"}
    out = model.generate(given, fidelity="dense", structured=structured, **settings)
    chosen = [record for record in out.trace.records if record.exit_layer]
    forced = [record for record in out.trace.records if not record.exit_layer]
    assert len(chosen) == 2 and len(forced) > 5
    # The pass over the first chosen token runs all forced ones after it, and yields the second.
    (only,) = out.batch.passes
    assert only.tokens == 1 + [r.exit_layer for r in out.trace.records[1:]].index(3)
    assert out.trace.layer_positions == [only.tokens] * 3


def test_exact_mode_drafts_forced_tokens_and_verifies_them_with_the_draft_before(model, tokenizer):
    given = prompts(tokenizer, 1)
    out = model.generate(
        given,
        fidelity="exact",
        thresholds=0.02,
        online=False,
        structured={"regex": "([ab]:::::,){6}"},
        tokenizer=tokenizer,
        max_new_tokens=NEW,
        return_dict_in_generate=True,
    )
    assert all(record.verified for record in out.trace.records)
    assert {record.exit_layer for record in out.trace.records} >= {0, 1}
    deep = [one for one in out.batch.passes if one.segment == 2]
    assert 0 < len(deep) < 6


def test_the_parser_has_accepted_exactly_the_tokens_that_are_kept(model, tokenizer, monkeypatch):
    made = []
    constraints = generation.AdaptiveDecoding._constraints

    def kept(self, ends, batch):
        made.append(constraints(self, ends, batch))
        return made[-1]

    monkeypatch.setattr(generation.AdaptiveDecoding, "_constraints", kept)
    out = model.generate(
        prompts(tokenizer, 4),
        fidelity="exact",
        thresholds=0.02,
        online=False,
        structured={"json_schema": PERSON},
        tokenizer=tokenizer,
        max_new_tokens=NEW,
        return_dict_in_generate=True,
    )
    assert sum(trace.rejected for trace in out.traces) > 0
    for constraint, trace in zip(made[0], out.traces, strict=True):
        assert constraint.finished and constraint.tokens == trace.tokens


@pytest.mark.parametrize("limit", range(1, 14))
def test_a_limit_cuts_exact_and_dense_alike(model, tokenizer, limit):
    settings = {"structured": {"json_schema": PERSON}, "tokenizer": tokenizer}
    settings |= {"max_new_tokens": limit, "return_dict_in_generate": True}
    given = prompts(tokenizer, 3)
    dense = model.generate(given, fidelity="dense", **settings)
    exact = model.generate(given, fidelity="exact", thresholds=0.02, online=False, **settings)
    assert torch.equal(exact.sequences, dense.sequences)
    assert dense.sequences.shape[1] == given.shape[1] + limit
    assert dense.trace is None and {trace.finish for trace in exact.traces} == {"length"}


def test_scores_of_forced_tokens_leave_no_other(model, tokenizer):
    settings = {"structured": {"regex": "[ab]xyz[cd]"}, "tokenizer": tokenizer}
    settings |= {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_scores": True}
    given = prompts(tokenizer, 2)
    dense = model.generate(given, fidelity="dense", **settings)
    exact = model.generate(given, fidelity="exact", thresholds=0.02, online=False, **settings)
    assert len(dense.scores) == dense.sequences.shape[1] - given.shape[1]
    for step, (one, other) in enumerate(zip(dense.scores, exact.scores, strict=True)):
        assert torch.equal(one.argmax(-1), dense.sequences[:, given.shape[1] + step])
        assert torch.allclose(one, other, atol=1e-4)
    free = [int((scores[0] > -torch.inf).sum()) for scores in dense.scores]
    assert free[0] == free[-2] == 2 and set(free[1:-2]) == {1}


def test_confidence_is_of_the_tokens_that_are_left(model, tokenizer):
    """With two allowed tokens the largest probability is at least one half."""
    out = model.generate(
        prompts(tokenizer, 8),
        fidelity="threshold",
        thresholds=0.5,
        structured={"regex": "[ab]{20}"},
        tokenizer=tokenizer,
        max_new_tokens=NEW,
        return_dict_in_generate=True,
    )
    drafted = [r for trace in out.traces for r in trace.records if r.exit_layer in (1, 2)]
    assert len(drafted) > 40 and min(record.confidence for record in drafted) >= 0.5


def test_a_learned_position_table_ends_a_forced_run_with_the_context(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=1024, n_positions=16, n_embd=16, n_layer=2, n_head=2, eos_token_id=2
    )
    model = AdaptiveModel(GPT2LMHeadModel(config).eval(), ExitConfig((1,), (0.5,)))
    given = prompts(tokenizer, 1)
    with pytest.warns(UserWarning, match="ended after 11 of max_new_tokens=64"):
        out = model.generate(
            given,
            structured={"choice": ["a text of far more than eleven tokens, all forced"]},
            tokenizer=tokenizer,
            max_new_tokens=NEW,
            pad_token_id=0,
        )
    assert out.shape[1] == 16


# -- what cannot be obeyed -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fidelity": "certified"}, "reasoning, with fidelity 'certified'"),
        ({"fidelity": "threshold", "kv_mode": "skip"}, "reasoning, with kv_mode 'skip'"),
        ({"strict": True}, "reasoning, with strict=True"),
        ({"tokenizer": None}, "needs the tokenizer: pass tokenizer="),
        ({"structured": {"regx": "a"}}, "'regx' is not one of json_schema"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(model, tokenizer, settings, message):
    given = {"structured": {"regex": "[ab]"}, "tokenizer": tokenizer, "max_new_tokens": 4}
    with pytest.raises(DeliberateError, match=message) as error:
        model.generate(prompts(tokenizer, 1), **given | settings)
    assert "\n" not in str(error.value)


class Never(LogitsProcessor):
    """Forbids the tokens of a list."""

    stateless = True

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.tokens] = -torch.inf
        return scores


@pytest.mark.parametrize("fidelity", ["dense", "exact", "threshold"])
def test_a_processor_that_contradicts_the_constraint_is_named(model, tokenizer, fidelity):
    letters = [tokenizer.encode(one, add_special_tokens=False)[-1] for one in "ab"]
    with pytest.raises(DeliberateError, match="constraint and Never leave no token at generated"):
        model.generate(
            prompts(tokenizer, 1),
            fidelity=fidelity,
            thresholds=0.02,
            structured={"regex": "[ab]x[ab]"},
            tokenizer=tokenizer,
            logits_processor=[Never(letters)],
            max_new_tokens=8,
        )
    out = model.generate(
        prompts(tokenizer, 1),
        fidelity=fidelity,
        thresholds=0.02,
        structured={"regex": "[ab]x[ab]"},
        tokenizer=tokenizer,
        logits_processor=[Never(letters[:1])],
        max_new_tokens=8,
    )
    assert written(tokenizer, out[0], prompts(tokenizer, 1)) == "bxb"
