"""Replicas on a local Ray: answers, both used, one killed under load, and the way down.

One server for the whole module; skipped without Ray (extra `ray`).
"""

from __future__ import annotations

import importlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from live_server import wait_until

from deliberate.data.prompts import PROMPT
from deliberate.data.word_problems import word_problems
from deliberate.utils.errors import DeliberateError

pytest.importorskip("ray", reason="the package ray is not installed")

PROMPTS = [
    PROMPT.format(question=one.question) for one in word_problems("test", size=6, steps=(1, 2))
]


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, "-m", "deliberate.cli.app", "serve", "tiny", "--replicas", "2"]
    command += ["--threads", "1", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        ready, _, _ = select.select([process.stdout], [], [], 300)
        line = process.stdout.readline() if ready else ""
        assert "http://" in line, line
        with httpx.Client(base_url=line.split()[-1], trust_env=False) as client:
            yield client, process
    finally:
        process.kill()
        process.wait()


def complete(client, number=3, **given) -> httpx.Response:
    body = {"model": "tiny", "prompt": PROMPTS[number], "max_tokens": 40, "temperature": 0}
    return client.post("/v1/completions", json=body | given)


def pids(client) -> dict[str, int]:
    found = client.get("/health").json()["replicas"]
    return {name: one["pid"] for name, one in found.items() if one["status"] == "ok"}


def test_answers_of_replicas_are_those_of_one_engine_and_both_decode(server) -> None:
    client, _ = server
    assert len(pids(client)) == 2
    with ThreadPoolExecutor(12) as pool:
        made = list(pool.map(lambda n: complete(client, n % 6), range(36)))
    texts = [one.json()["choices"][0]["text"] for one in made]
    assert len(set(texts)) > 1 and all(texts[n] == texts[n % 6] for n in range(36))
    page = client.get("/metrics").text
    served = re.findall(r'request_success_total\{.*replica="(\w+)"\} (\S+)', page)
    counts = dict.fromkeys((name for name, _ in served), 0.0)
    for name, count in served:
        counts[name] += float(count)
    assert len(counts) == 2 and min(counts.values()) >= 6, counts


def test_streams_and_refusals_pass_through(server) -> None:
    client, _ = server
    whole = complete(client).json()["choices"][0]["text"]
    lines = complete(client, stream=True).text.split("data: ")
    pieces = re.findall(r'"text":"((?:[^"\\]|\\.)*)"', "".join(lines))
    assert "".join(pieces).replace("\\n", "\n") == whole
    refused = complete(client, colour=1)
    assert refused.status_code == 400 and "colour" in refused.json()["error"]["message"]


def test_a_replica_killed_under_load_costs_no_answer_and_comes_back(server) -> None:
    client, _ = server
    before = pids(client)
    victim = min(before.values())
    answered = []

    def ask(number: int) -> None:
        answered.append(complete(client, number % 6).status_code)
        if number == 20:
            os.kill(victim, signal.SIGKILL)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(80)))
    assert answered == [200] * 80
    assert wait_until(lambda: len(pids(client)) == 2 and victim not in pids(client).values())


def test_after_sigterm_the_server_drains_and_leaves_nothing_behind(server) -> None:
    client, process = server
    running = pids(client)
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(complete, client, 3, max_tokens=200)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert last.result().status_code in (200, 503)
    assert process.wait(60) == 0
    gone = lambda: not any(os.path.exists(f"/proc/{pid}") for pid in running.values())  # noqa: E731
    assert wait_until(gone)


# -- without a cluster -------------------------------------------------------------------------


def test_arguments_of_a_clusters_file_are_checked() -> None:
    from deliberate.serving.ray_app import read_arguments

    given = {"model": "tiny", "replicas": 2, "max_replicas": 4, "settings": {"max_running": 8}}
    options, fleet = read_arguments(given)
    assert (options.served_name, options.settings.max_running) == ("tiny", 8)
    assert (fleet.replicas, fleet.max_replicas) == (2, 4)
    for wrong, named in (
        ({"model": "tiny", "replica": 2}, "replica is unknown"),
        ({"replicas": 2}, "model is missing"),
        ({"model": "tiny", "settings": {"max_run": 1}}, "settings.max_run"),
        ({"model": "tiny", "settings": {"max_running": 0}}, "max_running 0"),
    ):
        with pytest.raises(DeliberateError, match=named):
            read_arguments(wrong)


def test_without_ray_the_error_names_the_extra(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "deliberate.serving.ray_app", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DeliberateError, match=r"\[ray\]"):
        importlib.import_module("deliberate.serving.ray_app")


def test_a_ray_that_does_not_start_in_time_is_named_in_one_line(monkeypatch) -> None:
    import ray

    from deliberate.serving.scale.command import start_ray
    from deliberate.serving.scale.fleet_settings import FleetSettings

    def late(**_) -> None:
        raise Exception("The current node timed out\nduring startup.")

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(DeliberateError, match="its processes have some 30 s") as raised:
        start_ray(FleetSettings(2))
    assert "\n" not in str(raised.value)
