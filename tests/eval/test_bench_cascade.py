"""`deliberate bench cascade`: variants answer the same problems, and the control is at random."""

from __future__ import annotations

import pytest

from deliberate.eval.benchmarks.cascade import EXACT, LARGE, SMALL, Answered, control
from deliberate.eval.benchmarks.settings import run_benchmark
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import read_json


def test_a_short_run_answers_every_problem_by_every_variant(tmp_path, capsys) -> None:
    out, save = tmp_path / "figures.json", tmp_path / "cascade.json"
    given = ["fit=40", "test=20", "problems=4", "warmup=1", "epsilon=0.4", "budgets=[0.9]"]
    given += ["task.max_new_tokens=24", "task.steps=[1,1]", f"out={out}", f"save={save}"]
    run_benchmark(["cascade", *given])
    done = read_json(out)["variants"]
    assert {LARGE, EXACT, SMALL, "cascade", "cascade, large exact"} < set(done)
    assert all(len(one[name]) == 4 for one in done.values() for name in ("texts", "right"))
    assert done[EXACT]["texts"] == done[LARGE]["texts"]
    for name in ("cascade", "cascade, large exact"):
        for place, handed in enumerate(done[name]["handed_over"]):
            assert done[name]["texts"][place] == done[LARGE if handed else SMALL]["texts"][place]
    assert save.exists() and "taken from" in capsys.readouterr().out


def test_the_control_hands_over_as_many_problems_but_no_special_ones() -> None:
    done = {
        LARGE: Answered(right=[True, True, True, False], seconds=[4.0] * 4),
        SMALL: Answered(right=[True, False, False, False], seconds=[1.0] * 4),
        "cascade": Answered(handed_over=[True, True, False, False], seconds=[0.0] * 4),
    }
    assert control(done, "cascade", LARGE) == (0.5, 3.0)


@pytest.mark.parametrize("given", ["problems=0", "measure=odd", "exit=9", "epsilon=0"])
def test_settings_that_cannot_work_are_refused_by_name(given) -> None:
    with pytest.raises(DeliberateError, match=given.split("=")[0]):
        run_benchmark(["cascade", "fit=20", "test=20", "task.max_new_tokens=4", given])
