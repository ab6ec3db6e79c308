"""Latency budgets over HTTP: kept or not, said in the answer, counted, and refused by name."""

from __future__ import annotations

import httpx
import pytest
from latency_plant import plant_cost
from live_server import running

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.policies import guarantees
from deliberate.serving.command import build_server
from deliberate.serving.settings import ServerSettings

QUESTION = "Question: Tom has 3 apples and buys 4 more. How many apples does Tom have?\nAnswer:"


@pytest.fixture(scope="module")
def address():
    tokenizer = checkpoint.load_tokenizer("tiny")
    model = AdaptiveModel.from_pretrained("tiny")
    model.guarantees._cost = plant_cost()  # as if it had been measured here
    server = build_server(model, tokenizer, "tiny", ServerSettings(cache_entries=8))
    with running(server) as url:
        yield url


def complete(address: str, header: str | None = None, **given):
    body = {"model": "tiny", "prompt": QUESTION, "temperature": 0, "max_tokens": 24} | given
    headers = {} if header is None else {"x-latency-budget": header}
    return httpx.post(f"{address}/v1/completions", json=body, headers=headers)


def test_an_answer_says_whether_its_budget_was_kept(address) -> None:
    answer = complete(address, latency_budget={"ms_per_token": 2000.0}, n=2)
    facts = answer.json()["deliberate"]
    assert facts["fidelity"] == "budget" and facts["cache"] is None
    assert [one["budget"] for one in facts["budgets"]] == ["2000 ms per token"] * 2
    assert all(one["met"] and one["ms"] < one["allowed_ms"] for one in facts["budgets"])
    assert 'deliberate:budgets_kept_total{model_name="tiny"} 2.0' in metrics(address)


@pytest.mark.parametrize(
    ("header", "said"),
    [("ms_per_token=2000", "2000 ms per token"), ("deadline_ms = 60000", "deadline of 60000 ms")],
)
def test_a_budget_in_the_header_counts_as_one_in_the_body(address, header, said) -> None:
    for given in ({}, {"fidelity": "budget"}):
        facts = complete(address, header, **given).json()["deliberate"]
        assert facts["fidelity"] == "budget" and facts["budgets"][0]["met"]
        assert facts["budgets"][0]["budget"] == said


@pytest.mark.parametrize(
    ("header", "given", "named"),
    [
        ("L3", {"latency_budget": "L2"}, "contradict each other"),
        ("ms_per_token=3", {"latency_budget": {"ms_per_token": 4}}, "contradict each other"),
        ("L3", {"fidelity": "exact"}, "x-latency-budget with fidelity exact"),
        ("soon!", {}, "'soon!' is no tier"),
        ("deadline_ms=0", {}, "'deadline_ms=0' is no tier"),
        ("L9", {}, "L9"),
    ],
)
def test_a_header_that_cannot_be_obeyed_is_refused_by_name(address, header, given, named) -> None:
    answer = complete(address, header, **given)
    assert answer.status_code == 400 and named in answer.json()["error"]["message"]


def test_an_answer_without_a_budget_has_no_report_of_one(address) -> None:
    assert complete(address).json()["deliberate"]["budgets"] is None


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"latency_budget": {"ms_per_token": 1e-6}}, "1e-06 ms per token"),
        ({"latency_budget": {"ms_per_token": 3, "deadline_ms": 9}}, "one of the two"),
        ({"latency_budget": {"ms": 3}}, "latency_budget.ms: this server does not know the field"),
        ({"latency_budget": {"ms_per_token": 0}}, "latency_budget.ms_per_token: Input should be"),
        ({"latency_budget": "L9"}, "L9"),
        ({"latency_budget": "L3", "fidelity": "exact"}, "latency_budget with fidelity exact"),
        ({"fidelity": "budget"}, "needs latency_budget"),
    ],
)
def test_a_budget_that_cannot_be_obeyed_is_refused_by_name(address, given, named) -> None:
    answer = complete(address, **given)
    assert answer.status_code == 400 and named in answer.json()["error"]["message"]


def test_a_budget_is_refused_where_the_machine_was_not_measured(monkeypatch) -> None:
    monkeypatch.setattr(guarantees, "recall", lambda _: None)
    tokenizer = checkpoint.load_tokenizer("tiny")
    model = AdaptiveModel.from_pretrained("tiny")
    with running(build_server(model, tokenizer, "tiny", ServerSettings())) as url:
        answer = complete(url, latency_budget="L3")
        unknown = complete(url, latency_budget="L9").json()["error"]["message"]
    assert answer.status_code == 400 and "bench cost" in answer.json()["error"]["message"]
    assert unknown.startswith("latency_budget: latency tier 'L9' is unknown; there is L1 (")


def test_what_the_answer_cache_found_is_counted(address) -> None:
    for _ in range(3):
        complete(address, max_tokens=7)
    page = metrics(address)
    assert 'deliberate:answer_cache_hits_total{model_name="tiny",where="local"} 2.0' in page
    assert 'deliberate:answer_cache_misses_total{model_name="tiny"}' in page
    assert "deliberate:precheck_seconds_count" in page
    assert metrics(address).count('where="local"} 2.0') == 1  # reading it counts nothing


def metrics(address: str) -> str:
    return httpx.get(f"{address}/metrics").text


def test_without_an_answer_cache_no_hits_are_shown() -> None:
    model, tokenizer = AdaptiveModel.from_pretrained("tiny"), checkpoint.load_tokenizer("tiny")
    with running(build_server(model, tokenizer, "tiny", ServerSettings())) as url:
        assert "deliberate:answer_cache_hits_total{" not in metrics(url)
