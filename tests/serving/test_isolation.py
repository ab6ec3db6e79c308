"""A request that does harm ends with an error of its own; its neighbours get their answers."""

from __future__ import annotations

import asyncio
import math
import socket

import httpx
import pytest
from live_server import at_rest, running, sent, wait_until
from tiny_models import random_ids, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.engine.request import Request
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.spec import DecodingSpec
from deliberate.serving.command import build_server
from deliberate.serving.service import EngineFailed, EngineService
from deliberate.serving.settings import ServerSettings

TOKENS = 10


class Failing(LogitsProcessor):
    """A processor that raises, or makes scores not a number, from its n-th token on."""

    def __init__(self, after: int, nan: bool) -> None:
        self.after, self.nan, self.calls = after, nan, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls <= self.after:
            return scores
        if self.nan:
            return scores * math.nan
        raise RuntimeError("a processor failed")


class BadGrammar:
    """A constraint that fails at its third token."""

    finished = False

    def __init__(self) -> None:
        self.held = 0

    def mask(self, scores):
        if self.held >= 3:
            raise RuntimeError("a grammar failed")
        return scores

    def advance(self, token):
        self.held += 1

    def rollback(self, count):
        self.held -= count

    def forced(self):
        return []


@pytest.fixture(scope="module")
def model():
    return AdaptiveModel(tiny_model("llama"), exits=(1, 2))


def request(place: int, **given) -> Request:
    spec = {"fidelity": "exact", "thresholds": 0.02} if place % 2 else {"fidelity": "dense"}
    return Request(
        random_ids(4 + place, seed=place)[0],
        TOKENS,
        spec=DecodingSpec(gate=False, **spec),
        end_tokens=(),
        **given,
    )


def answers(service: EngineService, wanted: list[Request]) -> list[list[int] | str]:
    """Tokens of each request, or why it failed."""

    async def one(given: Request):
        stream, tokens = service.open(given), []
        try:
            while True:
                part = await asyncio.wait_for(stream.next(), 20)
                tokens += part.tokens
                if part.finished is not None:
                    return tokens
        except EngineFailed as error:
            return str(error)
        finally:
            stream.close()

    async def every():
        return await asyncio.gather(*map(one, wanted))

    return asyncio.run(every())


@pytest.fixture
def service(model):
    made = EngineService(model.engine(max_running=8))
    made.start()
    yield made
    made.stop()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda: {"sampling": TokenChooser(LogitsProcessorList([Failing(3, False)]))}, "processor"),
        (lambda: {"constraint": BadGrammar()}, "a grammar failed"),
    ],
)
@pytest.mark.parametrize("place", [0, 3, 7])
def test_the_neighbours_of_a_request_that_fails_get_what_they_get_alone(
    service, harm, message, place
) -> None:
    expected = answers(service, [request(k) for k in range(8)])
    made = answers(service, [request(k, **(harm() if k == place else {})) for k in range(8)])
    assert "this request failed" in made[place] and message in made[place]
    assert "\n" not in made[place]
    assert made[:place] + made[place + 1 :] == expected[:place] + expected[place + 1 :]
    assert service.healthy and wait_until(lambda: service.stats.running == 0)


def test_two_culprits_are_found_and_six_neighbours_finish(service) -> None:
    expected = answers(service, [request(k) for k in range(8)])
    harm = {2: {"constraint": BadGrammar()}, 5: {"constraint": BadGrammar()}}
    made = answers(service, [request(k, **harm.get(k, {})) for k in range(8)])
    assert [k for k, one in enumerate(made) if isinstance(one, str)] == [2, 5]
    assert [one for k, one in enumerate(made) if k not in harm] == [
        one for k, one in enumerate(expected) if k not in harm
    ]


@pytest.mark.parametrize("sample", [False, True])
def test_scores_that_are_not_numbers_harm_no_neighbour(service, sample) -> None:
    expected = answers(service, [request(k) for k in range(6)])
    harm = TokenChooser(LogitsProcessorList([Failing(2, True)]), sample=sample, seed=1)
    made = answers(
        service, [request(k, **({"sampling": harm} if k == 2 else {})) for k in range(6)]
    )
    assert made[:2] + made[3:] == expected[:2] + expected[3:]
    assert answers(service, [request(0)]) == expected[:1]


def test_a_step_that_fails_once_costs_nobody_anything(service, monkeypatch) -> None:
    expected = answers(service, [request(k) for k in range(6)])
    step, left = service._engine.step, [1, 2]

    def flaky():
        made = step()
        if left and service._engine.stats().running == 6:
            left.pop()
            raise RuntimeError("a kernel failed")
        return made

    # The outputs of the failed step are still the engine's.
    monkeypatch.setattr(service._engine, "step", flaky)
    assert answers(service, [request(k) for k in range(6)]) == expected and not left


def test_an_engine_that_fails_without_a_culprit_is_replaced_and_says_so() -> None:
    model, tokenizer = AdaptiveModel.from_pretrained("tiny"), checkpoint.load_tokenizer("tiny")
    server = build_server(model, tokenizer, "tiny", ServerSettings())

    def broken():
        raise RuntimeError("a kernel failed")

    body = {"model": "tiny", "prompt": "a", "max_tokens": 4, "temperature": 0}
    with running(server) as url:
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
        assert at_rest(server.service)
        server.service._engine.step = broken
        answer = httpx.post(f"{url}/v1/completions", json=body)
        assert answer.status_code == 503 and "a kernel failed" in answer.json()["error"]["message"]
        assert wait_until(lambda: httpx.get(f"{url}/health").status_code == 200)
        assert "a kernel failed" in httpx.get(f"{url}/health").json()["restarts"][0]["reason"]
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200


def test_half_of_a_hundred_clients_go_and_their_places_are_free_again() -> None:
    model, tokenizer = AdaptiveModel.from_pretrained("tiny"), checkpoint.load_tokenizer("tiny")
    settings = ServerSettings(max_running=8, block_tokens=8, max_prompt_tokens=64)
    server = build_server(model, tokenizer, "tiny", settings)
    server.builder.end_tokens = ()
    service = server.service

    def asked(url: str, number: int) -> socket.socket:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 4000, "stream": True, "seed": number}
        return sent(url, "/v1/completions", body)

    with running(server) as url:
        free = service.stats.free_blocks
        clients = [asked(url, number) for number in range(100)]
        assert wait_until(lambda: service.unfinished == 100 and service.stats.running == 8)
        for client in clients[:50]:  # the eight that run are among them
            client.close()
        # On a slow machine some of the others are answered before the last is given up.
        assert wait_until(lambda: service.unfinished <= 50 and service.stats.aborted == 50)
        assert wait_until(lambda: service.stats.running == 8)
        assert clients[50].recv(64).startswith(b"HTTP/1.1 200")  # its turn has come
        for client in clients[50:]:
            client.close()
        assert wait_until(lambda: service.unfinished == 0 and service.stats.running == 0)
        assert service.stats.free_blocks == free and service.stats.aborted > 50


def test_the_parts_of_a_step_wake_the_readers_loop_once(service, monkeypatch) -> None:
    from deliberate.serving import parts

    woken: list[int] = []

    def counted(given) -> None:
        woken.append(len(given))
        hand_over(given)

    hand_over = parts.hand_over
    monkeypatch.setattr("deliberate.serving.service.hand_over", counted)
    made = answers(service, [request(k) for k in range(6)])
    assert len(made) == 6 and max(woken) == 6
