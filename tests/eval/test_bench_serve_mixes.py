"""`deliberate bench serve`: tiers, a burst, and the same prompts again and again."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
from live_server import running

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.eval.benchmarks.serve_client import Outcome, Run
from deliberate.eval.benchmarks.serve_hot import Hot, drawn, told_apart
from deliberate.eval.benchmarks.serve_load import Shot
from deliberate.eval.benchmarks.serve_mixes import server_options
from deliberate.eval.benchmarks.serve_tiers import (
    TIERS,
    burst,
    burst_line,
    completed_per_second,
    mixed,
    thirds,
    tiers_line,
)
from deliberate.eval.benchmarks.settings import bench_config, run_benchmark
from deliberate.serving.command import build_server
from deliberate.serving.settings import ServerSettings


def source():
    return (Shot("short", (number,), 64, 300.0) for number in itertools.count(5))


def settings(*given: str):
    return bench_config("bench_serve", list(given), verbatim=("model", "out", "url"))


def outcome(due=0.0, seconds=0.1, kind="short", status=200, deadline_ms=None, first=0.05):
    met = None if deadline_ms is None else 1000 * (seconds - 0.015) <= deadline_ms
    return Outcome(kind, status, due, 0.0, first, seconds, 4, deadline_ms=deadline_ms, met=met)


def test_tiers_come_by_their_shares_with_their_deadlines_and_names() -> None:
    made = list(itertools.islice(mixed(source(), 0), 2000))
    counts = Counter(one.kind for one in made)
    by_name = {one.name: one for one in TIERS}
    assert set(counts) == set(by_name)
    assert all(abs(count / 2000 - by_name[name].share) < 0.04 for name, count in counts.items())
    for one in made:
        tier = by_name[one.kind]
        assert (one.max_tokens, one.deadline_ms) == (tier.max_tokens, tier.deadline_ms)
        assert one.fields.get("service_tier") == tier.service_tier
    assert sum(one.share for one in TIERS) == pytest.approx(1.0)


def test_admitted_deadlines_and_the_wait_of_batch_work_are_told() -> None:
    made = [outcome(kind="L1", deadline_ms=50.0, seconds=0.04) for _ in range(19)]
    made += [outcome(kind="L1", deadline_ms=50.0, seconds=0.06)]
    made += [outcome(kind="L1", deadline_ms=50.0, status=429)]
    made += [outcome(kind="batch", first=1.25), outcome(kind="batch", first=0.2)]
    line = tiers_line(Run(made, 1.0))
    assert "20 of 21 requests with deadlines admitted, 95.0 % of them in time" in line
    assert "L1 20 of 21, 95.0 % in time, 100.0 % by the server's clock" in line
    assert "first token 1.25 s" in line


def test_a_burst_is_five_times_as_dense_in_its_second_third() -> None:
    made = burst(source(), 100.0, 5.0, 9.0, 0)
    counts = [
        len(part.outcomes) for part in thirds(Run([outcome(s.arrival) for s in made], 9.0), 9.0)
    ]
    assert counts[0] == pytest.approx(300, rel=0.2) and counts[2] == pytest.approx(300, rel=0.2)
    assert counts[1] == pytest.approx(1500, rel=0.1)
    assert [one.arrival for one in made] == sorted(one.arrival for one in made)


def test_the_throughput_through_a_burst_counts_what_ended_in_it() -> None:
    # A simulated machine that answers one request each 10 ms, in order: its capacity is 100.
    free, made = 0.0, []
    for shot in burst(source(), 40.0, 5.0, 9.0, 0):
        free = max(free, shot.arrival) + 0.01
        made.append(outcome(shot.arrival, free - shot.arrival))
    run = Run(made, free)
    assert completed_per_second(run, 3.0, 6.0) == pytest.approx(100, rel=0.05)
    assert completed_per_second(run, 0.0, 3.0) == pytest.approx(40, rel=0.3)
    assert "% of the capacity of 100.0; failed 0" in burst_line(run, 9.0, 100.0)
    failed = Run([*made, outcome(status=0)], free)
    assert burst_line(failed, 9.0, 100.0).endswith("failed 1")


def test_few_prompts_come_often() -> None:
    prompts = [Shot("short", (number,), 4) for number in range(200)]
    counts = Counter(one.prompt[0] for one in drawn(prompts, 1.1, 20_000, 0))
    share = 1.0 / sum(rank**-1.1 for rank in range(1, 201))
    assert counts[0] / 20_000 == pytest.approx(share, rel=0.05)
    assert counts[9] / counts[0] == pytest.approx(10**-1.1, rel=0.15)
    apart = list(told_apart(drawn(prompts, 1.1, 50, 0)))
    assert len({one.fields["seed"] for one in apart}) == 50
    line = Hot(50, 20, 10.0, 25.0, 40.0, 1, 0).line()
    assert "(2.50x)" in line and "(4.00x)" in line and "differ 1" in line


def test_a_server_gets_the_options_that_its_loads_need() -> None:
    cfg = settings("loads=[tiers,zipf]")
    assert server_options(cfg) == ["--scheduler", "feedback", "--cache-entries", "4096"]
    cfg = settings("loads=[zipf]", "serve_options=['--cache-entries',9]")
    assert server_options(cfg) == []
    assert server_options(settings("loads=[closed]")) == []


def test_the_three_loads_run_over_http_and_are_reported(tmp_path, capsys) -> None:
    own = ServerSettings(cache_entries=64, scheduler="feedback", max_running=4)
    model, tokenizer = AdaptiveModel.from_pretrained("tiny"), checkpoint.load_tokenizer("tiny")
    with running(build_server(model, tokenizer, "tiny", own)) as url:
        run_benchmark(
            ["serve", f"url={url}", "loads=[tiers,burst,zipf]", "clients=2", "seconds=0.6",
             "zipf.requests=12", "zipf.prompts=3", f"out={tmp_path / 'o'}"]
        )  # fmt: skip
    said = " ".join(capsys.readouterr().out.split())
    assert "zipf: 12 requests for" in said and "answers that differ 0, failed 0" in said
    record = json.loads((tmp_path / "o" / "serve.json").read_text())
    names = list(record["loads"])
    assert names[:2] == ["tiers, 2 clients", "tiers, 80 %"]
    assert names[3:] == ["burst, before", "burst, through", "burst, after"]
    assert all(own["failed"] == 0 for own in record["loads"].values())
    assert len(record["lines"]) == 3
