"""A version whose tokens take much longer than those of the one before is rolled back."""

from __future__ import annotations

import httpx
import pytest
from live_server import running, wait_until
from versioned_server import versioned

from deliberate.lifecycle.version import State
from deliberate.serving.pace import Pace
from deliberate.serving.probation import Probation, ProbationSettings
from deliberate.utils.errors import DeliberateError


def paced(seconds: float, running_: int = 1, steps: int = 300) -> Pace:
    pace = Pace()
    for _ in range(steps):
        pace.note_step(running_, running_, 0, seconds)
    return pace


def test_only_a_slow_version_at_the_same_load_is_named_and_only_after_several_looks() -> None:
    one = ProbationSettings(looks=3)
    slow = Probation(paced(0.021), paced(0.01), one)
    assert [slow.look(), slow.look()] == [None, None]
    assert "take 2.10 times as long" in slow.look()
    close = Probation(paced(0.019), paced(0.01), one)
    assert [close.look() for _ in range(9)] == [None] * 9
    busier = Probation(paced(0.5, running_=8), paced(0.01), one)
    assert [busier.look() for _ in range(9)] == [None] * 9
    few = Probation(paced(0.5, steps=100), paced(0.01), one)
    assert [few.look() for _ in range(9)] == [None] * 9


def test_a_spike_that_ends_is_forgotten_and_so_is_one_after_the_probation() -> None:
    now, pace = [0.0], paced(0.03)
    one = Probation(pace, paced(0.01), ProbationSettings(looks=2), lambda: now[0])
    assert one.look() is None
    for _ in range(100):
        pace.note_step(1, 1, 0, 0.01)
    assert one.look() is None
    for _ in range(100):
        pace.note_step(1, 1, 0, 0.05)
    assert one.look() is None
    now[0] = 600.0
    assert one.over and one.look() is None
    with pytest.raises(DeliberateError, match="times above 1"):
        ProbationSettings(times=1.0)


def test_a_promoted_version_that_is_slow_is_rolled_back_by_itself(tmp_path) -> None:
    server = versioned(tmp_path)
    server.life_cycle._watch_seconds = 0.02
    with running(server) as url:
        server.versions.live.pace = paced(0.001)
        made = httpx.post(f"{url}/admin/versions", json={"fidelity": "dense", "reason": "a test"})
        number = made.json()["id"]
        httpx.post(f"{url}/admin/versions/{number}/promote", json={"reason": "a test"})
        live = server.versions.live
        assert live.number == number
        for _ in range(300):
            live.pace.note_step(1, 1, 0, 0.1)
        assert wait_until(lambda: server.versions.live.number == 1)
        registry = server.life_cycle.registry
        assert registry.get(number).state is State.ROLLED_BACK
        assert "times as long" in registry.history(number)[-1].reason
