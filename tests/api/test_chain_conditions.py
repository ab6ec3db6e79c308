"""Bands by the calibration that a model brings, certified under the conditions of a request."""

from __future__ import annotations

import pytest
import torch

from deliberate import AdaptiveModel
from deliberate.api import checkpoint
from deliberate.api.chain_conditions import model_folder
from deliberate.api.reasoner import Reasoner
from deliberate.data.chains import chain_problems
from deliberate.data.prompts import Encoder
from deliberate.reasoning.chain_calibration import ChainCalibration
from deliberate.reasoning.settings import ReasoningSettings
from deliberate.utils.errors import DeliberateError

CERTIFIED = {"bands": {"epsilon": 0.05, "delta": 0.1}}


@pytest.fixture(scope="module")
def model():
    return AdaptiveModel.from_pretrained("tiny-chain")


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load_tokenizer("tiny-chain")


def generate(model, tokenizer, reasoning, number=0, **given):
    problem = list(chain_problems("test", size=4, seed=77))[number]
    ids = torch.tensor([Encoder(tokenizer, max_tokens=10**6).prompt(problem.question)])
    given = {"fidelity": "dense", "do_sample": False, "max_new_tokens": 576} | given
    made = model.generate(
        ids, reasoning=reasoning, tokenizer=tokenizer, return_dict_in_generate=True, **given
    )
    return made.chains[0]


def test_bundled_bands_stop_a_chain_under_their_certificate(model, tokenizer):
    whole = [generate(model, tokenizer, "none", number) for number in range(4)]
    calibration = ChainCalibration.load(model_folder(model))
    (certificate,) = calibration.certificates
    for fidelity in ("dense", "exact"):
        made = [
            generate(model, tokenizer, CERTIFIED, number, fidelity=fidelity) for number in range(4)
        ]
        assert any(one.stopped for one in made)
        for one, other in zip(made, whole, strict=True):
            assert (one.reasoning_tokens < other.reasoning_tokens) == bool(one.stopped)
            if one.stopped:
                probability = float(one.stopped.removeprefix("answer at probability "))
                assert probability >= round(certificate.lambda_, 3)
    assert generate(model, tokenizer, "bands").probes


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"do_sample": True}, "sampling"),
        ({"max_new_tokens": 600}, "max_new_tokens=576"),
        ({"fidelity": "threshold", "thresholds": 0.9}, "fidelity"),
    ],
)
def test_a_request_outside_the_certificate_is_refused_by_name(model, tokenizer, given, words):
    with pytest.raises(DeliberateError, match=words):
        generate(model, tokenizer, CERTIFIED, **given)


def test_bands_of_a_model_without_a_calibration_say_what_to_give(tokenizer):
    tiny = AdaptiveModel.from_pretrained("tiny")
    with pytest.raises(DeliberateError, match="bands need calibration=: this model has none"):
        generate(tiny, checkpoint.load_tokenizer("tiny"), "bands")


def test_the_chains_of_one_call_hash_the_weights_once_and_the_next_call_sees_a_change(
    model, tokenizer, monkeypatch
):
    problems = list(chain_problems("test", size=3, seed=5))
    encoder = Encoder(tokenizer, max_tokens=10**6)
    prompts = [encoder.prompt(one.question) for one in problems]
    reasoner = Reasoner(
        model,
        tokenizer,
        ReasoningSettings.of(CERTIFIED),
        end_tokens=[tokenizer.eos_token_id],
        longest=900,
    )
    hashed, own = [], model.fingerprints
    monkeypatch.setattr(model, "fingerprints", lambda: hashed.append(1) or own())
    reasoner.run(prompts, 576)
    assert len(hashed) == 2  # for the key of shared beginnings, and for the certificates
    monkeypatch.setattr(model, "fingerprints", lambda: ("other", own()[1]))
    with pytest.raises(DeliberateError, match="weights"):
        reasoner.run(prompts, 576)
