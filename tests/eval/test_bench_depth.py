"""`deliberate bench depth`: students of fewer layers, their loss and their time."""

from __future__ import annotations

import json

import pytest
from random_checkpoint import save_checkpoint
from tiny_models import random_ids

from deliberate.eval.benchmarks.settings import run_benchmark
from deliberate.utils.errors import DeliberateError


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    folder = tmp_path_factory.mktemp("depth")
    for name, count in (("texts", 12), ("held", 5)):
        texts = [random_ids(30, seed=one + len(name))[0].tolist() for one in range(count)]
        rows = [{"tokens": ids, "prompt": 8} for ids in texts]
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in rows))
    model = save_checkpoint(folder / "model")
    return ["depth", f"model={model}", f"texts={folder / 'texts'}", f"held_out={folder / 'held'}",
            "rounds=4", "search_tokens=150", "fit_tokens=200", "judged=2", "most=3"]  # fmt: skip


def test_fewer_layers_cost_loss_and_save_time(common, tmp_path, capsys):
    out = tmp_path / "out.json"
    run_benchmark([*common, "keep=[4,3,2]", f"out={out}"])
    found = json.loads(out.read_text())["students"]
    assert [len(one["layers"]) for one in found] == [4, 3, 2]
    whole, *fewer = found
    assert whole["layers"] == [1, 2, 3, 4] and whole["time"] == 1 and whole["expected"] == 0
    assert whole["ratio"] == pytest.approx(1, abs=1e-3)
    assert whole["divergence"] == pytest.approx(0, abs=1e-2)
    assert all(one["divergence"] > 1e-3 and one["time"] < 1 for one in fewer)
    kept = ",".join(map(str, found[1]["layers"]))
    assert f"'model.keep_layers=[{kept}]'" in capsys.readouterr().out


def test_given_layers_are_fitted_without_a_search(common, tmp_path, capsys):
    out = tmp_path / "out.json"
    run_benchmark([*common, "layers=[[1,2,4],[1,3]]", f"out={out}"])
    found = json.loads(out.read_text())["students"]
    assert [one["layers"] for one in found] == [[1, 2, 4], [1, 3]]
    assert "what it can stand for" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("keep=[5]", r"keep=\[5\]: .* has 1 to 4 layers"),
        ("keep=[1]", "1 layers that stand for at most 3 each do not make 4; raise most"),
        ("layers=[[2,1]]", "must ascend, each layer once"),
        ("fit_tokens=9999", "texts hold .* tokens, not 9999"),
        ("most=1", "most=1"),
    ],
)
def test_what_cannot_work_is_one_line(common, setting, named):
    with pytest.raises(DeliberateError, match=named) as caught:
        run_benchmark([*common, setting])
    assert "\n" not in str(caught.value)


def test_files_are_asked_for_by_name(common):
    with pytest.raises(DeliberateError, match="held_out=null: give a file of token ids"):
        run_benchmark(common[:3])


def test_a_model_that_there_is_not_is_named_before_the_files_it_would_need():
    with pytest.raises(DeliberateError, match="model '/none' is neither a folder nor"):
        run_benchmark(["depth", "model=/none"])
