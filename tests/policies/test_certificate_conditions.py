"""A request is compared with the conditions of its certificate, in `generate` and in an engine."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from calibrated_model import NEW, generate

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.conditions import conditions_sha256
from deliberate.engine.request import Request
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.scheduler import DeepSchedule
from deliberate.engine.spec import DecodingSpec
from deliberate.modeling.exit_config import ExitConfig
from deliberate.policies.exit_policies import COMPARE_EVERY
from deliberate.policies.guarantee_settings import decoding_conditions
from deliberate.utils.errors import DeliberateError

WORDS = {"prompt": "<q>{question}", "prompt_ends": [[1, 2], [3]]}


@pytest.fixture
def bound(model):
    """The calibrated model with certificates as calibration writes them today."""
    conditions = decoding_conditions(model, DecodingSpec(), max_new_tokens=NEW) | WORDS
    certificates = [
        replace(c, conditions=conditions, conditions_sha256=conditions_sha256(conditions))
        for c in model.calibration.certificates
    ]
    model.set_calibration(model.calibration.with_certificates(*certificates))
    return model


def certified(model, prompt=(1, 2, 7, 8, 3), **how):
    given = {"max_new_tokens": NEW, "return_dict_in_generate": True} | how
    return model.generate(torch.tensor([prompt]), fidelity="certified", **given)


def test_a_request_under_the_conditions_of_its_certificate_is_decoded(bound) -> None:
    assert certified(bound).trace.tokens
    assert certified(bound, max_new_tokens=3).trace.tokens, "fewer tokens are covered"
    # Without sampling transformers takes no notice of a temperature, and the output is greedy.
    same = certified(bound, temperature=5.0, do_sample=False)
    assert same.sequences.tolist() == certified(bound).sequences.tolist()
    spec = DecodingSpec(fidelity="certified", risk="token", epsilon=0.1, schedule=DeepSchedule())
    assert bound.generate(torch.tensor([[1, 2, 9, 3]]), spec=spec, max_new_tokens=4).numel() == 8


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_new_tokens": 100}, "max_new_tokens=24, not 100: give max_new_tokens=24 or fewer"),
        ({"max_new_tokens": NEW + 1}, "max_new_tokens=24, not 25"),
        ({"do_sample": True, "temperature": 5.0, "top_k": 0}, "not 'sampling and Temperature"),
        ({"repetition_penalty": 5.0}, "sampling='greedy', not 'RepetitionPenaltyLogitsProcessor'"),
        ({"bad_words_ids": [[5]]}, "not 'NoBadWordsLogitsProcessor'"),
        ({"kv_mode": "skip"}, "kv_mode='skip' with fidelity 'certified'"),
        ({"max_pending": 100}, "max_pending=12, not 100: use max_pending=12"),
        ({"schedule": DeepSchedule(max_wait=3)}, r"schedule={}, not {'max_wait': 3}"),
        ({"decide": lambda *_: True}, "decide='function' with fidelity 'certified'"),
        ({"exit_policy": "nonsense"}, "exit_policy='nonsense' with fidelity 'certified'"),
        ({"pacer": "nonsense"}, "pacer='nonsense' is now called exit_policy"),
        ({"prompt": (5, 6, 7)}, "prompts of the form '<q>{question}', and prompt 0 is of another"),
    ],
)
def test_a_request_under_other_conditions_is_refused_in_one_line_that_names_them(
    bound, how, message
) -> None:
    with pytest.raises(DeliberateError, match=message) as caught:
        certified(bound, **how)
    assert "\n" not in str(caught.value)


def test_the_conditions_of_a_request_name_its_constraint_and_its_executor(bound) -> None:
    class Grammar:
        pass

    spec = DecodingSpec(schedule=DeepSchedule(join=math.inf))
    found = decoding_conditions(bound, spec, max_new_tokens=4, constraint=Grammar())
    assert (found["constraint"], found["executor"]) == ("Grammar", "generic")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["schedule"] == {"join": "infinity"}
    mixed = AdaptiveModel(bound.base, [1, 2], executor="fused", weights={"int8": [0]})
    storage = decoding_conditions(mixed, DecodingSpec(), max_new_tokens=4)["storage"]
    assert storage == ["int8", "native", "native", "native", "native"]
    mixed.attach_gate()
    for gate in (True, False):
        spec = DecodingSpec(gate=gate)
        assert decoding_conditions(mixed, spec, max_new_tokens=4)["gate"] is gate


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            Request([1, 2, 7, 3], NEW + 1, DecodingSpec(fidelity="certified")),
            "not 25: give max_new",
        ),
        (Request([7, 8], NEW, DecodingSpec(fidelity="certified")), "prompt 0 is of another"),
        (
            Request([1, 2, 3], 4, DecodingSpec(fidelity="certified"), TokenChooser(sample=True)),
            "not 'sampling': pass do_sample=False",
        ),
    ],
)
def test_a_request_to_the_engine_is_compared_too(bound, request_, message) -> None:
    engine = bound.engine()
    engine.add(Request([1, 2, 7, 3], NEW, DecodingSpec(fidelity="certified")))
    with pytest.raises(DeliberateError, match=message):
        engine.add(request_)


def test_padding_is_no_part_of_the_prompts_form(bound) -> None:
    ids = torch.tensor([[0, 0, 1, 2, 3], [1, 2, 7, 8, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    how = {"fidelity": "certified", "max_new_tokens": 4}
    assert bound.generate(ids, attention_mask=mask, **how).shape[0] == 2
    ids[1, 0] = 9
    with pytest.raises(DeliberateError, match="prompt 1 is of another"):
        bound.generate(ids, attention_mask=mask, **how)


def test_a_certificate_is_for_the_executor_that_calibrated(bound, base, calibration) -> None:
    stated = bound.calibration
    fused = AdaptiveModel(
        base, ExitConfig((1, 2), (0.1, 0.1), translator="none"), executor="fused", engine="eager"
    )
    fused.set_calibration(stated)
    with pytest.raises(DeliberateError, match="executor='generic', not 'fused eager': load the"):
        certified(fused)
    fused.set_calibration(calibration)
    assert certified(fused).trace.tokens, "a certificate that does not state it is not compared"


def test_a_certificate_without_a_limit_is_warned_of_once(model) -> None:
    certificates = [replace(c, conditions={}) for c in model.calibration.certificates]
    model.set_calibration(model.calibration.with_certificates(*certificates))
    with pytest.warns(UserWarning, match="does not state max_new_tokens, so no request is comp"):
        generate(model, fidelity="certified")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, fidelity="certified")


def test_the_bundled_certificates_hold_up_to_the_tokens_that_they_were_made_with() -> None:
    bundled = AdaptiveModel.from_pretrained("tiny", executor="generic")
    prompt = torch.tensor([[5, 6, 7]])
    assert bundled.generate(prompt, fidelity="certified", max_new_tokens=4).numel() > 3
    for how, message in (
        ({"max_new_tokens": 193}, "max_new_tokens=192, not 193"),
        ({"max_new_tokens": 4, "repetition_penalty": 5.0}, "sampling='greedy'"),
        ({"max_new_tokens": 4, "schedule": DeepSchedule(join=2.0)}, "schedule={}"),
    ):
        with pytest.raises(DeliberateError, match=message):
            bundled.generate(prompt, fidelity="certified", **how)


def test_certified_refuses_weights_that_are_stored_smaller() -> None:
    small = AdaptiveModel.from_pretrained("tiny", executor="fused", weights="int8", engine="eager")
    with pytest.raises(DeliberateError, match="for storage='native', not 'int8': load the"):
        small.generate(torch.tensor([[5, 6]]), fidelity="certified", max_new_tokens=4)


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"epsilon": 0.01}, r"no certificate for risk accuracy, epsilon <= 0.01; there is"),
        ({"delta": 0.01}, "delta <= 0.01"),
    ],
)
def test_a_promise_that_no_certificate_makes_is_refused_with_those_there_are(
    model, requested, message
) -> None:
    with pytest.raises(DeliberateError, match=message) as caught:
        generate(model, fidelity="certified", **requested)
    assert "accuracy (epsilon 0.1, delta 0.05)" in str(caught.value)


def test_a_risk_that_there_is_none_of_is_refused_with_those_there_are(model) -> None:
    with pytest.raises(DeliberateError, match="risk 'speed' is unknown; it is one of token, acc"):
        generate(model, fidelity="certified", risk="speed")


def test_a_certificate_expires_when_the_traffic_disagrees_more_than_it_allows(model) -> None:
    limit = 0.01  # a random model's exits disagree far more often
    certificates = [replace(c, disagreement=limit) for c in model.calibration.certificates]
    model.set_calibration(model.calibration.with_certificates(*certificates))
    with pytest.raises(DeliberateError, match=r"certificate has expired: .* tokens disagree"):
        for _ in range(40):
            generate(model, fidelity="certified")
    certificate = model.calibration.certificate("accuracy")
    drift = model.guarantees.drift(certificate)
    assert drift.alarm and drift.disagreements > limit * drift.tokens > 0
    assert generate(model, fidelity="exact").trace.tokens, "the other fidelities go on"
    model.set_calibration(model.calibration)
    assert generate(model, fidelity="certified").trace.tokens, "a new calibration starts afresh"


def test_the_monitor_looks_at_different_passes_of_successive_answers(model) -> None:
    pacers = [model.guarantees.certified(model) for _ in range(2 * COMPARE_EVERY)]
    assert [one.compare_offset for one in pacers] == [
        *range(COMPARE_EVERY),
        *range(COMPARE_EVERY),
    ]
