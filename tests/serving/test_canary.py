"""A canary under load: rolled back by itself where it is worse, promoted where it is better."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from live_server import running, wait_until
from versioned_server import calibration, random_prompt, save_other_weights, versioned

from deliberate.api.model import AdaptiveModel
from deliberate.cli.versions import call, evolve, swap
from deliberate.lifecycle.ab_test import ABSettings
from deliberate.lifecycle.version import State
from deliberate.serving.canary import reference_loss
from deliberate.utils.errors import DeliberateError

LIMITS = ABSettings(loss_tolerance=0.2, time_tolerance=0.15, most_pairs=100_000)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_other_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def server(tmp_path):
    made = versioned(tmp_path)
    made.life_cycle._limits = LIMITS
    return made


@contextlib.contextmanager
def load(url, clients=3):
    """Greedy requests until the block ends; none may fail."""
    stopped, failed = threading.Event(), []

    def work(seed: int) -> None:
        with httpx.Client() as client:
            for number in range(seed, 10**9, clients):
                if stopped.is_set():
                    return
                body = {"model": "tiny", "prompt": random_prompt(number % 50), "max_tokens": 4,
                        "temperature": 0}  # fmt: skip
                made = client.post(f"{url}/v1/completions", json=body)
                if made.status_code != 200:
                    failed.append(made.text)

    with ThreadPoolExecutor(clients) as pool:
        done = [pool.submit(work, seed) for seed in range(clients)]
        try:
            yield failed
        finally:
            stopped.set()
            for one in done:
                one.result()


def slow(version, seconds: float) -> None:
    step = version.service._engine.step

    def slower():
        time.sleep(seconds)
        return step()

    version.service._engine.step = slower


def state(server, number: int) -> State:
    return server.life_cycle.registry.get(number).state


def last(server):
    return server.life_cycle.registry.history(2)[-1]


def test_a_loss_is_the_share_of_tokens_that_full_depth_would_not_have_chosen() -> None:
    import torch

    model = AdaptiveModel.from_pretrained("tiny")
    prompt = random_prompt(1)
    made = model.generate(torch.tensor([prompt]), max_new_tokens=10, fidelity="dense")
    answer = made[0, len(prompt) :].tolist()
    assert reference_loss(model, prompt, answer) == 0.0 == reference_loss(model, prompt, [])
    changed = [*answer[:-1], (answer[-1] + 1) % 1024]
    assert reference_loss(model, prompt, changed) == pytest.approx(1 / len(answer))


def test_a_candidate_that_answers_otherwise_is_rolled_back_by_itself(server, weights) -> None:
    with running(server) as url:
        swap(model=str(weights), canary=0.4, url=url)
        assert state(server, 2) is State.CANARY
        with pytest.raises(DeliberateError, match="version 2 is the canary"):
            swap(fidelity="dense", url=url)
        with load(url) as failed:
            ended = wait_until(lambda: server.versions.canary is None)
        assert ended, server.versions.canary.test.figures()
        assert not failed and state(server, 2) is State.ROLLED_BACK
        assert "its loss is +" in last(server).reason and last(server).who == "A/B test"
        assert last(server).figures["more_loss"] > 0.2
        assert wait_until(lambda: server.versions.all == [server.versions.live])
        assert server.versions.live.number == 1


def test_a_candidate_that_is_slower_is_rolled_back_and_the_reverse_is_promoted(server) -> None:
    with running(server) as url:
        swap(fidelity="dense", canary=0.5, url=url)
        slow(server.versions.canary.candidate, 0.05)
        with load(url) as failed:
            ended = wait_until(lambda: server.versions.canary is None)
        assert ended, server.versions.canary.test.figures()
        assert not failed and state(server, 2) is State.ROLLED_BACK
        assert "time a token over" in last(server).reason
        swap(fidelity="dense", canary=0.5, url=url)
        slow(server.versions.canary.control, 0.05)
        slow(server.versions.live, 0.05)
        with load(url) as failed:
            ended = wait_until(lambda: server.versions.canary is None)
        assert ended, server.versions.canary.test.figures()
        assert not failed and state(server, 3) is State.LIVE and state(server, 1) is State.RETIRED
        assert server.versions.live.number == 3
        (event,) = [one for one in server.life_cycle.registry.history(3) if one.state == "live"]
        assert event.figures["time_ratio"] < 0.85 and event.who == "A/B test"


def test_a_server_that_starts_again_goes_on_with_its_canary_and_its_evidence(
    server, tmp_path
) -> None:
    with running(server) as url:
        swap(fidelity="dense", canary=0.5, url=url)
        with load(url):
            assert wait_until(lambda: server.versions.canary.test.pairs > 10)
        registry = server.life_cycle.registry
        kept = lambda: (registry.evidence(2) or {}).get("tests")  # noqa: E731
        seen = server.versions.canary.test
        assert wait_until(lambda: kept() == seen.snapshot()["tests"])
        pairs = seen.pairs
    again = versioned(tmp_path)
    again.life_cycle._limits = LIMITS
    with running(again) as url:
        assert again.versions.canary.test.pairs == pairs and again.versions.canary.share == 0.5
        found = call(url, "/admin/versions", None)
        assert found["canary"]["pairs"] == pairs
        assert [one["role"] for one in found["decoding"]] == ["live", "canary", "control"]
        swap(back=True, reason="enough", url=url)
        assert state(again, 2) is State.ROLLED_BACK and again.versions.live.number == 1


def test_a_dead_engine_or_an_expired_certificate_is_rolled_back(server, tmp_path) -> None:
    (tmp_path / "policy").mkdir()
    calibration().save(tmp_path / "policy" / "calibration.json")
    with running(server) as url:
        swap(fidelity="dense", canary=0.5, url=url)
        server.versions.canary.candidate.service.failure = "the engine failed: a test"
        assert wait_until(lambda: state(server, 2) is State.ROLLED_BACK)
        assert last(server).reason == "the engine failed: a test"
        swap(calibration=tmp_path / "policy", url=url)
        model = server.versions.live.model
        drift = model.guarantees.drift(model.calibration.certificates[0])
        for _ in range(200):
            drift.update(9, 10)
        assert wait_until(lambda: server.versions.live.number == 1)
        assert state(server, 3) is State.ROLLED_BACK
        assert "its certificate has expired" in server.life_cycle.registry.history(3)[-1].reason


def test_a_canary_that_cannot_be_loaded_again_is_rolled_back_at_the_start(server, tmp_path) -> None:
    registry = server.life_cycle.registry
    from deliberate.lifecycle.version import Source

    registry.propose("weights", Source(str(tmp_path / "gone")), reason="r", who="w")
    registry.move(2, State.CANARY, reason="r", who="w", figures={"share": 0.1})
    with running(server):
        assert wait_until(lambda: state(server, 2) is State.ROLLED_BACK)
        assert "it cannot be loaded again" in last(server).reason


def test_a_share_that_is_too_large_is_refused(server) -> None:
    with pytest.raises(DeliberateError, match=r"share 0\.6 must be above 0"):
        asyncio.run(server.life_cycle.start_canary(1, 0.6, reason="r", who="w"))


def test_a_round_of_evolution_by_hand_goes_from_traffic_to_a_canary(tmp_path, capsys) -> None:
    server = versioned(tmp_path, keep_traffic=500)
    with running(server) as url:
        with httpx.Client() as client:
            for number in range(90):
                body = {"model": "tiny", "prompt": random_prompt(number), "max_tokens": 24}
                made = client.post(f"{url}/v1/completions", json=body | {"temperature": 0})
                client.post(f"{url}/v1/completions", json=body | {"max_tokens": 1})  # not greedy
        assert made.status_code == 200
        evolve(tmp_path, epsilon=0.2, delta=0.1, canary=0.3, least_gain=0.0, url=url)
        said = capsys.readouterr().out.splitlines()
        assert "of 90 answers at every exit" in said[0] and said[-1] == "version 2 is canary"
        assert server.versions.canary.candidate.number == 2
        with httpx.Client() as client:
            for number in range(30):
                body = {"model": "tiny", "prompt": random_prompt(number), "temperature": 0}
                made = client.post(f"{url}/v1/completions", json=body).json()
                if made["deliberate"]["version"] == 2:
                    assert made["deliberate"]["fidelity"] == "threshold"
    states = [str(event.state) for event in server.life_cycle.registry.history(2)]
    assert states[:3] == ["proposed", "shadow", "canary"]
