"""The front of several replicas: a server's own answers, one retry, and clean refusals."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from live_server import wait_until
from prometheus_client.parser import text_string_to_metric_families

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.serving.command import build_server
from deliberate.serving.scale.fleet_settings import FleetSettings, check_replicable
from deliberate.serving.scale.front import Front
from deliberate.serving.scale.messages import Overloaded, ReplicaLost, described
from deliberate.serving.scale.prefix_affinity import prefix_keys
from deliberate.serving.scale.replica import EngineReplica
from deliberate.serving.scale.replica_score import RequestSize
from deliberate.serving.settings import QuotaSettings, ServerSettings
from deliberate.utils.errors import DeliberateError

BODY = {"model": "tiny", "prompt": "Question: Tom has 3 apples", "max_tokens": 12, "temperature": 0}


class FakeReplicas:
    """Replicas in this process. `faults` are raised, one for each request, before or (with a
    number) after so many parts; None is no fault."""

    def __init__(self, replicas: dict[str, EngineReplica]) -> None:
        self.replicas = replicas
        self.faults: list = []
        self.asked = 0

    async def open(self, call):
        names = list(self.replicas)
        replica = self.replicas[names[self.asked % len(names)]]
        self.asked += 1
        fault, after = (self.faults.pop(0) if self.faults else None), 0
        if isinstance(fault, tuple):
            fault, after = fault
        if fault is not None and after == 0:
            raise fault
        count = 0
        async for reply in replica.answer(call):
            if fault is not None and count == after:
                raise fault
            count += 1
            yield reply

    async def metrics(self):
        return {name: one.metrics() for name, one in self.replicas.items()}

    async def health(self):
        return {name: one.health() for name, one in self.replicas.items()}


@pytest.fixture(scope="module")
def made():
    model, tokenizer = AdaptiveModel.from_pretrained("tiny"), checkpoint.load_tokenizer("tiny")
    settings = ServerSettings(max_new_tokens=512, api_keys=("secret",))
    built = {name: EngineReplica(build_server(model, tokenizer, "tiny", settings)) for name in "ab"}
    yield built
    for one in built.values():
        one.stop()


@pytest.fixture
def replicas(made):
    return FakeReplicas(made)


@pytest.fixture
def front(replicas):
    return Front(replicas, ServerSettings(max_body_bytes=1 << 16), retry_after=3)


def ask(front: Front, method: str = "POST", path: str = "/v1/completions", key="secret", **given):
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(front.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            headers = {"Authorization": f"Bearer {key}"}
            return await client.request(method, path, headers=headers, **given)

    return asyncio.run(send())


def tokens_of(answer: httpx.Response) -> int:
    return answer.json()["usage"]["completion_tokens"]


def events(text: str) -> list:
    return [json.loads(one) for one in text.split("data: ")[1:] if not one.startswith("[DONE]")]


def test_answers_are_those_of_a_server_whole_and_streamed(front) -> None:
    whole = ask(front, json=BODY)
    assert whole.status_code == 200 and whole.headers["x-request-id"]
    text = whole.json()["choices"][0]["text"]
    assert len(whole.json()["deliberate"]["exit_layers"][0]) == tokens_of(whole)
    streamed = ask(front, json=BODY | {"stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    pieces = [one["choices"][0]["text"] for one in events(streamed.text) if one["choices"]]
    assert "".join(pieces) == text and streamed.text.rstrip().endswith("[DONE]")
    assert front.unfinished == 0


def test_refusals_of_a_replica_are_handed_on(front) -> None:
    assert ask(front, json=BODY, key="wrong").status_code == 401
    unknown = ask(front, json=BODY | {"colour": 1})
    assert unknown.status_code == 400 and "colour" in unknown.json()["error"]["message"]
    assert ask(front, content=b"{").status_code == 415  # no Content-Type
    assert ask(front, "GET", "/v1/models").json()["data"][0]["id"] == "tiny"
    assert ask(front, "GET", "/nothing").status_code == 404


def test_a_replica_that_ends_first_costs_a_retry_and_no_answer(front, replicas) -> None:
    expected = ask(front, json=BODY).json()["choices"]
    replicas.faults = [ReplicaLost()]
    asked = replicas.asked
    assert ask(front, json=BODY).json()["choices"] == expected
    assert (replicas.asked - asked, front.retried) == (2, 1)


def test_the_second_replica_that_ends_is_a_503_that_says_so(front, replicas) -> None:
    replicas.faults = [ReplicaLost(), ReplicaLost()]
    answer = ask(front, json=BODY)
    assert answer.status_code == 503 and "try again" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"] == "3" and front.unfinished == 0


def test_a_stream_that_has_begun_ends_with_an_error_event(front, replicas) -> None:
    replicas.faults = [(ReplicaLost(), 1)]
    text = ask(front, json=BODY | {"stream": True, "max_tokens": 200}).text
    assert "try again" in events(text)[-1]["error"]["message"] and "[DONE]" not in text
    assert front.unfinished == 0


def test_too_many_in_front_are_answered_429_with_a_time(front, replicas) -> None:
    replicas.faults = [Overloaded("4 requests wait already")]
    answer = ask(front, json=BODY)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "3"
    assert "4 requests wait" in answer.json()["error"]["message"]


def test_a_draining_front_takes_no_request_and_says_so(front) -> None:
    assert ask(front, "GET", "/health").json()["status"] == "ok"
    front.draining = True
    assert ask(front, json=BODY).status_code == 503
    health = ask(front, "GET", "/health")
    assert health.status_code == 503 and health.json()["status"] == "draining"


def test_no_replica_is_not_healthy(front, replicas) -> None:
    replicas.replicas = {}
    assert ask(front, "GET", "/health").status_code == 503


def test_what_the_front_refuses_itself(front) -> None:
    assert ask(front, content=b"x" * (1 << 17)).status_code == 413
    admin = ask(front, "GET", "/admin/versions")
    assert admin.status_code == 404 and "--replicas" in admin.json()["error"]["message"]


def test_metrics_of_all_replicas_are_one_page(front) -> None:
    ask(front, json=BODY)
    page = ask(front, "GET", "/metrics").text
    found = {one.name: one for one in text_string_to_metric_families(page)}
    tokens = found["vllm:generation_tokens"].samples
    assert {one.labels["replica"] for one in tokens} == {"a", "b"}
    assert sum(one.value for one in tokens if one.name.endswith("_total")) > 0
    assert page.count("# TYPE vllm:generation_tokens_total") == 1


def test_a_client_that_goes_away_frees_the_replica(front, made) -> None:
    async def run() -> None:
        sent, gone = [], asyncio.Event()
        body = json.dumps(BODY | {"max_tokens": 500, "stream": True}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message) -> None:
            sent.append(message)
            if len(sent) > 2:
                gone.set()

        scope = {
            **{"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}},
            **{"http_version": "1.1", "method": "POST", "path": "/v1/completions"},
            **{"raw_path": b"/v1/completions", "query_string": b"", "root_path": ""},
            **{"scheme": "http", "server": ("front", 80), "client": ("127.0.0.1", 1)},
            "headers": [
                (b"authorization", b"Bearer secret"),
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
            ],
        }
        await front.app()(scope, receive, send)

    asyncio.run(run())
    assert front.unfinished == 0
    engines = [one._server.service for one in made.values()]
    assert wait_until(lambda: all(one.stats.running == 0 for one in engines))
    assert sum(one.stats.aborted for one in engines) >= 1


def test_a_replica_reports_what_routing_and_scaling_read(made) -> None:
    replica = made["a"]
    state = replica.routing_state()
    assert state["token_seconds"] > 0 and state["slots"] == 16 and 0 < state["free_memory"] <= 1
    assert replica.load()["service_seconds"] > 0
    replica.check()


def test_a_body_is_described_without_a_tokenizer() -> None:
    text = "x" * 400
    size, keys, streams = described(json.dumps({"prompt": text, "max_tokens": 7}).encode(), 256)
    assert size == RequestSize(100, 7) and keys == prefix_keys(text) and not streams
    assert described(b'{"prompt": "x", "stream": true}', 256)[2]
    assert described(b'{"prompt": [1, 2, 3]}', 256)[0] == RequestSize(3, 256)
    odd_bodies = (b"", b"[", b"[]", b'{"prompt": 3}', b'{"max_tokens": "many"}')
    for odd in (*odd_bodies, b"\xff", b"[" * 100_000):
        assert described(odd, 256)[0].prompt == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quota": QuotaSettings(requests=3)}, "quotas"),
        ({"registry": "versions"}, "--registry"),
    ],
)
def test_settings_that_each_replica_would_apply_for_itself_are_refused(settings, named) -> None:
    with pytest.raises(DeliberateError, match=named):
        check_replicable(ServerSettings(**settings))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"replicas": 0}, "replicas 0"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas 2"),
        ({"target_wait": 0.0}, "target_wait 0"),
        ({"cpus": -1.0}, "cpus -1"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(given, named) -> None:
    with pytest.raises(DeliberateError, match=named):
        FleetSettings(**given)
