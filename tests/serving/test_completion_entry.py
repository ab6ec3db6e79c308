"""Completions are read before the framework routes, as strictly as behind it; readers catch up."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from live_server import running

from deliberate.serving.command import build_server
from deliberate.serving.completion_entry import CHAT, TEXT, read_body
from deliberate.serving.errors import ApiError
from deliberate.serving.flight import Flight
from deliberate.serving.parts import Part, PartStream, Ticket
from deliberate.serving.protocol import ChatRequest, CompletionRequest
from deliberate.serving.service import EngineFailed
from deliberate.serving.settings import ServerSettings
from deliberate.serving.text import TokenText

TEMPLATE = None
BODY = {"model": "tiny", "prompt": [1, 2, 3]}


def read(body=BODY, kind=CompletionRequest, content_type="application/json"):
    return read_body(kind, content_type, body if isinstance(body, bytes) else json.dumps(body))


def refusal(**given) -> ApiError:
    with pytest.raises(ApiError) as error:
        read(**given)
    return error.value


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/x+json"])
def test_a_body_of_json_is_read(kind) -> None:
    assert read(content_type=kind).prompt == [1, 2, 3]


@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/xjson", "x/y+json"])
def test_another_type_is_refused_since_any_page_may_send_it(kind) -> None:
    error = refusal(content_type=kind)
    assert error.status == 415 and "application/json" in error.message


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "Invalid JSON"),
        (b"{", "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "Invalid JSON"),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', "temperature"),
        (BODY | {"best_of": 2}, "best_of: this server does not know the field"),
        (BODY | {"n": 0}, "n: "),
        ([], "Input should be"),
    ],
)
def test_what_is_no_completion_is_a_400_that_says_why(body, said) -> None:
    error = refusal(body=body)
    assert error.status == 400 and said in error.message and "\n" not in error.message


def test_a_chat_is_read_as_a_chat() -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
    assert isinstance(read(body, ChatRequest), ChatRequest)
    assert "prompt: this server" in refusal(body=BODY, kind=ChatRequest).message


def test_other_methods_and_paths_are_the_routers(model, tokenizer) -> None:
    server = build_server(model, tokenizer, "tiny", ServerSettings())
    with running(server) as url:
        assert httpx.get(url + TEXT).status_code == 405
        assert httpx.post(url + "/v1/nothing", json={}).status_code == 404
        assert httpx.post(url + CHAT, content=b"x").status_code == 415
        answer = httpx.post(url + TEXT, json=BODY | {"max_tokens": 2})
        assert answer.status_code == 200 and answer.headers["x-request-id"]


def test_a_reader_that_falls_behind_gets_all_that_has_come_at_once() -> None:
    async def run():
        ticket = Ticket(None, asyncio.get_running_loop())
        stream = PartStream(ticket, lambda _: None)
        for token in (1, 2):
            stream.put(Part([token]))
        stream.put(EngineFailed("broken"))
        found = [part.tokens for part in await stream.ready()]
        with pytest.raises(EngineFailed):  # after what had come before it
            await stream.ready()
        return found

    assert asyncio.run(run()) == [[1], [2]]


def test_the_pieces_of_an_answer_are_handed_out_together_where_they_wait_together() -> None:
    class Source:
        index, done, finish = 0, False, "length"
        made = 0

        async def more(self):
            self.made += 1
            self.done = self.made == 3
            return [TokenText(str(self.made), 0)]

        def choice(self):
            return None

        def close(self):
            pass

    async def run():
        reader = Flight([Source()]).reader()
        await asyncio.sleep(0.01)
        first = await reader.ready()
        return [one.text for one in first], await reader.ready()

    assert asyncio.run(run()) == (["1", "2", "3"], [])
