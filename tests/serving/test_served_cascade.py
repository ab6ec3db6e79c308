"""A server whose small model answers first: whose answers come, which requests go past it."""

from __future__ import annotations

import math

import httpx
import pytest
import torch
from live_server import running, wait_until
from typer.testing import CliRunner

from deliberate.api import checkpoint
from deliberate.api.cascade import answer_logprobs
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibrator import Calibrator, Form
from deliberate.calibration.cascade import THRESHOLDS, CascadeCalibration, answer_confidence
from deliberate.cli.app import app
from deliberate.export.draft import export_draft
from deliberate.policies.cascade import Model
from deliberate.serving.command import build_cascade_server, build_server
from deliberate.serving.settings import ServerSettings
from deliberate.utils.errors import DeliberateError

LIMIT = 16
SETTINGS = ServerSettings(max_running=4)
PROMPTS = [[5 + (7 * place + 31 * number) % 900 for place in range(9)] for number in range(8)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "small"
    export_draft("tiny", folder, layer=2)
    return folder


@pytest.fixture(scope="module")
def models(small):
    return [AdaptiveModel.from_pretrained(one).eval() for one in (small, "tiny")]


def server_of(tmp_path, small, models, threshold, settings=SETTINGS):
    """Probability = least token probability."""
    calibration = CascadeCalibration(
        measure="least",
        calibrator=Calibrator(Form.LOGISTIC, slope=1.0, intercept=0.0),
        threshold=threshold,
        epsilon=0.1,
        delta=0.1,
        n=400,
        observed=0.0,
        shares=(0.5,) * len(THRESHOLDS),
        small=models[0].fingerprints()[0],
        large=models[1].fingerprints()[0],
        max_new_tokens=LIMIT,
    )
    path = tmp_path / "cascade.json"
    calibration.save(path)
    tokenizer = checkpoint.load_tokenizer("tiny")
    return build_cascade_server((str(small), path), models[1], tokenizer, "tiny", settings)


def ask(client: httpx.Client, prompt: list[int], **given) -> dict:
    body = {"model": "tiny", "prompt": prompt, "temperature": 0, "fidelity": "dense"} | given
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def confidence(model, prompt: list[int]) -> float:
    ids = torch.tensor([prompt])
    made = model.generate(ids, max_new_tokens=LIMIT, do_sample=False, fidelity="dense")
    answer = made[0, len(prompt) :].tolist()
    return answer_confidence(answer_logprobs(model, prompt, answer), "least")


def alone(model, prompts) -> list[str]:
    server = build_server(model, checkpoint.load_tokenizer("tiny"), "tiny", SETTINGS)
    with running(server) as url, httpx.Client(base_url=url) as client:
        made = [ask(client, prompt, max_tokens=LIMIT) for prompt in prompts]
    return [one["choices"][0]["text"] for one in made]


def test_every_answer_is_the_model_s_own_that_gave_it_streamed_or_whole(
    tmp_path, small, models
) -> None:
    texts = {2: alone(models[0], PROMPTS), 8: alone(models[1], PROMPTS)}
    sure = sorted(confidence(models[0], prompt) for prompt in PROMPTS)
    for threshold, layers in ((0.0, {2}), (math.inf, {8}), (sum(sure[3:5]) / 2, {2, 8})):
        server = server_of(tmp_path, small, models, threshold)
        seen = set()
        with running(server) as url, httpx.Client(base_url=url) as client:
            for number, prompt in enumerate(PROMPTS):
                made = ask(client, prompt)
                by = made["deliberate"]["num_layers"]
                seen.add(by)
                assert made["choices"][0]["text"] == texts[by][number]
                body = {"model": "tiny", "prompt": prompt, "temperature": 0, "stream": True}
                events = client.post("/v1/completions", json=body).text
                assert events.rstrip().endswith("data: [DONE]") and f'"num_layers":{by}' in events
            service, page = server.service, client.get("/metrics").text
            assert sum(service.answered.values()) == 2 * len(PROMPTS)
            for name, count in service.answered.items():
                series = f'answered_by="{name}",model_name="tiny"}} {count:.1f}'
                assert f"deliberate:cascade_answers_total{{{series}" in page
            assert wait_until(lambda s=service: s.unfinished == 0)
        assert seen == layers
        assert (service.answered[Model.SMALL] > 0) == (2 in layers)


def test_requests_that_the_calibration_does_not_cover_go_to_the_large_model(
    tmp_path, small, models
) -> None:
    server = server_of(tmp_path, small, models, 0.0)
    with running(server) as url, httpx.Client(base_url=url) as client:
        for given in (
            {"max_tokens": LIMIT + 1},
            {"temperature": 0.7, "seed": 1},
            {"logprobs": 1},
            {"fidelity": "threshold"},
        ):
            assert ask(client, PROMPTS[0], **given)["deliberate"]["num_layers"] == 8
        assert sum(server.service.answered.values()) == 0
        assert ask(client, PROMPTS[0])["deliberate"]["num_layers"] == 2


def test_a_client_that_goes_away_frees_both_engines(tmp_path, small, models) -> None:
    server = server_of(tmp_path, small, models, math.inf)
    with running(server) as url, httpx.Client(base_url=url) as client:
        body = {"model": "tiny", "prompt": PROMPTS[0], "temperature": 0, "stream": True}
        for _ in range(4):
            with client.stream("POST", "/v1/completions", json=body) as stream:
                next(stream.iter_lines())
        assert wait_until(lambda: server.service.unfinished == 0)
        assert wait_until(lambda: server.service.small.stats.running == 0)


def test_a_dead_small_engine_is_replaced_with_the_cascade_kept(tmp_path, small, models) -> None:
    server = server_of(tmp_path, small, models, 0.0)
    with running(server) as url, httpx.Client(base_url=url) as client:
        ask(client, PROMPTS[0])
        old = server.service
        old.small.abandon("killed by the test")
        assert wait_until(lambda: server.service is not old)
        assert wait_until(lambda: client.get("/health").status_code == 200)
        assert ask(client, PROMPTS[0])["deliberate"]["num_layers"] == 2


def test_what_a_cascade_cannot_do_is_refused_by_name(tmp_path, small, models) -> None:
    for settings, named in (
        (ServerSettings(cache_entries=8), "--cache-entries"),
        (ServerSettings(registry=tmp_path), "--registry"),
    ):
        with pytest.raises(DeliberateError, match=named):
            server_of(tmp_path, small, models, 0.5, settings)
    for given in (
        ["--cascade", "x"],
        ["--cascade", "x", "--cascade-calibration", "y", "--replicas", "2"],
    ):
        result = CliRunner().invoke(app, ["serve", "tiny", *given])
        assert isinstance(result.exception, DeliberateError)
        assert "--cascade" in str(result.exception)
