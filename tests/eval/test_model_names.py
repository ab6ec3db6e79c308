"""What models are called in results."""

from __future__ import annotations

import pytest

from deliberate.eval.runner.model_names import model_name
from deliberate.utils.errors import DeliberateError


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("tiny", "tiny"),
        ("owner/SmolLM2-135M", "SmolLM2-135M"),
        ("outputs/tiny/model", "tiny"),
        ("outputs/heads-smollm/model/", "heads-smollm"),
        ("/data/runs/lr3/checkpoints/checkpoint-400", "lr3/checkpoints/checkpoint-400"),
        ("multirun/sweep/0/model", "sweep/0"),
        ("multirun/sweep/1/model", "sweep/1"),
        ("runs/2026-11-26/12-00-01/model", "runs/2026-11-26/12-00-01"),
        ("../distilled/final", "distilled"),
        ("qwen2.5", "qwen2.5"),
    ],
)
def test_a_trained_run_is_called_by_its_own_name(source, name) -> None:
    assert model_name(source) == name


def test_a_folder_without_a_name_is_called_by_where_it_is(tmp_path, monkeypatch) -> None:
    (tmp_path / "run7" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run7")
    assert model_name("model") == model_name("./model") == model_name(".") == "run7"
    with pytest.raises(DeliberateError, match="model has no value"):
        model_name(" ")
