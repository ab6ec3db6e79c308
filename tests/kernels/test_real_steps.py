"""The steps of a GPU session with a real model, and the comparison of answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deliberate.kernels.tools import gpu_session, real_decode
from deliberate.kernels.tools.real_steps import Step, real_steps
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import read_json


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_each_list_of_questions_gives_its_steps_and_all_fit_the_session(model: Path) -> None:
    lists = {"questions": Path("q"), "prompts": Path("p")}
    every = real_steps(model, Path("out"), **lists)
    assert [one.name for one in every] == ["real decoding", "draft layer", "decoding with it"]
    assert sum(one.limit for one in every) <= 510
    assert str(Path("out/draft")) in every[2].command
    alone = real_steps(model, Path("out"), questions=Path("q"))
    assert [one.name for one in alone] == ["draft layer"]
    with pytest.raises(DeliberateError, match="needs --questions FILE, --prompts FILE or both"):
        real_steps(model, Path("out"))
    with pytest.raises(DeliberateError, match=r"has no config\.json"):
        real_steps(model / "elsewhere", Path("out"), **lists)


def test_steps_are_chosen_by_name_and_an_unknown_one_is_refused() -> None:
    every = [Step(name, ("true",), 1) for name in ("tests", "draft layer", "last")]
    chosen = gpu_session.chosen_steps(every, "last, tests")
    assert [one.name for one in chosen] == ["tests", "last"]
    assert gpu_session.chosen_steps(every, None) == tuple(every)
    with pytest.raises(DeliberateError, match="'first' is unknown: one of tests, draft layer"):
        gpu_session.chosen_steps(every, "first")


def test_answers_that_part_are_named_with_place_and_gap() -> None:
    asked = []

    def gap(prompt: int, tokens: object) -> float:
        asked.append((prompt, list(tokens)))
        return 0.25

    found = real_decode.compare([[1, 2, 3], [4, 5], [6]], [[1, 2, 3], [4, 6]], gap)
    assert (found["identical"], found["compared"]) == (1, 2)
    assert found["parts"] == [{"prompt": 1, "token": 1, "gap": 0.25}] and asked == [(1, [4])]


def test_every_way_is_measured_and_its_tokens_compared(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["1 + 2?", "3 + 4?"]))
    given = ["--model", "tiny", "--prompts", str(prompts), "--dtypes", "float32", "--tokens", "6"]
    given += ["--rivals", "1", "--out", str(tmp_path / "real")]
    assert real_decode.main(given) == 1  # tiny has no draft layer to draft by
    figures = read_json(tmp_path / "real.json")
    ways = {row["way"]: row for row in figures["ways"]}
    assert set(figures["failed"]) == {"float32, exact, draft layer"}
    assert set(ways) == {"dense", "exact, looked up", "exact, both", "transformers"}
    for way in ("exact, looked up", "exact, both"):
        assert ways[way]["as_dense"]["identical"] == 2
        assert ways[way]["as_transformers"]["identical"] == 1
    assert "| float32 | dense | " in (tmp_path / "real.md").read_text()
