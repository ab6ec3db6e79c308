"""The OpenAI surface: right answers, clean refusals, no harm to neighbours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from live_server import held, running, sent, wait_until

from deliberate.api import checkpoint
from deliberate.serving.command import build_server
from deliberate.serving.settings import ServerSettings
from deliberate.utils.errors import DeliberateError

QUESTION = "Question: Tom has {} apples and buys 4 more. How many apples does Tom have?\nAnswer:"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def server(model, tokenizer):
    return build_server(model, tokenizer, "tiny", ServerSettings(max_new_tokens=512))


@pytest.fixture(scope="module")
def address(server):
    with running(server) as url:
        yield url


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def complete(client, number=3, **given):
    given = {"max_tokens": 40, "temperature": 0} | given
    return client.completions.create(model="tiny", prompt=QUESTION.format(number), **given)


def generated(model, tokenizer, number=3, **given) -> str:
    ids = torch.tensor([tokenizer.encode(QUESTION.format(number))])
    made = model.generate(ids, **({"max_new_tokens": 40, "do_sample": False} | given))
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True,
                            clean_up_tokenization_spaces=False)  # fmt: skip


@pytest.mark.parametrize("fidelity", ["dense", "exact"])
def test_answers_are_those_of_generate(client, model, tokenizer, fidelity) -> None:
    made = complete(client, extra_body={"fidelity": fidelity})
    assert made.choices[0].text == generated(model, tokenizer, fidelity=fidelity)
    facts = made.model_extra["deliberate"]
    assert facts["fidelity"] == fidelity and facts["num_layers"] == 8
    assert (facts["layers_per_token"] == 8) == (fidelity == "dense")
    assert made.usage.completion_tokens == len(facts["exit_layers"][0])
    assert made.choices[0].finish_reason == "stop"


def test_a_seed_draws_what_generate_draws_and_choices_have_seeds_of_their_own(
    client, model, tokenizer
) -> None:
    sampled = {"temperature": 1.3, "top_p": 0.9, "extra_body": {"top_k": 20}}
    made = complete(client, seed=5, n=3, **sampled)
    texts = [choice.text for choice in made.choices]
    for index, text in enumerate(texts):
        assert text == complete(client, seed=5 + index, **sampled).choices[0].text
        own = generated(model, tokenizer, seed=5 + index, do_sample=True, temperature=1.3,
                        top_p=0.9, top_k=20)  # fmt: skip
        assert text == own
    assert len(set(texts)) > 1


def test_a_text_begins_with_the_begin_token_unless_told_otherwise(client, tokenizer) -> None:
    ids = tokenizer.encode(QUESTION.format(3))
    assert ids[0] == tokenizer.bos_token_id
    for special, own in ((True, ids), (False, ids[1:])):
        text = complete(client, extra_body={"add_special_tokens": special})
        same = client.completions.create(model="tiny", prompt=own, max_tokens=40, temperature=0)
        assert text.usage.prompt_tokens == len(own)
        assert text.choices[0].text == same.choices[0].text


def test_a_stream_adds_up_to_the_whole_answer(client) -> None:
    whole = complete(client)
    events = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(e.choices[0].text for e in events if e.choices) == whole.choices[0].text
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "stop"
    assert events[-1].choices == [] and events[-1].usage == whole.usage
    assert events[-1].model_extra["deliberate"]["exit_layers"]
    assert len(events) > 3


def test_a_stream_tells_the_layer_of_each_token_where_that_is_asked_for(client) -> None:
    given = {"stream": True, "n": 2, "extra_body": {"fidelity": "threshold"}}
    events = list(complete(client, stream_options={"include_depth": True}, **given))
    layers = events[-1].model_extra["deliberate"]["exit_layers"]
    for index in (0, 1):
        mine = [c for e in events for c in e.choices if c.index == index]
        depths = [one for c in mine for one in c.model_extra.get("token_depths", [])]
        assert [layer for _, layer in depths] == layers[index]
        assert "".join(text for text, _ in depths) == "".join(c.text for c in mine)
    plain = list(complete(client, **given))
    assert not any("token_depths" in c.model_extra for e in plain for c in e.choices)


def test_a_chat_is_rendered_by_the_models_template_and_streamed(client, tokenizer) -> None:
    messages = [{"role": "user", "content": "What is 2 plus 2?"}]
    given = {"model": "tiny", "messages": messages, "temperature": 0}
    whole = client.chat.completions.create(max_completion_tokens=12, **given)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert whole.usage.prompt_tokens == len(tokenizer.encode(prompt, add_special_tokens=False))
    assert whole.choices[0].message.role == "assistant"
    events = list(client.chat.completions.create(stream=True, n=2, max_tokens=12, **given))
    for index in (0, 1):
        mine = [c.delta for e in events for c in e.choices if c.index == index]
        assert mine[0].role == "assistant"
        assert "".join(d.content or "" for d in mine) == whole.choices[0].message.content


def test_an_answer_has_the_form_that_was_asked_for(client) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    made = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "2 plus 2?"}], max_tokens=40,
        temperature=1.2, seed=3, n=2, response_format=form,
    )  # fmt: skip
    for choice in made.choices:
        assert set(json.loads(choice.message.content)) == {"n"} and choice.finish_reason == "stop"
    for fidelity in ("dense", "exact"):
        extra = {"fidelity": fidelity, "structured_outputs": {"choice": ["yes", "no"]}}
        assert complete(client, extra_body=extra).choices[0].text in ("yes", "no")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(client, stream) -> None:
    whole = complete(client).choices[0].text
    stop = whole[4:7]
    made = complete(client, stop=["nowhere", stop], stream=stream)
    texts = [e.choices[0].text for e in made if e.choices] if stream else [made.choices[0].text]
    assert "".join(texts) == whole[: whole.index(stop)]


def test_many_clients_get_what_each_gets_alone(client, address, server) -> None:
    def ask(number: int) -> str:
        fidelity = "exact" if number % 2 else "dense"
        mine = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        return (
            complete(mine, number, max_tokens=24, extra_body={"fidelity": fidelity}).choices[0].text
        )

    alone = [complete(client, number, max_tokens=24).choices[0].text for number in range(2, 26)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(2, 26))) == alone
    assert wait_until(lambda: server.service.unfinished == 0)
    assert wait_until(lambda: server.service.stats.running == 0)


def test_a_client_that_goes_away_frees_its_place(model, tokenizer) -> None:
    server = endless(model, tokenizer)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 900, "stream": True, "seed": 1}
    with running(server) as url:
        with held(server.service, after=8):
            with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                assert server.service.unfinished == 1
            assert wait_until(lambda: server.service.unfinished == 0)
        assert wait_until(lambda: server.service.stats.running == 0)
        assert server.service.stats.aborted == 1


def test_a_client_that_goes_away_before_a_whole_answer_frees_its_place(model, tokenizer) -> None:
    server = endless(model, tokenizer)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 900, "seed": 1}
    with running(server) as url:
        with held(server.service, after=8):
            client = sent(url, "/v1/completions", body)
            assert wait_until(lambda: server.service.stats.tokens > 0)
            client.close()
            assert wait_until(lambda: server.service.unfinished == 0)
        assert wait_until(lambda: server.service.stats.aborted == 1)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"foo": 1}, 400, "foo: this server does not know the field"),
        ({"logit_bias": {"1": 5}}, 400, "logit_bias"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": float("nan")}, 400, ""),
        ({"max_tokens": 10**9}, 400, "max_tokens=1000000000: this server makes 512 at most"),
        ({"n": 9}, 400, "n=9: at most 8"),
        ({"n": 0}, 400, "n: "),
        ({"model": "other"}, 404, "'other' is not served here"),
        ({"fidelity": "perfect"}, 400, "fidelity"),
        ({"fidelity": "dense", "thresholds": 3}, 400, "threshold"),
        ({"prompt": []}, 400, "prompt: "),
        ({"prompt": ""}, 400, "prompt: String should have at least 1 character"),
        ({"Odd-[name]": 1}, 400, "Odd-[name]: this server does not know the field"),
        ({"prompt": [10**6]}, 400, "token id 1000000"),
        ({"prompt": "a" * 100_000}, 400, "this server takes 8192 at most"),
        ({"stop": [""]}, 400, "stop"),
        ({"stream_options": {"include_all": True}}, 400, "stream_options.include_all: this server"),
        ({"structured_outputs": {"regex": "("}}, 400, "unclosed group"),
        ({"structured_outputs": {"poem": "sad"}}, 400, "'poem' is not one of"),
        ({"fidelity": "certified", "epsilon": 1e-9}, 400, "certificate"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_obeyed_is_refused_by_name(address, body, status, message, stream) -> None:
    given = {"model": "tiny", "prompt": "a", "max_tokens": 4, "temperature": 0, "stream": stream}
    answer = httpx.post(
        f"{address}/v1/completions",
        content=json.dumps(given | body),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == status
    text = answer.json()["error"]["message"]
    assert message in text and "\n" not in text


def test_stream_options_without_a_stream_are_refused(address) -> None:
    body = {"model": "tiny", "prompt": "a", "stream_options": {"include_usage": True}}
    answer = httpx.post(f"{address}/v1/completions", json=body)
    assert answer.status_code == 400 and "without stream" in answer.json()["error"]["message"]


def test_no_template_sends_chats_to_completions(model) -> None:
    plain = checkpoint.load_tokenizer("tiny")
    with running(build_server(model, plain, "tiny", ServerSettings())) as url:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 400 and "/v1/completions" in answer.json()["error"]["message"]


def test_a_key_is_needed_where_keys_are_set_but_not_for_health(model, tokenizer) -> None:
    settings = ServerSettings(api_keys=("secret",), max_body_bytes=200)
    with running(build_server(model, tokenizer, "tiny", settings)) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{url}/v1/models", headers=headers).json()["data"][0]["id"] == "tiny"
        large = {"model": "tiny", "prompt": "a" * 300}
        assert httpx.post(f"{url}/v1/completions", json=large, headers=headers).status_code == 413


def endless(model, tokenizer, **settings):
    """A server whose answers end at their limit only."""
    server = build_server(model, tokenizer, "tiny", ServerSettings(**settings))
    server.builder.end_tokens = ()
    return server


def test_a_full_queue_is_answered_429_with_retry_after(model, tokenizer) -> None:
    server = endless(model, tokenizer, max_running=1, max_waiting=0)
    with running(server) as url:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 900, "seed": 1, "stream": True}
        with (
            held(server.service, after=8),
            httpx.stream("POST", f"{url}/v1/completions", json=body) as first,
        ):
            lines = first.iter_lines()
            next(lines)
            second = httpx.post(f"{url}/v1/completions", json=body)
        assert second.status_code == 429 and second.headers["retry-after"] == "1"


def test_a_request_that_takes_too_long_ends_with_what_it_has(model, tokenizer) -> None:
    with running(endless(model, tokenizer, timeout_seconds=0.15)) as url:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 4000, "seed": 3, "temperature": 2}
        answer = httpx.post(f"{url}/v1/completions", json=body)
    made = answer.json()
    assert answer.status_code == 200 and made["choices"][0]["finish_reason"] == "length"
    assert made["usage"]["completion_tokens"] < 4000


def test_metrics_count_what_was_done(address, client) -> None:
    complete(client, extra_body={"deadline_ms": 60_000})
    assert complete(client, extra_body={"deadline_ms": 60_000}).model_extra["deliberate"][
        "deadline_met"
    ]
    page = httpx.get(f"{address}/metrics").text
    for name in (
        "vllm:num_requests_running", "vllm:generation_tokens_total", "deliberate:exit_layer_bucket",
        "vllm:time_to_first_token_seconds_count", 'finished_reason="stop"',
        'deliberate:requests_refused_total{model_name="tiny",status="400"}',
        "deliberate:deadlines_missed_total", "deliberate:deadlines_kept_total",
    ):  # fmt: skip
        assert name in page, name


def test_requests_with_the_same_beginning_share_its_blocks(model, tokenizer) -> None:
    server = build_server(model, tokenizer, "tiny", ServerSettings(block_tokens=8))
    with running(server) as url:
        mine = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        first = complete(mine, 3)
        ran = server.service.stats.prefilled
        second = complete(mine, 3)
        assert second.choices[0].text == first.choices[0].text == generated(model, tokenizer)
        assert server.service.stats.prefilled - ran <= first.usage.prompt_tokens % 8 + 8


@pytest.mark.parametrize(
    "given",
    [{"block_tokens": 0}, {"port": 70_000}, {"max_running": 0}, {"timeout_seconds": 0},
     {"api_keys": (" ",)}, {"max_waiting": -1}],
)  # fmt: skip
def test_settings_that_cannot_be_are_one_line(given) -> None:
    with pytest.raises(
        DeliberateError, match=next(iter(given)).replace("api_keys", "API key")
    ) as error:
        ServerSettings(**given)
    assert "\n" not in str(error.value)


def test_a_signal_lets_the_running_request_finish_and_exits_with_0() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "deliberate.cli.app", "serve", "tiny", "--port", "0"],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        url = line.split()[-1]
        body = {"model": "tiny", "prompt": "a", "max_tokens": 600, "seed": 1, "temperature": 2.0,
                "stream": True}  # fmt: skip
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
            refused = httpx.post(f"{url}/v1/completions", json=body)
            assert refused.status_code == 503
            rest = list(lines)
        assert rest[-2] == "data: [DONE]" or "data: [DONE]" in rest
        assert process.wait(60) == 0
    finally:
        process.kill()
