"""A generation takes a spec, single settings and hooks, and refuses what it cannot obey."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate import AdaptiveModel, DecodingSpec
from deliberate.api.generation import AdaptiveDecoding
from deliberate.engine.exit_policy import FixedPolicy
from deliberate.utils.errors import DeliberateError


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama"), [1, 2], executor="generic")


def generate(model, **how):
    return model.generate(random_ids(6), max_new_tokens=12, return_dict_in_generate=True, **how)


def same(one, other) -> bool:
    return (
        one.sequences.tolist() == other.sequences.tolist()
        and one.trace.exit_layers == other.trace.exit_layers
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"fidelity": "threshold", "thresholds": 0.02},
        {"fidelity": "threshold", "thresholds": (0.02, 0.5), "kv_mode": "skip"},
        {"fidelity": "exact", "thresholds": 0.02, "online": False},
        {"fidelity": "threshold", "thresholds": 0.013, "max_pending": 2},
        {"fidelity": "dense"},
    ],
)
def test_a_spec_decodes_like_its_fields_given_one_by_one(model, fields):
    whole = generate(model, spec=DecodingSpec(**fields))
    assert same(whole, generate(model, **fields))
    first, *rest = fields
    mixed = generate(
        model,
        spec=DecodingSpec(**{first: fields[first]}),
        **{name: fields[name] for name in rest},
    )
    assert same(whole, mixed)


def test_transformers_own_generate_takes_a_spec(model):
    spec = DecodingSpec(fidelity="threshold", thresholds=0.02)
    decode = AdaptiveDecoding(model, spec=spec)
    ids = model.base.generate(random_ids(6), max_new_tokens=12, custom_generate=decode)
    assert torch.equal(ids, generate(model, spec=spec).sequences)


def test_max_pending_of_a_request_limits_its_pending_tokens(model):
    for most in (1, 3):
        spec = DecodingSpec(fidelity="threshold", thresholds=1e-6, max_pending=most)
        layers = generate(model, spec=spec).trace.exit_layers
        run = longest = 0
        for layer in layers[1:]:
            run = run + 1 if layer < 4 else 0
            longest = max(longest, run)
        assert longest == most


REFUSED = [
    ({"spec": DecodingSpec(thresholds=0.5), "thresholds": 0.5}, "and spec.thresholds=0.5: give"),
    (
        {"spec": DecodingSpec(fidelity="exact"), "fidelity": "dense"},
        "fidelity='dense' and spec.fid",
    ),
    ({"spec": {"fidelity": "exact"}}, "spec={'fidelity': 'exact'} is not a DecodingSpec"),
    ({"spec": DecodingSpec(thresholds=(0.5, 0.5, 0.5))}, "3 thresholds for 2 exits"),
    ({"spec": DecodingSpec(lambda_=1.0)}, "lambda_=1.0 with fidelity 'exact'"),
    ({"exit_policy": "nonsense"}, "exit_policy='nonsense': give one of constant, rising"),
    ({"exit_policy": 0.5}, "exit_policy=0.5 is not an exit policy: derive it from"),
    ({"decide": 0.5}, "decide=0.5 cannot be called"),
    ({"monitor": "loud"}, "monitor='loud' cannot be called"),
    (
        {"fidelity": "threshold", "lambda_": 1.0, "exit_policy": FixedPolicy([0.5, 0.5])},
        "lambda_=1.0 and exit_policy=",
    ),
    (
        {"fidelity": "threshold", "lambda_": 1.0, "decide": lambda *_: True},
        "lambda_=1.0 and decide=",
    ),
    ({"latency_budget": "L3", "max_pending": 3}, "max_pending=3 with fidelity 'budget'"),
    ({"latency_budget": "L3", "risk": "token"}, "risk='token' with fidelity 'budget'"),
    ({"pacer": "nonsense"}, "pacer='nonsense' is now called exit_policy"),
    ({"treshold": 0.5}, "treshold=0.5 is not an argument of generate"),
]


@pytest.mark.parametrize(("how", "message"), REFUSED)
def test_what_a_generation_cannot_obey_is_refused_by_name(model, how, message):
    with pytest.raises(DeliberateError, match=message) as caught:
        generate(model, **how)
    assert "\n" not in str(caught.value)


def test_a_setting_that_there_is_none_of_is_refused_with_those_there_are(model):
    with pytest.raises(DeliberateError, match="no setting 'treshold'; there is fidelity, thresh"):
        AdaptiveDecoding(model, treshold=0.5)
