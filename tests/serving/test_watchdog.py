"""An engine that hangs in a step or has died is replaced, and its requests hear of it."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import pytest
from live_server import PATIENCE, at_rest, running, wait_until
from versioned_server import versioned

from deliberate.api import checkpoint
from deliberate.lifecycle.version import State
from deliberate.serving.command import build_server
from deliberate.serving.settings import ServerSettings
from deliberate.utils.errors import DeliberateError

BODY = {"model": "tiny", "prompt": "a", "max_tokens": 4, "temperature": 0}


@pytest.fixture
def server(model):
    settings = ServerSettings(max_running=4)
    return build_server(model, checkpoint.load_tokenizer("tiny"), "tiny", settings)


def ask(url: str, **given) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=BODY | given)


def well(url: str) -> bool:
    return httpx.get(f"{url}/health").status_code == 200


def in_a_minute(service) -> None:
    """The service's clock goes on by more than a step may take."""
    service._clock = lambda: time.perf_counter() + 61.0


class Hanging:
    """A step that does not end until the test does."""

    def __init__(self) -> None:
        self.until, self.begun = threading.Event(), threading.Event()

    def __call__(self) -> list:
        self.begun.set()
        self.until.wait(PATIENCE)
        return []


def test_a_step_that_hangs_is_named_by_health_and_its_engine_replaced(server) -> None:
    hanging = Hanging()
    with running(server) as url:
        first = ask(url).json()["choices"]
        old = server.service
        helps, looked = server.watchdog._help, threading.Event()

        async def later(*given) -> None:
            while not looked.is_set():
                await asyncio.sleep(0.01)
            await helps(*given)

        server.watchdog._help = later
        assert at_rest(old)
        old._engine.step = hanging
        answers: list[httpx.Response] = []
        waiting = threading.Thread(target=lambda: answers.append(ask(url)))
        waiting.start()
        assert hanging.begun.wait(PATIENCE) and well(url)  # a step may take some time
        in_a_minute(old)
        health = httpx.get(f"{url}/health").json()["status"]
        assert (
            health.startswith("a step of the engine has run for") and "60 s are allowed" in health
        )
        refused = ask(url)
        assert refused.status_code == 503 and "a step of the engine" in refused.text
        assert refused.headers["retry-after"] == "1"
        looked.set()
        waiting.join(PATIENCE)
        assert answers[0].status_code == 503 and "a step of the engine" in answers[0].text
        assert wait_until(lambda: well(url)) and server.service is not old
        assert ask(url).json()["choices"] == first
        hanging.until.set()
    assert wait_until(lambda: not old._thread.is_alive())


def test_the_watchdog_replaces_a_hung_engine_by_itself_and_says_so(server, caplog) -> None:
    hanging = Hanging()
    with running(server) as url:
        first = ask(url).json()["choices"]
        assert at_rest(server.service)
        server.service._engine.step = hanging
        body = BODY | {"stream": True}
        old = server.service
        threading.Thread(target=lambda: hanging.begun.wait(PATIENCE) and in_a_minute(old)).start()
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
            assert answer.status_code == 503  # nothing was said yet: still a status of HTTP
        assert wait_until(lambda: well(url)) and ask(url).json()["choices"] == first
        restarts = httpx.get(f"{url}/health").json()["restarts"]
        assert len(restarts) == 1 and "a step of the engine has run" in restarts[0]["reason"]
        assert abs(restarts[0]["at"] - time.time()) < 30 and restarts[0]["version"] is None
        assert "deliberate:engine_restarts_total{" in (page := httpx.get(f"{url}/metrics").text)
        assert (
            next(line for line in page.splitlines() if "engine_restarts_total{" in line)[-3:]
            == "1.0"
        )
        hanging.until.set()
    assert "version None has a new engine" in caplog.text


@pytest.mark.parametrize("where", ["step", "thread"])
def test_code_that_exits_ends_no_server(server, where) -> None:
    def exits(*_) -> None:
        raise SystemExit(3)

    with running(server) as url:
        first = ask(url).json()["choices"]
        old = server.service
        if where == "step":
            old._engine.step = exits
        else:
            old._on_step = exits
        ask(url)  # answered, or a 503: its engine dies with the step or after it
        assert wait_until(lambda: server.service is not old and well(url))
        assert ask(url).json()["choices"] == first
        assert "SystemExit" in server.watchdog.restarts[0].reason


def test_after_three_engines_in_ten_minutes_the_version_is_past_help(server) -> None:
    def broken() -> list:
        raise RuntimeError("a kernel failed")

    with running(server) as url:
        ask(url)
        for _ in range(3):
            old = server.service
            old._engine.step = broken
            ask(url)
            assert wait_until(lambda old=old: server.service is not old and well(url))
        assert len(server.watchdog.restarts) == 3
        server.service._engine.step = broken
        assert ask(url).status_code == 503
        assert wait_until(lambda: server.versions.live.past_help) and not well(url)
        assert ask(url).status_code == 503 and len(server.watchdog.restarts) == 3


def test_a_restart_is_an_event_of_the_version_and_past_help_it_is_rolled_back(tmp_path) -> None:
    server = versioned(tmp_path)
    registry = server.life_cycle.registry
    with running(server) as url:
        made = httpx.post(f"{url}/admin/versions", json={"fidelity": "dense", "reason": "a test"})
        number = made.json()["id"]
        httpx.post(f"{url}/admin/versions/{number}/promote", json={"reason": "a test"})
        assert server.versions.live.number == number

        def exits() -> list:
            raise SystemExit

        server.service._engine.step = exits
        assert ask(url).status_code == 503
        assert wait_until(lambda: "a new engine" in registry.history(number)[-1].reason)
        assert registry.history(number)[-1].state is State.LIVE
        assert ask(url).json()["deliberate"]["version"] == number
        server.watchdog._recent[number].extend([server.watchdog._clock()] * 3)
        server.service._engine.step = exits
        ask(url)
        assert wait_until(lambda: server.versions.live.number == 1) and ask(url).status_code == 200
        assert registry.get(number).state is State.ROLLED_BACK


def test_a_limit_of_no_time_is_refused() -> None:
    with pytest.raises(DeliberateError, match="step_seconds 0 must be more than 0 s"):
        ServerSettings(step_seconds=0)
