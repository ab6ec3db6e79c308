"""What requests cost by who spends it, and what that allows on so many cores."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from deliberate.eval.benchmarks import replica_costs
from deliberate.eval.benchmarks.replica_costs import (
    ROLES,
    RequestCosts,
    highest_efficiency,
    highest_rate,
    processor_seconds,
)

# Milliseconds of a request of a small and of a large model.
SMALL = {"client": 0.002, "front": 0.003, "replicas": 0.005, "ray": 0.001}
LARGE = SMALL | {"replicas": 1.0}


def test_a_large_models_replicas_add_up_and_a_small_ones_wait_for_the_rest() -> None:
    assert highest_rate(LARGE, 1, 2) == pytest.approx(1.0)
    assert highest_efficiency(LARGE, LARGE, 2, 2) == pytest.approx(2 / 1.006 / 2)
    assert highest_rate(SMALL, 1, 2) == pytest.approx(2 / 0.011)
    assert highest_efficiency(SMALL, SMALL, 2, 2) == pytest.approx(0.5)
    # With cores enough the front is what all of them wait for.
    assert highest_rate(SMALL, 64, 1000) == pytest.approx(1 / 0.003)


def test_costs_are_of_requests_and_summed_over_loads() -> None:
    costs = RequestCosts()
    before, after = dict.fromkeys(ROLES, 1.0), dict.fromkeys(ROLES, 2.0)
    costs.note(before, after, 10)
    costs.note(before, after | {"front": 4.0}, 10)
    assert costs.each == {"client": 0.1, "front": 0.2, "replicas": 0.1, "ray": 0.1}
    assert "front 200.00" in costs.line()
    assert RequestCosts().each == dict.fromkeys(ROLES, 0.0)


def test_processes_under_the_front_are_told_apart_by_their_names(monkeypatch) -> None:
    busy = (
        "import time\nwhile time.process_time() < 0.2: pass\nprint(1, flush=True)\ntime.sleep(30)"
    )
    front = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess; subprocess.run({[sys.executable, '-c', busy]})",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert front.stdout is not None and front.stdout.readline().strip() == "1"
        assert processor_seconds(front.pid)["ray"] >= 0.15
        monkeypatch.setattr(replica_costs, "_REPLICA", sys.executable)
        found = processor_seconds(front.pid)
    finally:
        for one in psutil.Process(front.pid).children(recursive=True):
            one.kill()
        front.kill()
        front.wait()
    assert found["replicas"] >= 0.15 and found["ray"] == 0.0 and found["client"] > 0
