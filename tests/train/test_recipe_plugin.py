"""A recipe of the user's own, as docs/extending.md writes it: one Python file and one YAML."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from random_checkpoint import save_checkpoint

from deliberate.api.model import AdaptiveModel
from deliberate.train.app import main
from deliberate.train.recipes import RECIPES, find_recipe
from deliberate.utils.errors import DeliberateError
from deliberate.utils.training_record import read_run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
SETTINGS = [
    "model=folder", "data=words", "data.max_tokens=150", "trainer=finetune",
    "trainer.max_steps=2", "trainer.tokens_per_step=300", "trainer.micro_batches=2",
    "trainer.warmup_steps=1", "trainer.log_every=1", "trainer.save_every=2",
    "trainer.bf16=false", "trainer.target_agreement=null", "exits.layers=[1,2]",
]  # fmt: skip


def block(language: str) -> str:
    section = PAGE.read_text(encoding="utf-8").split("## A training recipe", 1)[1]
    found = re.search(rf"```{language}\n(.*?)```", section.split("\n## ", 1)[0], re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A user's folder with the two files of the documentation."""
    (tmp_path / "my_recipes").mkdir()
    (tmp_path / "my_recipes" / "soft_heads.py").write_text(block("python"))
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    (tmp_path / "conf" / "recipe" / "soft_heads.yaml").write_text(block("yaml"))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("my_recipes")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """A checkpoint without exits."""
    made = save_checkpoint(tmp_path_factory.mktemp("models") / "stock")
    for name in ("adaptive_config.json", "exits.safetensors"):
        (made / name).unlink()
    return made


def train(folder: Path, stock: Path, *overrides: str) -> Path:
    run = folder / "run"
    main(["--config-dir", str(folder / "conf"), "recipe=soft_heads", *SETTINGS,
          f"model.path='{stock}'", f"output_dir='{run}'", *overrides])  # fmt: skip
    return run


def test_the_recipe_of_the_documentation_trains_and_its_model_loads(folder, stock):
    run = train(folder, stock)
    record = read_run(run)
    assert record.recipe == "my_recipes.soft_heads" and record.steps == 2
    assert record.config.recipe["temperature"] == 2.0
    model = AdaptiveModel.from_pretrained(run / "model", executor="generic")
    base = AdaptiveModel.from_pretrained(stock, exits=(1, 2), executor="generic").base
    trained = model.base.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in base.state_dict().items())
    assert any(bool(value.any()) for value in model.exits.translators.state_dict().values())


def test_a_setting_that_its_objective_does_not_take_is_refused_by_name(folder, stock):
    with pytest.raises(DeliberateError, match=r"unknown setting recipe\.rank.*has temperature"):
        train(folder, stock, "+recipe.rank=3")
    assert not (folder / "run" / "model").exists()


def test_a_module_that_is_not_there_or_has_no_recipe_is_one_line(folder):
    with pytest.raises(DeliberateError, match=r"No module named 'my_recipes\.nothing'"):
        find_recipe("my_recipes.nothing")
    (folder / "my_recipes" / "empty.py").write_text("")
    importlib.invalidate_caches()
    with pytest.raises(DeliberateError, match=r"it has no RECIPE\); it is one of distill"):
        find_recipe("my_recipes.empty")


def test_every_file_of_the_objectives_with_a_recipe_is_found():
    assert set(RECIPES) == {"distill", "gate", "heads", "layerskip", "lora", "pretrain", "qat"}
    assert all(find_recipe(name) is recipe for name, recipe in RECIPES.items())
