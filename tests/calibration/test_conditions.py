"""A certificate is good for what it was made with: what differs is named, with both values."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deliberate.calibration.certificate import Certificate
from deliberate.calibration.conditions import (
    ASSUMED,
    conditions_sha256,
    problem,
    prompt_ends,
    prompt_problem,
    unstated,
)
from deliberate.utils.errors import DeliberateError

STATED = {
    "task": "words",
    "max_new_tokens": 24,
    "dtype": "float32",
    "executor": "fused native",
    "max_pending": 12,
    "gate": False,
    "sampling": "greedy",
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_new_tokens", 100, "max_new_tokens=24, not 100: give max_new_tokens=24 or fewer, cal"),
        (
            "dtype",
            "bfloat16",
            "dtype='float32', not 'bfloat16': load the model with dtype='float32'",
        ),
        (
            "executor",
            "generic",
            "not 'generic': load the model with executor='fused' and engine='n",
        ),
        ("max_pending", 100, "max_pending=12, not 100: use max_pending=12, calibrate again"),
        ("gate", True, "gate=False, not True"),
        ("sampling", "sampling", "sampling='greedy', not 'sampling': pass do_sample=False"),
        ("kv_mode", "skip", "kv_mode='defer', not 'skip'"),
        ("storage", "int8", "storage='native', not 'int8': load the model with weights='native'"),
        ("constraint", "Grammar", "constraint='none', not 'Grammar': leave the constraint out"),
        ("schedule", {"fullness": 1.0}, r"schedule={}, not {'fullness': 1.0}: use"),
    ],
)
def test_a_condition_that_differs_is_one_line_with_both_values_and_what_to_do(name, value, message):
    certificate = make(conditions=STATED)
    certificate.check(conditions=STATED)
    with pytest.raises(DeliberateError, match=message) as caught:
        certificate.check(conditions=STATED | {name: value})
    assert "\n" not in str(caught.value) and "or use fidelity 'exact'" in str(caught.value)


@given(st.integers(1, 99), st.integers(1, 99))
def test_fewer_tokens_than_certified_are_covered_and_more_are_not(stated, wanted):
    found = problem({"max_new_tokens": stated}, {"max_new_tokens": wanted})
    assert (found is None) == (wanted <= stated)


def test_what_an_earlier_certificate_does_not_state_is_as_its_release_calibrated():
    assert problem({}, dict(ASSUMED) | {"executor": "generic", "gate": True}) is None
    for name in ASSUMED:
        assert name in str(problem({}, {name: "other"}))
    assert unstated({}) == unstated({"max_new_tokens": None}) == ["max_new_tokens"]
    assert unstated(STATED) == []
    assert problem({"max_new_tokens": None}, {"max_new_tokens": 10**6}) is None


IDS = st.lists(st.integers(0, 3), max_size=4)


@given(IDS, IDS, st.lists(IDS, min_size=1, max_size=5))
def test_the_ends_of_prompts_are_around_every_question(first, last, questions):
    prompts = [[*first, *question, *last] for question in questions]
    found_first, found_last = prompt_ends(prompts)
    assert found_first[: len(first)] == first[: len(found_first)]
    shortest = min(map(len, prompts))
    assert len(found_first) + len(found_last) <= shortest
    assert prompt_problem({"prompt_ends": [found_first, found_last]}, prompts) is None
    if any(question != questions[0] for question in questions):
        return
    assert found_first == prompts[0], "all that prompts share is at their beginning"


def test_a_prompt_of_another_form_is_refused_by_its_row():
    form = {"prompt": "<q>{question}</q>", "prompt_ends": [[1, 2], [3]]}
    assert prompt_problem(form, [[1, 2, 9, 3], [1, 2, 3]]) is None
    for bad in ([1, 2, 9], [2, 9, 3], [1, 3], []):
        found = prompt_problem(form, [[1, 2, 9, 3], bad])
        assert "form '<q>{question}</q>', and prompt 1 is of another" in str(found)
        assert "(token ids [1, 2] and [3] are around a question)" in str(found)
    assert prompt_problem({}, [[7]]) is None
    assert prompt_problem({"prompt_ends": [[], []]}, [[], [7]]) is None
    with pytest.raises(DeliberateError, match="prompt 0 is of another"):
        make(conditions=form).check(prompts=[[4]])


def make(**changes) -> Certificate:
    fields = {
        "risk": "token", "epsilon": 0.1, "delta": 0.05, "n": 100, "observed": 0.0, "lambda_": 1.0,
        "thresholds": (0.5,), "disagreement": 0.1, "weights": "w", "exits": "e", "policy": "p",
        "data": "d",
    }  # fmt: skip
    return Certificate(**fields | changes)


def test_conditions_that_are_not_those_of_the_hash_were_edited():
    certificate = make(conditions=STATED, conditions_sha256=conditions_sha256(STATED))
    assert Certificate.from_dict(certificate.to_dict()) == certificate
    raw = certificate.to_dict()
    raw["conditions"] = STATED | {"max_new_tokens": 100}
    with pytest.raises(DeliberateError, match=r"conditions are not those of its hash: .* edited"):
        Certificate.from_dict(raw)
    with pytest.raises(DeliberateError, match="not those of its hash"):
        replace(certificate, conditions={})


def test_a_certificate_of_an_earlier_release_is_written_as_it_was():
    raw = make(conditions=STATED).to_dict()
    assert "conditions_sha256" not in raw and Certificate.from_dict(raw).conditions_sha256 == ""
