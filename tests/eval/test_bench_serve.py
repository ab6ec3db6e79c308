"""`deliberate bench serve`: what it sends, and where to; what it counts; equal answers."""

from __future__ import annotations

import asyncio
import itertools
import json
import xml.etree.ElementTree as ElementTree

import pytest
from live_server import running

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.eval.benchmarks import serve
from deliberate.eval.benchmarks.serve_client import Client, Outcome, Run, loopback_address
from deliberate.eval.benchmarks.serve_figures import (
    curve,
    figures,
    goodput_line,
    markdown,
    remarks,
)
from deliberate.eval.benchmarks.serve_load import Shot, poisson, shots
from deliberate.eval.benchmarks.settings import bench_config, run_benchmark
from deliberate.serving.command import build_server
from deliberate.serving.settings import ServerSettings
from deliberate.utils.errors import DeliberateError


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load_tokenizer("tiny")


@pytest.fixture(scope="module")
def model():
    return AdaptiveModel.from_pretrained("tiny")


@pytest.fixture(scope="module")
def address(model, tokenizer):
    with running(build_server(model, tokenizer, "tiny", ServerSettings(max_waiting=4))) as url:
        yield url


def settings(*more):
    return bench_config("bench_serve", list(more), verbatim=("model", "out", "url"))


@pytest.mark.parametrize(
    "url",
    ["http://10.0.0.7:8000", "http://example.org:80", "https://127.0.0.1:8000", "127.0.0.1:8000",
     "http://127.0.0.1", "http://127.0.0.1:8000/v1", "http://127.0.0.1.example.org:80",
     "http://localhost@example.org:80"],
)  # fmt: skip
def test_load_is_sent_to_this_machine_only(url):
    with pytest.raises(DeliberateError, match="this machine only"):
        Client(url)
    with pytest.raises(DeliberateError, match="this machine only"):
        run_benchmark(["serve", f"url={url}"])


@pytest.mark.parametrize("url", ["http://127.0.0.1:80/", "http://localhost:1", "http://[::1]:9"])
def test_loopback_addresses_are_taken(url):
    assert loopback_address(url) == url.rstrip("/")


def test_the_mix_has_the_share_of_long_requests_and_repeats_by_seed(tokenizer):
    cfg = settings("long_share=0.1")
    made = list(itertools.islice(shots(cfg, tokenizer, None), 400))
    long = [one for one in made if one.kind == "long"]
    assert 0.06 < len(long) / 400 < 0.14
    assert all(len(one.prompt) >= 200 and one.deadline_ms == 2000 for one in long)
    short = [one for one in made if one.kind == "short"]
    assert all(len(one.prompt) < 200 and one.max_tokens == 64 for one in short)
    assert made == list(itertools.islice(shots(cfg, tokenizer, None), 400))
    with pytest.raises(DeliberateError, match="context of 100"):
        list(itertools.islice(shots(cfg, tokenizer, 100), 400))


def test_problems_of_a_data_set_are_asked_where_one_is_named(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": f"How much is {n} plus 1?", "answer": f"It is.\n#### {n + 1}"}
            for n in range(3)]  # fmt: skip
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("DELIBERATE_DATA", str(tmp_path))
    made = list(itertools.islice(shots(settings("dataset=gsm8k"), tokenizer, None), 20))
    texts = [tokenizer.decode(one.prompt, skip_special_tokens=True) for one in made]
    assert all("plus 1?" in text for text in texts) and len(set(texts)) >= 3
    monkeypatch.delenv("DELIBERATE_DATA")
    with pytest.raises(DeliberateError, match="DELIBERATE_DATA"):
        next(shots(settings("dataset=gsm8k"), tokenizer, None))


def test_arrivals_have_the_rate_asked_for_and_end_in_time():
    made = poisson(itertools.repeat(Shot("short", (1,), 1)), rate=200.0, seconds=20.0, seed=1)
    times = [one.arrival for one in made]
    assert times == sorted(times) and times[0] == 0.0 and times[-1] < 20.0
    assert len(made) == pytest.approx(4000, rel=0.06)


def outcome(seconds=0.1, status=200, **given):
    plain = {"kind": "short", "status": status, "due": 0.0, "lag": 0.0, "first": seconds / 2,
             "seconds": seconds, "tokens": 11, "deadline_ms": 300.0}  # fmt: skip
    return Outcome(**(plain | given))


def test_goodput_counts_answers_within_their_deadline_and_refusals_are_no_failures():
    made = [outcome()] * 6 + [outcome(0.4)] * 2
    made += [
        outcome(status=429, error="full"),
        outcome(status=400, error="deadline_ms=300: at least 400"),
        outcome(status=400, error="prompt: empty"),
        outcome(status=0, error="broke off"),
    ]
    own = figures(Run(made, 2.0), 6.0)
    assert (own["answered"], own["refused"], own["failed"]) == (8, 2, 2)
    assert own["answered_per_second"] == 4.0 and own["good_per_second"] == 3.0
    assert own["kinds"]["short"]["within_deadline"] == 0.75
    assert own["within_deadline"] == 0.75
    assert own["between_tokens"]["p50"] == pytest.approx(0.005)
    assert own["errors"] == ["1 times, e.g. prompt: empty", "1 times, e.g. broke off"]
    assert own["kinds"]["long"]["whole"] is None


def test_reasons_that_differ_in_numbers_are_one_with_a_count():
    made = [outcome(status=400, error=f"deadline_ms=300: at least {n}.5 ms") for n in range(9)]
    own = figures(Run([*made, outcome(status=429, error="full")], 1.0), None)
    assert own["refusals"] == [
        "9 times, e.g. deadline_ms=300: at least 0.5 ms",
        "1 times, e.g. full",
    ]


def test_a_load_that_falls_behind_is_said_so_and_its_wait_is_part_of_the_times():
    own = figures(Run([outcome(0.5, lag=0.4)], 1.0), 1.0)
    assert own["whole"]["p50"] == 0.5
    assert "fell behind by up to 400 ms" in remarks({"x": own})[0]


def test_goodput_is_told_against_its_most_at_any_rate_and_against_the_closed_loop():
    def load(good, offered):
        return figures(Run([outcome()] * good, 1.0), offered)

    loads = {"closed, 16 clients": load(100, None), "poisson, 120 %": load(90, 120.0)}
    assert goodput_line(loads) is None
    line = goodput_line(loads | {"poisson, 100 %": load(96, 100.0)})
    assert line == (
        "goodput at poisson, 120 %: 90.0 answers in time a second, 93.8 % of its most at any rate "
        "(96.0 at poisson, 100 %), 90.0 % of the 100.0 of closed, 16 clients"
    )


def test_the_page_and_its_curve_are_whole():
    loads = {f"poisson, {r} %": figures(Run([outcome()] * 4, 1.0), float(r)) for r in (80, 50)}
    ElementTree.fromstring(curve(loads))
    three = {"p50": 0.001, "p90": 0.002, "p99": 0.003}
    added = {"requests": 9, "engine": three, "http": three, "added": three,
             "server": three, "client": three}  # fmt: skip
    same = {"exact": {"requests": 3, "engine": 3, "http": 2}}
    page = markdown(loads, same, added, "load 1", "bench")
    assert "2 of 3 over HTTP" in page and "added 1 / 2 / 3" in page
    assert page.count("\n| poisson") == 2
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1


def test_a_closed_loop_ends_at_its_count_and_at_its_time(address, tokenizer):
    source = shots(settings(), tokenizer, None)

    async def both():
        async with Client(address, send_deadlines=False) as client:
            by_count = await client.closed(source, 2, 3, 60.0)
            by_time = await client.closed(source, 2, 10**9, 0.3)
        return by_count, by_time

    by_count, by_time = asyncio.run(both())
    assert len(by_count.outcomes) == 6 and all(one.answered for one in by_count.outcomes)
    assert by_time.outcomes and by_time.seconds < 60
    assert all(one.layers and one.tokens and one.text for one in by_count.outcomes)


def test_an_open_loop_does_not_wait_and_a_full_server_refuses_cleanly(address):
    shot = Shot("long", tuple(range(3, 40)), 400)

    async def flood():
        async with Client(address) as client:
            return await client.open([shot] * 40)

    own = figures(asyncio.run(flood()), None)
    assert own["failed"] == 0 and own["answered"] + own["refused"] == 40
    assert own["refused"] > 0 and "try again later" in own["refusals"][0]


def test_a_run_finds_equal_answers_and_writes_its_report(address, tmp_path, capsys):
    run_benchmark(
        ["serve", f"url={address}", "clients=3", "identity.requests=4", "requests_per_client=2",
         "rates=[0.5]", "seconds=0.5", f"out={tmp_path / 'o'}", "identity.max_tokens=24"]
    )  # fmt: skip
    record = json.loads((tmp_path / "o" / "serve.json").read_text())
    same = {"requests": 4, "engine": 4, "http": 4}
    assert record["identity"] == {"dense": same, "exact": same}
    assert record["overhead"]["requests"] == 2 and record["overhead"]["http"]["p50"] > 0
    assert list(record["loads"]) == ["closed, 3 clients", "poisson, 50 %"]
    assert "load" in record and (tmp_path / "o" / "serve.svg").exists()
    assert "4 of 4 over HTTP" in capsys.readouterr().out


def test_answers_that_differ_are_an_error(address, monkeypatch):
    found = {"exact": {"requests": 4, "engine": 4, "http": 3}}, None
    monkeypatch.setattr(serve, "_compared", lambda *_: found)
    with pytest.raises(DeliberateError, match="answers differ, exact: 4 of 4 identical in the"):
        run_benchmark(["serve", f"url={address}", "loads=[identity]"])


def test_no_server_at_the_address_is_one_line():
    with pytest.raises(DeliberateError, match="no server answers") as error:
        run_benchmark(["serve", "url=http://127.0.0.1:1", "loads=[closed]"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["loads=[wave]"], "loads=wave"),
        (["loads=[]"], "loads is empty"),
        (["clients=0"], "clients=0"),
        (["long_share=2"], "long_share=2"),
        (["seconds=0"], "seconds=0"),
        (["rates=[0.5,-1]"], r"rates\[1\]=-1"),
        (["dataset=riddles"], "dataset"),
        (["loads=[poisson]"], "capacity"),
        (["identity.fidelities=[budget]"], "identity.fidelities=budget"),
        (["url=http://127.0.0.1:1", "serve_options=[--host]"], "give one of the two"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(given, message):
    with pytest.raises(DeliberateError, match=message):
        run_benchmark(["serve", *given])
