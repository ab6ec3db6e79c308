"""Limits of the reasoning over HTTP: kept in every mode, by every name, or refused by name."""

from __future__ import annotations

import json
import random
from dataclasses import asdict

import httpx
import openai
import pytest
from live_server import running

from deliberate.api import checkpoint
from deliberate.eval.benchmarks import serve_reasoning
from deliberate.serving.command import build_server
from deliberate.serving.protocol import ChatRequest
from deliberate.serving.settings import ServerSettings
from deliberate.utils.errors import DeliberateError

QUESTION = "Question: Tom has 3 apples and buys 4 more. How many apples does Tom have?\nAnswer:"
# Begins the reasoning itself, as the templates of reasoning models do.
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
)
TAGS = ("<think>", "</think>")


@pytest.fixture(scope="module")
def server(model, tokenizer):
    settings = ServerSettings(max_new_tokens=256, reasoning_tags=TAGS, cache_entries=8)
    return build_server(model, tokenizer, "tiny", settings)


@pytest.fixture(scope="module")
def address(server):
    with running(server) as url:
        yield url


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def chat(client, budget=12, **given):
    extra = {"thinking_token_budget": budget} if budget is not None else {}
    given = {"max_tokens": 60, "temperature": 0, "extra_body": extra} | given
    messages = [{"role": "user", "content": QUESTION}]
    return client.chat.completions.create(model="tiny", messages=messages, **given)


def test_random_requests_of_all_modes_keep_their_limit_and_have_an_answer(address):
    rng = random.Random(0)
    sent = [serve_reasoning.draw(rng, "tiny", QUESTION, chat=True, most=64) for _ in range(90)]
    counts = serve_reasoning.run(address, sent)
    assert not counts.faults, counts.faults[:3]
    assert counts.requests == 90 and len(counts.modes) > 15
    assert counts.limited > 30  # the limits do limit
    assert asdict(counts)["modes"] == counts.modes and json.dumps(asdict(counts))  # for out=


@pytest.mark.parametrize("fidelity", ["dense", "exact", "threshold"])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("form", [None, {"regex": "[0-9]{2}"}])
def test_the_tokens_themselves_keep_the_limit(server, model, fidelity, sampled, form):
    """Counted here from the tokens, not by what the server says."""
    tokenizer, engine = server.builder.tokenizer, model.engine()
    body = ChatRequest(
        model="tiny",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=48,
        temperature=float(sampled),
        seed=5,
        n=3,
        fidelity=fidelity,
        thresholds=0.5 if fidelity == "threshold" else None,
        thinking_token_budget=7,
        structured_outputs=form,
    )
    close = tokenizer.encode(TAGS[1], add_special_tokens=False)
    made: dict[int, list[int]] = {engine.add(one): [] for one in server.builder.build(body, 0.0)}
    while engine.unfinished:
        for output in engine.step():
            made[output.id] += output.tokens
    for tokens in made.values():
        place = next(i for i in range(len(tokens)) if tokens[i : i + len(close)] == close)
        assert place <= 7
        answer = tokenizer.decode(tokens[place + len(close) :], skip_special_tokens=True)
        assert answer.strip()
        assert form is None or (answer.isdigit() and len(answer) == 2)


def test_reasoning_is_apart_from_the_answer_in_whole_answers_and_in_streams(client, tokenizer):
    whole = chat(client)
    message = whole.choices[0].message
    assert message.reasoning == message.reasoning_content
    assert message.reasoning and message.content.strip()
    assert not any(tag in message.content + message.reasoning for tag in TAGS)
    assert whole.usage.completion_tokens_details.reasoning_tokens == 12
    assert whole.deliberate["reasoning_tokens"] == [12]
    assert whole.deliberate["thinking_token_budget"] == 12
    events = list(chat(client, stream=True, stream_options={"include_usage": True}))
    deltas = [e.choices[0].delta for e in events if e.choices]
    said = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
    assert said == message.reasoning == "".join(getattr(d, "reasoning", "") for d in deltas)
    assert "".join(d.content or "" for d in deltas) == message.content
    assert not any(getattr(d, "reasoning", "") and d.content for d in deltas)
    assert events[-1].usage == whole.usage


def test_every_name_of_the_limit_and_every_effort_means_the_same(client):
    want = chat(client, 12).choices[0].message
    for extra in (
        {"nvext": {"max_thinking_tokens": 12}},
        {"custom_params": {"thinking_budget": 12}},
        {"reasoning_budget_tokens": 12},
        {"thinking_budget_tokens": 12},
        {"reasoning_effort": "low"},  # a fifth of 60
    ):
        made = chat(client, extra_body=extra)
        assert made.choices[0].message == want, extra
        assert made.deliberate["thinking_token_budget"] == 12
    none = chat(client, extra_body={"reasoning_effort": "none"})
    assert none.usage.completion_tokens_details.reasoning_tokens == 0
    assert none.choices[0].message.content.strip()
    assert not hasattr(none.choices[0].message, "reasoning")
    free = chat(client, -1)
    assert free.deliberate["thinking_token_budget"] is None


def test_an_answer_of_a_given_form_follows_the_reasoning(client):
    made = chat(
        client, extra_body={"thinking_token_budget": 9, "structured_outputs": {"regex": "[ab]{3}"}}
    )
    message = made.choices[0].message
    assert made.deliberate["reasoning_tokens"] == [9] and message.reasoning
    assert set(message.content) <= set("ab") and len(message.content) == 3
    # Without a limit too, the form is that of the answer alone.
    free = chat(client, None, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert free.choices[0].message.content in ("yes", "no")
    assert free.deliberate["reasoning_tokens"][0] > 0


def test_stop_strings_end_the_answer_and_not_the_reasoning(client):
    plain = chat(client).choices[0].message
    letter = next(c for c in plain.reasoning if c in plain.content and c.strip())
    made = chat(client, stop=[letter])
    assert made.choices[0].message.reasoning == plain.reasoning
    assert made.choices[0].message.content == plain.content[: plain.content.index(letter)]


def test_a_template_that_begins_no_reasoning_leaves_the_answer_alone(client):
    extra = {"thinking_token_budget": 12, "chat_template_kwargs": {"enable_thinking": False}}
    made = chat(client, extra_body=extra)
    assert made.deliberate["reasoning_tokens"] == [0] and made.choices[0].message.content.strip()


def test_an_answer_from_the_cache_has_its_reasoning_and_a_limit_is_part_of_its_key(client):
    first, second = chat(client, 10), chat(client, 10)
    assert second.deliberate["cache"] == "hit"
    assert second.choices[0].message == first.choices[0].message
    assert second.usage == first.usage
    assert chat(client, 11).deliberate["reasoning_tokens"] == [11]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"thinking_token_budget": 5, "fidelity": "certified"}, "thinking_token_budget with fidel"),
        (
            {"reasoning_effort": "low", "nvext": {"max_thinking_tokens": 4}},
            "nvext.max_thinking_tok",
        ),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"nvext": {"max_thoughts": 1}}, "max_thoughts"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(client, extra, words):
    with pytest.raises(openai.BadRequestError, match=words):
        chat(client, extra_body=extra)


def test_a_limit_without_room_for_an_answer_is_refused_with_the_least(client):
    with pytest.raises(openai.BadRequestError, match=r"max_tokens=3 leaves no room.*at least 7"):
        chat(client, max_tokens=3)


def test_a_model_without_tags_refuses_limits_and_has_no_reasoning(model):
    tokenizer = checkpoint.load_tokenizer("tiny")
    server = build_server(model, tokenizer, "tiny", ServerSettings())
    body = {"model": "tiny", "prompt": QUESTION, "temperature": 0, "max_tokens": 8}
    with running(server) as url:
        for name, value in (("thinking_token_budget", 5), ("reasoning_effort", "low")):
            answer = httpx.post(f"{url}/v1/completions", json=body | {name: value})
            assert answer.status_code == 400
            assert f"{name}: this model marks no reasoning" in answer.json()["error"]["message"]
        made = httpx.post(f"{url}/v1/completions", json=body).json()
    assert made["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    with pytest.raises(DeliberateError, match="thinking_token_budget=4: this model marks no"):
        build_server(model, tokenizer, "tiny", ServerSettings(thinking_token_budget=4))


def test_the_servers_own_limit_is_that_of_requests_without_one(model, tokenizer):
    settings = ServerSettings(reasoning_tags=TAGS, thinking_token_budget=6)
    body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}]}
    with running(build_server(model, tokenizer, "tiny", settings)) as url:
        answer = httpx.post(
            f"{url}/v1/chat/completions", json=body | {"max_tokens": 40, "temperature": 0}
        )
        made = json.loads(answer.text)
    assert made["deliberate"]["thinking_token_budget"] == 6
    assert made["deliberate"]["reasoning_tokens"] == [6]
