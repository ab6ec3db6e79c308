"""Deadlines that cannot be met are refused with the least that could be; others are taken."""

from __future__ import annotations

import math

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from latency_plant import plant_cost
from live_server import running

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.serving.admission import Admission
from deliberate.serving.command import build_server
from deliberate.serving.errors import ApiError
from deliberate.serving.pace import Pace
from deliberate.serving.settings import ServerSettings
from deliberate.utils.errors import DeliberateError


def paced(prompt=0.001, **tokens) -> Pace:
    """10 ms a token alone, 20 with two or three requests, 40 with four to seven."""
    pace = Pace()
    for running_, seconds in {1: 0.01, 2: 0.02, 4: 0.04}.items():
        pace.note_step(running_, running_, 0, seconds)
    pace.note_step(0, 0, 100, 100 * prompt)
    return pace


def admission(**given) -> Admission:
    return Admission(paced, 4, overhead=0.0, **given)


def enter(one: Admission, deadline_ms, prompt=100, limit=50, choices=1, arrival=0.0):
    return one.enter(prompt, limit, choices, deadline_ms, arrival)


def test_a_deadline_below_the_prompt_and_one_token_is_refused_with_the_least_that_could_be():
    with pytest.raises(ApiError) as error:
        enter(admission(), 99)
    assert error.value.status == 400
    assert "deadline_ms=99: the least that could be here is 100 ms" in error.value.message
    enter(admission(), 101)


def test_once_answers_are_known_their_usual_length_counts():
    one = admission()
    for tokens in (10, 11, 11, 12, 40):
        one.note_answer(tokens, 0.2)
    with pytest.raises(ApiError, match=r"the least that could be here is 200 ms.* 11 tokens"):
        enter(one, 199)
    enter(one, 201)()
    strict = admission(share=0.9)
    for tokens in (10, 11, 11, 12, 40):
        strict.note_answer(tokens, 0.2)
    with pytest.raises(ApiError, match="490 ms"):
        enter(strict, 201)
    enter(strict, 201, limit=11)  # it asks for no more than that


def test_what_only_the_load_prevents_is_answered_429_with_when_to_try_again():
    one = admission()
    for _ in range(5):
        one.note_answer(11, 0.4)
    leave = [enter(one, None) for _ in range(3)]
    with pytest.raises(ApiError) as error:  # four at a time: 100 + 10 * 40 ms
        enter(one, 250)
    assert error.value.status == 429 and error.value.retry_after == 1
    assert "is 500 ms, on an idle server 200" in error.value.message
    for end in leave:
        end()
    enter(one, 250)


def test_the_wait_for_a_place_counts_but_not_those_whose_deadlines_are_later():
    def filled(deadline):
        one = admission()
        for _ in range(5):
            one.note_answer(11, 1.0)
        for _ in range(20):
            enter(one, deadline)
        return one

    with pytest.raises(ApiError, match="the least") as error:
        enter(filled(None), 50)
    assert error.value.status == 400
    enter(filled(None), 900)  # it goes first: one place of four that are free every second
    with pytest.raises(ApiError, match="with 20 requests here"):  # now the others are urgent
        busy = admission()
        for _ in range(5):
            busy.note_answer(11, 1.0)
        busy._dues = dict.fromkeys(range(20), 0.5)
        enter(busy, 900)


def test_without_any_knowledge_nothing_is_refused():
    Admission(Pace, 4).enter(100, 50, 1, 0.001, 0.0)


def test_a_full_queue_is_told_when_a_place_can_be_expected():
    one = admission()
    assert one.retry_after == 1
    one.note_answer(100, 21.0)
    assert one.retry_after == math.ceil(21 / 4)


@pytest.mark.parametrize("share", [0.0, 1.0, -1, math.nan])
def test_a_share_outside_its_range_is_named(share):
    with pytest.raises(DeliberateError, match="share"):
        Admission(Pace, 4, share=share)
    with pytest.raises(DeliberateError, match="admission_share"):
        ServerSettings(admission_share=share)


@given(st.lists(st.tuples(st.integers(1, 16), st.floats(1e-4, 1.0)), min_size=1, max_size=30))
def test_a_pace_lies_within_the_steps_that_were_seen(steps):
    pace = Pace()
    for running_, seconds in steps:
        pace.note_step(running_, running_, 0, seconds)
    times = [seconds for _, seconds in steps]
    for running_ in range(1, 17):
        found = pace.token_seconds(running_)
        assert min(times) * 0.999 <= found <= max(times) * 1.001


def test_a_pace_takes_the_prompts_share_of_a_step_only():
    pace = paced()
    for _ in range(100):
        pace.note_step(2, 2, 50, 0.02 + 50 * 0.002)
    assert pace.prompt_seconds(10) == pytest.approx(0.02, rel=0.01)
    assert pace.token_seconds(2) == pytest.approx(0.02)


def test_the_cost_model_speaks_for_loads_that_were_never_seen():
    cost = plant_cost()
    pace = Pace(cost)
    alone, eight = pace.token_seconds(1), pace.token_seconds(8)
    assert alone > 0 and eight > 0 and pace.prompt_seconds(64) == cost.prompt_seconds(64)
    pace.note_step(1, 1, 0, 3 * alone)
    assert pace.token_seconds(8) == pytest.approx(3 * eight)


def test_a_server_refuses_by_rules_and_deadlines_and_serves_the_next(tmp_path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("forbidden: [{name: secret, pattern: 'xyzzy'}]\nmax_tokens: 12\n")
    model = AdaptiveModel.from_pretrained("tiny")
    settings = ServerSettings(rules=rules)
    server = build_server(model, checkpoint.load_tokenizer("tiny"), "tiny", settings)
    body = {"model": "tiny", "prompt": "Question: 2 plus 2?\nAnswer:", "temperature": 0}

    def ask(url, **given):
        return httpx.post(f"{url}/v1/completions", json=body | given)

    with running(server) as url:
        made = ask(url).json()
        assert made["usage"]["completion_tokens"] <= 12  # the rules' limit, where none is given
        assert ask(url, prompt="xyzzy").status_code == 400
        late = ask(url, deadline_ms=0.001)
        assert late.status_code == 400 and "the least that could be" in late.text
        in_time = ask(url, deadline_ms=60_000)
        assert in_time.json()["choices"] == made["choices"]
        rules.write_text("{}")
        assert ask(url, prompt="xyzzy").status_code == 200
        assert not server.completions.admission._dues


def test_the_measured_time_outside_the_engine_is_part_of_what_is_least() -> None:
    one = admission()
    enter(one, 101)()
    one.note_answer(1, 0.2, 0.03)
    assert one.overhead == pytest.approx(0.03)
    with pytest.raises(ApiError, match="the least that could be here is 130 ms"):
        enter(one, 129)
    one.note_answer(1, 0.2, 0.05)
    assert one.overhead == pytest.approx(0.032)
    one.note_answer(1, 0.2)
    assert one.overhead == pytest.approx(0.032)
