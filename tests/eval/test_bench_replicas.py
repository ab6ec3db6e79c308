"""`deliberate bench replicas`: its arithmetic, its settings, and clients that ask again."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from deliberate.eval.benchmarks import replicas
from deliberate.eval.benchmarks.replicas import KillCounts, efficiency
from deliberate.eval.benchmarks.settings import bench_config, run_benchmark
from deliberate.utils.errors import DeliberateError


def settings(*more):
    return bench_config("bench_replicas", list(more), verbatim=("model", "out"))


def test_efficiency_is_the_share_of_as_many_single_replicas() -> None:
    rates = {"one": [100.0, 104.0, 96.0, 100.0], "many": [180.0, 187.0, 173.0, 180.0]}
    value, low, high = efficiency(rates, 2)
    assert value == pytest.approx(0.9, rel=0.01) and low <= value <= high
    assert efficiency(rates, 3)[0] == pytest.approx(value * 2 / 3)


def test_success_is_of_requests_not_of_tries() -> None:
    assert KillCounts(asked=200, answered=199, retried=40).success == 0.995
    assert KillCounts().success == 0.0


def test_clients_ask_again_and_replicas_are_killed_only_when_all_are_there(monkeypatch) -> None:
    cfg = settings("kill_minutes=0.02", "kill_seconds=0.2", "clients=1", "retries=1")
    killed, tries = [], []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            found = {str(n): {"pid": 10**9 + n, "status": "ok"} for n in range(2)}
            return httpx.Response(200, json={"replicas": found})
        tries.append(request)
        return httpx.Response(200 if len(tries) % 3 else 503, json={})

    async def slow(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.01)
        return answer(request)

    transport = httpx.MockTransport(slow)
    monkeypatch.setattr(
        replicas, "_http", lambda *_: httpx.AsyncClient(transport=transport, base_url="http://x")
    )
    monkeypatch.setattr(replicas.os, "kill", lambda pid, _: killed.append(pid))
    counts = asyncio.run(replicas._killed(cfg, "http://x"))
    assert killed and set(killed) <= {10**9, 10**9 + 1} and counts.kills == len(killed)
    assert counts.success == 1.0 and counts.retried >= 0.4 * counts.asked


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["replicas=1"], "replicas"),
        (["kill_minutes=-1"], "kill_minutes"),
        (["rounds=0", "kill_minutes=0"], "nothing to do"),
        (["seconds=0"], "seconds"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(given, named) -> None:
    with pytest.raises(DeliberateError, match=named):
        run_benchmark(["replicas", *given])
