"""The bundled reasoning model answers chats, its reasoning apart and within its budget."""

from __future__ import annotations

import httpx
import pytest
from live_server import running

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.data.prompts import Encoder
from deliberate.serving.command import build_server
from deliberate.serving.settings import ServerSettings

QUESTION = "Tom has 3 apples and buys 4 more. How many apples does Tom have?"


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load_tokenizer("tiny-chain")


@pytest.fixture(scope="module")
def address(tokenizer):
    model = AdaptiveModel.from_pretrained("tiny-chain")
    with running(build_server(model, tokenizer, "tiny-chain", ServerSettings())) as url:
        yield url


def chat(url: str, *messages: tuple[str, str], **given) -> httpx.Response:
    turns = [{"role": role, "content": content} for role, content in messages]
    body = {"model": "tiny-chain", "messages": turns, "max_tokens": 300, "temperature": 0} | given
    return httpx.post(f"{url}/v1/chat/completions", json=body)


def test_a_question_is_put_to_it_as_it_was_trained(tokenizer) -> None:
    trained = Encoder(tokenizer, max_tokens=1024)
    chats = Encoder(tokenizer, max_tokens=1024, chat=True)
    assert chats.prompt(QUESTION) == trained.prompt(QUESTION)


def test_its_reasoning_comes_apart_from_the_answer_and_keeps_its_budget(address) -> None:
    made = chat(address, ("user", QUESTION)).json()
    message, usage = made["choices"][0]["message"], made["usage"]
    assert "7" in message["content"] and "<think>" not in message["content"]
    spent = usage["completion_tokens_details"]["reasoning_tokens"]
    assert message["reasoning"] and spent > 8
    cut = chat(address, ("user", QUESTION), thinking_token_budget=8).json()
    assert cut["choices"][0]["message"]["content"].strip()
    assert cut["deliberate"]["reasoning_tokens"] == [8]
    again = chat(address, ("user", QUESTION), ("assistant", message["content"]), ("user", QUESTION))
    assert again.json()["choices"][0]["message"]["content"].strip()


def test_a_role_that_it_does_not_know_is_refused(address) -> None:
    refused = chat(address, ("system", "Be brief."), ("user", QUESTION))
    assert refused.status_code == 400 and "user and assistant alone" in refused.text
