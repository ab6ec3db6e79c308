"""Versions change under load: every answer is one version's own, no request fails, memory goes."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from live_server import running, wait_until
from versioned_server import calibration, other_weights, random_prompt

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.api.shared_model import with_calibration
from deliberate.engine.admitted import EngineStats
from deliberate.serving.command import build_server
from deliberate.serving.metrics import Metrics, VersionState
from deliberate.serving.served_version import ServedVersion
from deliberate.serving.settings import ServerSettings
from deliberate.utils.errors import DeliberateError

SETTINGS = ServerSettings(cache_entries=256, max_running=4)


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load_tokenizer("tiny")


def other_policy(model) -> AdaptiveModel:
    twin = with_calibration(model, calibration())
    twin.fidelity = "threshold"
    return twin


def version_of(server, model, tokenizer, number, **given) -> ServedVersion:
    return ServedVersion(
        model, tokenizer, "tiny", server.settings, server.metrics, number=number, **given
    )


def asked(number: int) -> dict:
    prompt = random_prompt(number)
    return {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0}


def ask(client, url, number, **given) -> dict:
    made = client.post(f"{url}/v1/completions", json=asked(number) | given)
    assert made.status_code == 200, made.text
    return made.json()


def told(kind: int, made: dict) -> tuple[str, list | None]:
    """Text and depths; in exact mode (kind 0) the depths depend on measured times."""
    facts = made["deliberate"]
    return made["choices"][0]["text"], facts["exit_layers"] if kind else None


class Loop:
    """The event loop of a running server: swaps are asked for from the test's thread."""

    def __init__(self, client, url, server) -> None:
        self.versions = server.versions
        complete = server.completions.complete

        async def seen(*args):
            self.found = asyncio.get_running_loop()
            return await complete(*args)

        server.completions.complete = seen
        ask(client, url, 0)
        server.completions.complete = complete

    def swap(self, version):
        async def work():
            await self.versions.prepare(version)
            self.versions.swap(version)

        self(work())

    def __call__(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.found).result(20)


def test_a_model_under_another_calibration_shares_its_weights_and_decodes_by_its_own_policy():
    model = AdaptiveModel.from_pretrained("tiny")
    before = model.calibration
    twin = other_policy(model)
    assert twin.base is model.base and twin.backbone is model.backbone
    assert str(model.fidelity) == "exact" and model.calibration is before
    assert twin.calibration is not before and twin.guarantees is not model.guarantees
    twin.gate = torch.nn.Linear(1, 1)
    assert model.gate is None
    with pytest.raises(DeliberateError, match="for other weights"):
        with_calibration(other_weights(), twin.calibration)


def test_a_hundred_swaps_under_load_fail_nothing_mix_nothing_and_leave_nothing_stale(tokenizer):
    first = AdaptiveModel.from_pretrained("tiny")
    exits = len(first.exit_config.layers)
    early, late = other_policy(first), other_policy(first)
    low, high = (0.1,) * exits, (1.0,) * exits
    kinds = [(first, None), (other_weights(), None), (early, low), (late, high)]
    server = build_server(first, tokenizer, "tiny", SETTINGS)
    tried = range(16)
    alone = {}
    for kind, (model, thresholds) in enumerate(kinds):
        once = build_server(model, tokenizer, "tiny", ServerSettings())
        once.versions.live.thresholds = None if thresholds is None else list(thresholds)
        with running(once) as url, httpx.Client() as client:
            for one in tried:
                made = ask(client, url, one)
                alone[kind, one] = told(kind, made)
    # Those of which a part of another version's answer would show.
    questions = [one for one in tried if len({alone[kind, one][0] for kind in (0, 1, 2)}) == 3]
    assert len(questions) >= 8
    server.versions.live.number = 0  # the kind of a version is its number modulo 4
    swapped, answered = threading.Event(), []
    with running(server) as url, httpx.Client() as client:
        loop = Loop(client, url, server)

        def load(seed: int) -> list[tuple[int, int, dict, int, int]]:
            found = []
            with httpx.Client() as own:
                for count in itertools.count(seed):
                    if swapped.is_set():
                        return found
                    one = questions[count % len(questions)]
                    before = server.versions.live.number
                    made = ask(own, url, one, stream=False)
                    found.append((one, before, made, server.versions.live.number, count))
                    answered.append(made["deliberate"]["version"])

        with ThreadPoolExecutor(4) as pool:
            work = [pool.submit(load, seed) for seed in range(4)]
            for number in range(1, 101):
                model, thresholds = kinds[number % 4]
                made = version_of(server, model, tokenizer, number, thresholds=thresholds)
                loop.swap(made)
                if number % 2:  # on a busy machine too every second version answers something
                    assert wait_until(lambda n=number: n in answered)
            swapped.set()
            answers = [answer for one in work for answer in one.result()]
        versions = set()
        for one, before, made, after, _ in answers:
            facts = made["deliberate"]
            number = facts["version"]
            assert before <= number <= after  # never one that was swapped out before it came
            assert told(number % 4, made) == alone[number % 4, one]
            versions.add(number)
        assert len(versions) > 30 and len(answers) > 100
        assert wait_until(lambda: server.versions.all == [server.versions.live])
        one = questions[0]
        hits = ask(client, url, one), ask(client, url, one)
        assert hits[1]["deliberate"]["cache"] == "hit"
        assert told(100 % 4, hits[1]) == alone[100 % 4, one]


def test_a_stream_ends_on_the_version_it_began_with_whose_memory_then_goes(tokenizer) -> None:
    server = build_server(AdaptiveModel.from_pretrained("tiny"), tokenizer, "tiny", SETTINGS)
    server.versions.live.number = 1
    with running(server) as url, httpx.Client() as client:
        loop = Loop(client, url, server)
        text = ask(client, url, 3, max_tokens=200)["choices"][0]["text"]
        server.completions.cache._kept.clear()
        old = weakref.ref(server.versions.live)
        model = weakref.ref(server.versions.live.model)
        body = asked(3) | {"max_tokens": 200, "stream": True}
        with client.stream("POST", f"{url}/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            got = [next(lines)]
            loop.swap(version_of(server, other_weights(), tokenizer, 2))
            assert ask(client, url, 3)["deliberate"]["version"] == 2
            got += list(lines)
        assert '"version":1' in "".join(got) and got[-2] == "data: [DONE]"
        assert text == "".join(
            httpx.Response(200, content=line[6:]).json()["choices"][0]["text"]
            for line in got
            if line.startswith('data: {"id"') and '"choices":[{' in line
        )
        assert wait_until(lambda: len(server.versions.all) == 1)
        assert wait_until(lambda: gc.collect() >= 0 and old() is None and model() is None)


def test_a_version_that_cannot_decode_changes_nothing(tokenizer) -> None:
    server = build_server(AdaptiveModel.from_pretrained("tiny"), tokenizer, "tiny", SETTINGS)
    with running(server) as url, httpx.Client() as client:
        loop = Loop(client, url, server)
        broken = version_of(server, other_weights(), tokenizer, 2)

        def step():
            raise RuntimeError("no")

        broken.service._engine.step = step
        with pytest.raises(DeliberateError, match="RuntimeError: no"):
            loop.swap(broken)
        assert not broken.service.healthy and ask(client, url, 3)["deliberate"]["version"] is None


def test_metrics_name_every_version_with_an_engine_and_forget_those_that_have_gone():
    made = Metrics("tiny", 8)
    live, old = VersionState("2", "live", 3, True), VersionState("1", "retiring", 1, False)

    def series(name: str) -> list[str]:
        page = made.text(EngineStats()).decode()
        return [line for line in page.splitlines() if line.startswith(f"deliberate:{name}{{")]

    made.note_versions([live, old])
    labels = 'model_name="tiny",role="{}",version="{}"'
    assert series("version_requests") == [
        f"deliberate:version_requests{{{labels.format('live', 2)}}} 3.0",
        f"deliberate:version_requests{{{labels.format('retiring', 1)}}} 1.0",
    ]
    assert [line[-3:] for line in series("certificate_drifted")] == ["1.0", "0.0"]
    made.note_versions([live])
    assert len(series("version_requests")) == len(series("certificate_drifted")) == 1
