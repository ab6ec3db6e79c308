"""`python -m deliberate.serving.scale.plan`: what it reads, and what its tables say."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from deliberate.serving.scale.plan import (
    Plan,
    cost_of,
    fleet_table,
    front_line,
    read_plan,
    separation_table,
)
from deliberate.serving.scale.separation import StepTimes
from deliberate.utils.errors import DeliberateError

TIMES = StepTimes(
    decode=lambda n: 0.020 + 0.002 * n, prompt=lambda n: 0.001 * n, transfer=lambda n: 1e-5 * n
)
SMALL = Plan(machines=4, requests=150, replicas=10, prompt=200, answer=20, slots=8)


def text(table) -> str:
    console = Console(width=160, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def row(shown: str, name: str) -> list[str]:
    (found,) = [line for line in shown.splitlines() if name in line]
    return [cell.strip() for cell in found.strip("│ ").split("│")]


def test_settings_are_read_by_name_and_wrong_ones_refused_by_name() -> None:
    assert read_plan(["load=0.5", "machines=3", "model=tiny"]) == Plan(
        load=0.5, machines=3, model="tiny"
    )
    for given, named in (("odd=1", "odd=1"), ("machines=x", "machines"), ("load=0", "load")):
        with pytest.raises(DeliberateError, match=named):
            read_plan([given])


def test_a_file_without_a_cost_model_is_refused(tmp_path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps({"model": "tiny"}))
    with pytest.raises(DeliberateError, match="no file of `deliberate bench cost"):
        cost_of(Plan(cost=str(path)))


def test_apart_no_prompt_lies_between_two_tokens_and_smaller_chunks_help_together() -> None:
    shown = text(separation_table(SMALL, TIMES))
    late = {
        name: float(row(shown, name)[4])
        for name in ("chunks of 256", "chunks of 64", "2 for prompts")
    }
    assert late["2 for prompts"] < late["chunks of 64"] < late["chunks of 256"]
    # The first of them waits for the transfer and for the step that runs.
    assert late["2 for prompts"] <= 1000 * (2 * TIMES.decode(8) + 1e-5 * 300) + 1


def test_a_router_that_looks_at_more_replicas_keeps_the_slowest_answers_shorter() -> None:
    shown = text(fleet_table(SMALL, TIMES))
    late = [float(row(shown, name)[1].split("/")[1]) for name in ("1, in turn", "all, by score")]
    assert late[1] <= late[0]


def test_fronts_are_counted_from_a_requests_processor_time() -> None:
    assert "10 replicas at 80%" in front_line(SMALL, TIMES)
    more = front_line(Plan(**vars(SMALL) | {"replicas": 1000, "front_ms": 50.0}), TIMES)
    assert "1000 replicas at 80% answer" in more
    rate = float(more.split("answer ")[1].split(" ")[0])
    fronts = float(more.split("that is ")[1].split(" ")[0])
    assert fronts == pytest.approx(rate * 0.05 / 0.7, abs=1.5)
