"""Log-probabilities over HTTP: those of the model, in OpenAI's form, streamed as whole."""

from __future__ import annotations

import httpx
import openai
import pytest
import torch
from live_server import running

from deliberate.engine.logprobs import TokenLogprobs
from deliberate.serving.command import build_server
from deliberate.serving.logprobs import TokenNames
from deliberate.serving.settings import ServerSettings

QUESTION = "Question: Tom has 3 apples and buys 4 more. How many apples does Tom have?\nAnswer:"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
CHAT = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def address(model, tokenizer):
    with running(build_server(model, tokenizer, "tiny", ServerSettings())) as url:
        yield url


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@torch.no_grad()
def rows(model, tokenizer, text: str):
    """Log-probabilities by transformers after each token of the question and a text."""
    prompt, made = (tokenizer.encode(one, add_special_tokens=False) for one in (QUESTION, text))
    logits = model.base(torch.tensor([[*prompt, *made]])).logits[0, len(prompt) - 1 :]
    return made, logits.float().log_softmax(-1)


@pytest.mark.parametrize("fidelity", ["dense", "exact"])
@pytest.mark.parametrize("temperature", [0.0, 1.4])
def test_a_chats_are_the_models_own_whatever_the_temperature(
    client, model, tokenizer, fidelity, temperature
) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, logprobs=True, top_logprobs=4, temperature=temperature, seed=3,
        max_tokens=30, extra_body={"fidelity": fidelity, "top_k": 5},
    )  # fmt: skip
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    made, expected = rows(model, tokenizer, answer.choices[0].message.content)
    for token, row, one in zip(made, expected, content, strict=False):
        assert one.token == tokenizer.decode([token]) and bytes(one.bytes).decode() == one.token
        assert one.logprob == pytest.approx(float(row[token]), abs=2e-3)
        best = row.topk(4).values.tolist()
        assert [other.logprob for other in one.top_logprobs] == pytest.approx(best, abs=2e-3)
    assert len(content) >= len(made) > 5


@pytest.mark.parametrize("fidelity", ["exact", "threshold"])
def test_a_stream_has_those_of_the_whole_answer(client, fidelity) -> None:
    given = {"model": "tiny", "messages": CHAT, "logprobs": True, "top_logprobs": 2, "n": 2,
             "temperature": 1.3, "seed": 5, "max_tokens": 24,
             "extra_body": {"fidelity": fidelity}}  # fmt: skip
    whole = client.chat.completions.create(**given)
    events = list(client.chat.completions.create(stream=True, **given))
    for index in (0, 1):
        mine = [c for e in events for c in e.choices if c.index == index]
        parts = [one for c in mine if c.logprobs for one in c.logprobs.content]
        assert [(one.token, one.bytes) for one in parts] == [
            (one.token, one.bytes) for one in whole.choices[index].logprobs.content
        ]
        theirs = [one.logprob for one in whole.choices[index].logprobs.content]
        assert [one.logprob for one in parts] == pytest.approx(theirs, abs=2e-3)
    plain = client.chat.completions.create(**given | {"logprobs": None, "top_logprobs": None})
    assert plain.choices[0].logprobs is None
    assert plain.choices[0].message.content == whole.choices[0].message.content


def test_a_completions_name_the_chosen_token_and_where_it_begins(client) -> None:
    given = {"model": "tiny", "prompt": QUESTION, "max_tokens": 20, "temperature": 1.5, "seed": 2}
    answer = client.completions.create(logprobs=1, **given)
    made, text = answer.choices[0].logprobs, answer.choices[0].text
    assert len(made.tokens) == len(made.token_logprobs) == len(made.text_offset)
    assert len(made.tokens) == answer.usage.completion_tokens > 10
    for token, logprob, top, offset in zip(
        made.tokens, made.token_logprobs, made.top_logprobs, made.text_offset, strict=True
    ):
        assert top[token] == logprob and 1 <= len(top) <= 2
        assert text[offset:].startswith(token) or (offset == len(text) and token == "<|eos|>")
    events = list(client.completions.create(logprobs=1, stream=True, **given))
    parts = [c.logprobs for e in events for c in e.choices if c.logprobs is not None]
    assert [one for part in parts for one in part.tokens] == made.tokens
    assert [one for part in parts for one in part.text_offset] == made.text_offset


def test_a_token_that_is_no_whole_character_has_its_bytes(tokenizer) -> None:
    names, text = TokenNames(tokenizer), "€ 5 \N{SNOWMAN}"
    found = [names.of(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    assert bytes(byte for _, raw in found for byte in raw).decode() == text
    assert any(name == "bytes:\\xe2" for name, _ in found)
    assert names.entry(0, TokenLogprobs(float("-inf"), ()))["logprob"] == -9999.0


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", {"prompt": "a", "logprobs": 21}, "logprobs"),
        ("completions", {"prompt": "a", "top_logprobs": 2}, "top_logprobs: this server"),
        ("chat/completions", {"messages": CHAT, "top_logprobs": 2}, "needs logprobs=true"),
        ("chat/completions", {"messages": CHAT, "logprobs": True, "top_logprobs": 21}, "top_log"),
    ],
)
def test_what_cannot_be_given_is_refused_by_name(address, path, body, message) -> None:
    answer = httpx.post(f"{address}/v1/{path}", json={"model": "tiny"} | body)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
