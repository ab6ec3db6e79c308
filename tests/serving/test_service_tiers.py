"""Tiers of requests under the feedback scheduler: the same answers, and refused where unknown."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from live_server import running

from deliberate.api import checkpoint
from deliberate.engine.step_plan import RequestView
from deliberate.policies.remaining_time import PredictedRemaining
from deliberate.serving.command import build_server
from deliberate.serving.settings import ServerSettings
from deliberate.utils.errors import DeliberateError

QUESTION = "Question: Tom has {} apples and buys 4 more. How many apples does Tom have?\nAnswer:"


def serving(model, **settings):
    tokenizer = checkpoint.load_tokenizer("tiny")
    return running(build_server(model, tokenizer, "tiny", ServerSettings(**settings)))


def ask(url: str, number: int, **given):
    body = {"model": "tiny", "prompt": QUESTION.format(number), "temperature": 0, "max_tokens": 24}
    return httpx.post(f"{url}/v1/completions", json=body | given)


def test_every_tier_gets_the_answer_that_it_gets_alone(model) -> None:
    tiers = [None, "auto", "default", "priority", "flex"]
    with serving(model, scheduler="feedback", max_running=3) as url:
        alone = [ask(url, n).json()["choices"][0]["text"] for n in range(15)]
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda n: ask(url, n, service_tier=tiers[n % 5]), range(15)))
    assert [one.json()["choices"][0]["text"] for one in made] == alone


def test_a_tier_that_the_scheduler_does_not_tell_apart_is_refused_by_name(model) -> None:
    with serving(model) as url:
        assert ask(url, 1, service_tier="auto").status_code == 200
        for tier in ("flex", "priority"):
            answer = ask(url, 1, service_tier=tier)
            assert answer.status_code == 400 and "service_tier" in answer.json()["error"]["message"]


def test_a_scheduler_that_is_none_is_one_line() -> None:
    with pytest.raises(DeliberateError, match="scheduler 'fair' is not one of deadline, feedback"):
        ServerSettings(scheduler="fair")


def test_remaining_time_is_learnt_for_each_limit_and_again_as_a_request_runs() -> None:
    remaining = PredictedRemaining(lambda tokens: 0.001 * tokens, lambda running: 0.01 * running)
    view = RequestView(99, 10, 0.0, limit=100)
    assert remaining.seconds(view, 1) == pytest.approx(0.01 + 100 * 0.01)  # nothing is known: all
    for number in range(20):
        made = 9 if number % 2 else 59
        remaining.see([RequestView(number, 10, 0.0, limit=100, made=made)])
    remaining.see([])
    assert remaining.seconds(view, 1) == pytest.approx(0.01 + 35 * 0.01)
    longer = RequestView(99, 40, 0.0, limit=100, made=30, cached=39)
    assert remaining.seconds(longer, 2) == pytest.approx(0.001 + 30 * 0.02)  # it is a long one
    other = RequestView(99, 10, 0.0, limit=1000)
    assert remaining.seconds(other, 1) > 9  # another limit
    unknown = PredictedRemaining(lambda tokens: None, lambda running: None)
    assert unknown.seconds(view, 1) == 0.0
