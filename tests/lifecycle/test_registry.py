"""The registry of versions: states follow each other, and SIGKILL loses nothing acknowledged."""

from __future__ import annotations

import itertools
import random
import sqlite3
import subprocess
import sys
import threading
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deliberate.lifecycle.registry import REGISTRY_NAME, VersionRegistry
from deliberate.lifecycle.version import NEXT, Kind, Source, State
from deliberate.utils.errors import DeliberateError

BY = {"reason": "a test", "who": "tester"}


@pytest.fixture
def registry(tmp_path):
    made = VersionRegistry(tmp_path, clock=lambda: datetime(2026, 11, 27, tzinfo=UTC))
    yield made
    made.close()


def proposed(registry, **source):
    return registry.propose(Kind.POLICY, Source("tiny", **source), **BY)


def test_a_version_is_read_back_as_it_was_proposed_also_by_another_process(registry) -> None:
    source = {"calibration": "a.json", "thresholds": (0.5, float("inf")), "fidelity": "threshold"}
    first = proposed(registry, **source)
    second = registry.propose("weights", Source("other"), parent=first.id, figures={"a": 1}, **BY)
    again = VersionRegistry(registry.folder)
    assert again.versions() == [second, first]
    assert again.get(1).source == Source("tiny", **source) and again.get(2).parent == 1
    (event,) = again.history(2)
    assert event.to_dict() == {
        "version": 2, "state": "proposed", "reason": "a test", "who": "tester",
        "when": "2026-11-27T00:00:00.000+00:00", "figures": {"a": 1},
    }  # fmt: skip
    again.close()


def test_a_promotion_retires_the_live_version_and_a_roll_back_brings_it_back(registry) -> None:
    one, two = proposed(registry), proposed(registry)
    registry.move(one.id, State.LIVE, **BY)
    registry.move(two.id, State.CANARY, **BY)
    registry.move(two.id, State.LIVE, reason="better", who="test", figures={"gain": 0.1})
    assert registry.live().id == two.id and registry.get(one.id).state is State.RETIRED
    now = registry.roll_back_live(reason="drift", who="guard", figures={"evidence": 12.0})
    assert now.id == one.id and registry.live() == now
    states = [(event.version, str(event.state)) for event in registry.history()]
    assert states[-2:] == [(two.id, "rolled_back"), (one.id, "live")]
    with pytest.raises(DeliberateError, match="no earlier version"):
        registry.roll_back_live(**BY)


def test_a_roll_back_returns_to_the_version_that_was_live_last(registry) -> None:
    for _ in range(3):
        registry.move(proposed(registry).id, State.LIVE, **BY)
    registry.move(1, State.LIVE, **BY)  # 3 is the one before
    assert registry.previous().id == 3


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda r: r.get(9), "no version 9"),
        (lambda r: r.move(1, "gone", **BY), "state 'gone' is not one of proposed"),
        (lambda r: r.move(1, "retired", **BY), "is proposed and cannot become retired"),
        (lambda r: r.propose("colour", Source("tiny"), **BY), "kind 'colour' is not one of"),
        (lambda r: r.propose("policy", Source("tiny"), parent=7, **BY), "no version 7"),
        (lambda r: Source(""), "model='' must be a text"),
        (lambda r: Source.from_dict({"model": "a", "size": 1}), "has no 'size'"),
        (lambda r: Source.from_dict({}), "needs 'model'"),
        (lambda r: Source("tiny", thresholds="ab"), "must be numbers"),
    ],
)
def test_what_cannot_be_is_an_error_in_one_line_and_changes_nothing(registry, call, text) -> None:
    proposed(registry)
    with pytest.raises(DeliberateError, match=text) as error:
        call(registry)
    assert "\n" not in str(error.value)
    assert len(registry.history()) == 1


def test_there_is_one_canary_at_a_time(registry) -> None:
    proposed(registry), proposed(registry)
    registry.move(1, State.CANARY, **BY)
    with pytest.raises(DeliberateError, match="version 1 is the canary already"):
        registry.move(2, State.CANARY, **BY)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from(list(State))), max_size=20))
def test_whatever_is_tried_one_version_is_live_and_states_follow_their_order(
    tmp_path_factory, tries
) -> None:
    registry = VersionRegistry(tmp_path_factory.mktemp("registry"))
    for _ in range(4):
        proposed(registry)
    for number, state in tries:
        try:
            registry.move(number, state, **BY)
        except DeliberateError:
            continue
    consistent(registry)
    registry.close()


def consistent(registry) -> None:
    found = registry.versions(10_000)
    for state in (State.LIVE, State.CANARY):
        assert sum(one.state is state for one in found) <= 1
    for one in found:
        states = [event.state for event in registry.history(one.id)]
        assert states[0] is State.PROPOSED and states[-1] is one.state
        assert all(after in NEXT[before] for before, after in itertools.pairwise(states))
    ever_live = [event for event in registry.history(limit=10_000) if event.state is State.LIVE]
    assert (registry.live() is not None) == bool(ever_live)  # it never goes without


WRITER = """
import itertools, sys
from deliberate.lifecycle.registry import VersionRegistry
from deliberate.lifecycle.version import Source
registry = VersionRegistry(sys.argv[1])
how = {"reason": "r", "who": "w"}
def said(*what): print(*what, flush=True)
for n in itertools.count():
    made = registry.propose("policy", Source("tiny"), **how).id
    said(made, "proposed")
    for state in ("shadow", "canary", "live"):
        registry.keep_evidence(made, {"n": n})
        registry.move(made, state, **how)
        said(made, state)
    if n % 3 == 1:
        now = registry.roll_back_live(**how).id
        said(made, "rolled_back")
        said(now, "live")
"""


def test_a_writer_killed_at_any_moment_loses_nothing_that_it_acknowledged(tmp_path) -> None:
    draw = random.Random(1)
    for _ in range(12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        said = [writer.stdout.readline() for _ in range(draw.randint(1, 40))]
        threading.Event().wait(draw.random() / 300)  # and then somewhere within a transaction
        writer.kill()
        said += writer.stdout.readlines()
        assert writer.wait() == -9
        registry = VersionRegistry(tmp_path)
        happened = [(event.version, str(event.state)) for event in registry.history(limit=10**6)]
        for line in said:
            if line.endswith("\n"):
                number, state = line.split()
                assert (int(number), state) in happened
        consistent(registry)
        check = registry._connection.execute("PRAGMA integrity_check").fetchone()
        assert check == ("ok",)
        canary = registry.canary()
        if canary is not None:  # as a server does that starts again: it decides anew
            assert registry.evidence(canary.id) is not None
            registry.move(canary.id, State.ROLLED_BACK, **BY)
        registry.close()


def test_threads_take_turns(registry) -> None:
    def work() -> None:
        for _ in range(20):
            proposed(registry)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.id for one in registry.versions()] == list(range(80, 0, -1))


def test_a_foreign_or_later_file_is_an_error_in_one_line(tmp_path) -> None:
    path = tmp_path / REGISTRY_NAME
    path.write_bytes(b"no database at all, but long enough to be read as one" * 40)
    with pytest.raises(DeliberateError, match="cannot be used as a registry"):
        VersionRegistry(tmp_path)
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(DeliberateError, match="has schema 99"):
        VersionRegistry(tmp_path)
