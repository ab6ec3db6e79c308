"""What watches a server: metrics that say what was done, rules and dashboard over them, logs."""

from __future__ import annotations

import importlib.resources
import io
import json
import logging
import re

import httpx
import pytest
import yaml
from live_server import running, wait_until
from prometheus_client.parser import text_string_to_metric_families

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.engine.admitted import EngineStats
from deliberate.serving.command import build_server
from deliberate.serving.metrics import Metrics
from deliberate.serving.request_log import JsonFormatter, logger, request_id
from deliberate.serving.settings import ServerSettings

FOLDER = importlib.resources.files("deliberate.serving") / "monitoring"
RULES = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
TARGETS = [one["expr"] for panel in DASHBOARD["panels"] for one in panel["targets"]]
QUESTION = "Question: Tom has 3 apples and buys 4 more. How many apples does Tom have?\nAnswer:"


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"(?:vllm|deliberate):\w+", expression))


def values(page: str) -> dict[str, float]:
    """Every sample of a page by name, series of one name added up."""
    made: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            made[sample.name] = made.get(sample.name, 0.0) + sample.value
    return made


@pytest.fixture(scope="module")
def address():
    tokenizer = checkpoint.load_tokenizer("tiny")
    model = AdaptiveModel.from_pretrained("tiny")
    with running(build_server(model, tokenizer, "tiny", ServerSettings())) as url:
        yield url


def complete(address, **given):
    body = {"model": "tiny", "prompt": QUESTION, "temperature": 0, "max_tokens": 40} | given
    headers = given.pop("headers", {})
    body.pop("headers", None)
    return httpx.post(f"{address}/v1/completions", json=body, headers=headers)


@pytest.mark.parametrize("expression", [rule["expr"] for rule in RULES] + TARGETS)
def test_every_metric_of_rules_and_dashboard_exists(address, expression) -> None:
    known = set(values(httpx.get(f"{address}/metrics").text))
    assert names_in(expression) and names_in(expression) <= known


def test_alerts_are_graded_and_say_what_happens() -> None:
    grades = [rule["labels"]["severity"] for rule in RULES]
    assert set(grades) == {"critical", "warning", "info"}
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert re.fullmatch(r"\d+m", rule["for"]) and rule["annotations"]["summary"]
        assert rule["expr"].count("(") == rule["expr"].count(")")


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]]
    assert len(set(places)) == len(places) == len({p["id"] for p in DASHBOARD["panels"]})
    assert all(p["targets"] and p["title"] for p in DASHBOARD["panels"])


def test_metrics_say_what_an_answer_took(address) -> None:
    before = values(httpx.get(f"{address}/metrics").text)
    answer = complete(address, fidelity="exact", deadline_ms=60_000).json()
    after = values(httpx.get(f"{address}/metrics").text)
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    facts, tokens = answer["deliberate"], answer["usage"]["completion_tokens"]
    assert gained["vllm:generation_tokens_total"] == tokens
    assert gained["deliberate:exit_layer_count"] == tokens
    assert gained["deliberate:exit_layer_sum"] == sum(facts["exit_layers"][0])
    assert gained["vllm:request_generation_tokens_sum"] == tokens
    assert gained["vllm:request_prompt_tokens_sum"] == answer["usage"]["prompt_tokens"]
    assert gained["vllm:inter_token_latency_seconds_count"] <= tokens - 1
    assert gained["vllm:request_time_per_output_token_seconds_count"] == 1
    assert gained["vllm:spec_decode_num_draft_tokens_total"] == facts["drafted"]
    early = sum(layer < 8 for layer in facts["exit_layers"][0])
    assert gained["vllm:spec_decode_num_accepted_tokens_total"] == early
    assert gained["deliberate:tokens_per_full_depth_pass_sum"] >= 1
    assert gained["deliberate:deadlines_kept_total"] == 1
    assert after["vllm:kv_cache_usage_perc"] == 0.0


def test_preemptions_are_counted_once_and_the_cache_in_use_is_a_share() -> None:
    metrics = Metrics("tiny", 8)
    metrics.text(EngineStats(free_blocks=16))
    for preempted in (2, 2, 5, 0, 1):  # the engine was restarted before the fourth
        page = metrics.text(EngineStats(free_blocks=12, preempted=preempted)).decode()
    found = values(page)
    assert found["vllm:num_preemptions_total"] == 6
    assert found["vllm:kv_cache_usage_perc"] == 0.25


def test_every_request_has_an_id_and_one_line_of_json(address) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        answers = [
            complete(address, headers={"x-request-id": "mine-1"}),
            complete(address, stream=True, headers={"x-request-id": "two\tlines"}),
            complete(address, foo=1),
            httpx.get(f"{address}/nowhere"),
        ]
        assert wait_until(lambda: stream.getvalue().count("\n") == 4)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert [line["request_id"] for line in lines] == ids and ids[0] == "mine-1"
    assert re.fullmatch(r"[0-9a-f]{16}", ids[1]) and len(set(ids)) == 4
    assert [line["status"] for line in lines] == [200, 200, 400, 404]
    assert all(line["complete"] and 0 < line["begun"] <= line["seconds"] for line in lines)
    assert lines[0]["bytes"] == len(answers[0].content)
    assert lines[0]["path"] == "/v1/completions" and lines[0]["level"] == "info"


def test_an_error_in_the_log_has_its_request_and_stays_one_line() -> None:
    token = request_id.set("abc")
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "a %s", ("b",), None)
        record.exc_info = (type(error), error, error.__traceback__)
    line = JsonFormatter().format(record)
    request_id.reset(token)
    made = json.loads(line)
    assert "\n" not in line and made["request_id"] == "abc" and made["message"] == "a b"
    assert "ValueError: two" in made["exception"]
