"""`deliberate bench soak`: faults harm no other request, and what it counts is what happened."""

from __future__ import annotations

import asyncio
import json

import httpx
import psutil
import pytest
from live_server import running
from versioned_server import versioned

from deliberate.eval.benchmarks import soak
from deliberate.eval.benchmarks.settings import bench_config, run_benchmark
from deliberate.eval.benchmarks.soak import SoakCounts, misses
from deliberate.eval.benchmarks.soak_requests import FAULTS, WELL, SoakRequest, SoakRequests
from deliberate.utils.errors import DeliberateError


def settings(*more):
    return bench_config("bench_soak", list(more), verbatim=("model", "out"))


def test_a_short_soak_keeps_every_target_but_memorys_which_needs_minutes(tmp_path) -> None:
    cfg = settings("minutes=0.12", "swap_seconds=1.5", "clients=4")
    with running(versioned(tmp_path)) as url:
        counts = asyncio.run(soak._soak(cfg, url, psutil.Process()))
    assert not counts.notes and counts.availability == 1.0 and counts.unclean == 0
    assert counts.swaps >= 2 and counts.swaps_failed == 0
    assert counts.free_blocks[0] == counts.free_blocks[1]
    assert len(counts.memory) >= 4
    assert set(counts.sent) >= {"whole", "streamed", "disconnect"}


def test_requests_repeat_by_seed_and_are_faulty_as_often_as_asked() -> None:
    drawn = [[SoakRequests("tiny", 3, 0.4, True).draw() for _ in range(1)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    source = SoakRequests("tiny", 0, 0.4, True)
    made = [source.draw() for _ in range(2000)]
    assert 0.35 < sum(not one.well_formed for one in made) / 2000 < 0.45
    assert {one.kind for one in made} == WELL.keys() | FAULTS.keys()
    for one in made:
        if one.well_formed:
            json.loads(one.body)
    without = SoakRequests("tiny", 0, 0.0, False)
    assert "structured" not in {without.draw().kind for _ in range(200)}


def counted(**failed) -> SoakCounts:
    counts = SoakCounts(free_blocks=(4, 4), memory=[(s, 100.0) for s in range(100)])
    for kind in ("whole", "nan"):
        for number in range(1000):
            wrong = number < failed.get(kind, 0)
            counts.note(SoakRequest(kind, b""), "status 500" if wrong else None)
    return counts


def test_what_is_missed_is_named() -> None:
    cfg = settings()
    assert misses(counted(), cfg, 20) == []
    assert "availability 99.9000 %" in misses(counted(whole=1), cfg, 20)[0]
    assert "1 faults" in misses(counted(nan=1), cfg, 20)[0]
    leaking = counted()
    leaking.memory = [(s, 100.0 + s) for s in range(100)]
    assert leaking.growth(20) == pytest.approx(194.5 / 123.5 - 1, rel=0.05)
    assert "memory grew" in misses(leaking, cfg, 20)[0]
    held = counted()
    held.free_blocks = (4, 3)
    assert "1 blocks" in misses(held, cfg, 20)[0]
    swapped = counted()
    swapped.swaps, swapped.swaps_failed = 3, 1
    assert "1 of 3 swaps" in misses(swapped, cfg, 20)[0]


def test_growth_that_happens_before_the_load_has_settled_is_not_counted() -> None:
    counts = SoakCounts(memory=[(s, 10.0 * s if s < 20 else 200.0) for s in range(100)])
    assert counts.growth(20) == 0.0


def test_more_choices_than_may_be_are_refused_by_name_not_for_want_of_room(tmp_path) -> None:
    body = {"model": "tiny", "prompt": "a", "n": 10**6}
    with running(versioned(tmp_path)) as url:
        answer = httpx.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 400 and "n=1000000" in answer.text


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('data: {"choices":[{"finish_reason":"stop"}]}\n\ndata: [DONE]\n', None),
        ('data: {"choices":[{"finish_reason":null}]}\n\n', "broke off"),
    ],
)
def test_a_stream_must_end(text, fault) -> None:
    found = soak._whole(SoakRequest("streamed", b"", True), text)
    assert found is None if fault is None else fault in found


def test_an_answer_must_have_its_choices() -> None:
    text = '{"choices":[{"finish_reason":"stop"}]}'
    assert soak._whole(SoakRequest("whole", b""), text) is None
    assert "1 choices of 2" in soak._whole(SoakRequest("several", b"", choices=2), text)


@pytest.mark.parametrize("given", ["minutes=0", "faults=2", "clients=0", "swap_seconds=-1"])
def test_settings_that_cannot_work_are_refused_by_name(given) -> None:
    with pytest.raises(DeliberateError, match=given.split("=")[0]):
        run_benchmark(["soak", given])
