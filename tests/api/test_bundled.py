"""The bundled model: exact equals dense on real answers, and it is what its card says."""

from __future__ import annotations

import json
import re
import tomllib
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from deliberate.api import checkpoint
from deliberate.api.draft_files import load_draft
from deliberate.api.model import AdaptiveModel
from deliberate.data.prompts import Encoder
from deliberate.data.word_problems import word_problems
from deliberate.eval.grading.answers import extract_answer
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.exit_heads import ExitHeads
from deliberate.utils.errors import DeliberateError

PROMPTS, CHUNKS = 500, 20
MEGABYTE = 10**6


@cache
def bundled() -> tuple[AdaptiveModel, Encoder]:
    tokenizer = checkpoint.load_tokenizer("tiny")
    return AdaptiveModel.from_pretrained("tiny"), Encoder(tokenizer, max_tokens=10**6)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_exact_equals_dense_on_500_prompts_token_for_token(chunk):
    model, encoder = bundled()
    size = PROMPTS // CHUNKS
    drafted = accepted = 0
    for problem in word_problems("test", size=size, seed=9_000 + chunk):
        ids = torch.tensor([encoder.prompt(problem.question)])
        dense = model.generate(ids, max_new_tokens=64, fidelity="dense")
        exact = model.generate(
            ids, max_new_tokens=64, fidelity="exact", return_dict_in_generate=True
        )
        assert torch.equal(exact.sequences, dense), problem.question
        drafted += exact.trace.drafted
        accepted += sum(layer < 8 for layer in exact.trace.exit_layers)
    assert accepted > 0.3 * drafted > 0, (
        "most tokens would have to be drafted for this to test much"
    )


def test_it_answers_one_step_problems():
    model, encoder = bundled()
    right = 0
    for problem in word_problems("test", size=20, seed=5, steps=(1, 1)):
        ids = torch.tensor([encoder.prompt(problem.question)])
        out = model.generate(ids, max_new_tokens=64)
        text = encoder.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        right += extract_answer(text, "gsm8k") == problem.answer
    assert right >= 12


def test_it_fits_in_16_megabytes_and_carries_its_card():
    folder = Path(str(resources.files("deliberate.checkpoints") / "tiny"))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16 * MEGABYTE
    card = (folder / "README.md").read_text(encoding="utf-8")
    for needed in ("## Training", "## Accuracy", "seed", "gsm8k", "by difficulty"):
        assert needed in card


def test_digits_are_single_tokens_and_any_text_survives_the_tokenizer():
    tokenizer = bundled()[1].tokenizer
    assert len(tokenizer.encode("90210", add_special_tokens=False)) == 5
    text = "Zoë pays €3.50 — “why?” 你好\n\t#### 7"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_its_exits_are_where_the_card_says_and_below_the_top():
    model, _ = bundled()
    layers = model.exit_config.layers
    assert len(layers) >= 3 and model.backbone.num_layers >= 8
    assert layers[-1] < model.backbone.num_layers


# -- the same backbone with a deliberation gate ----------------------------------------------------


@cache
def gated() -> AdaptiveModel:
    return AdaptiveModel.from_pretrained("tiny-gate")


def test_the_gated_model_is_the_bundled_one_and_a_gate():
    plain, model = bundled()[0], gated()
    theirs = plain.base.state_dict() | plain.exits.state_dict()
    mine = model.base.state_dict() | model.exits.state_dict()
    assert set(mine) == set(theirs) and all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert model.gate is not None and plain.gate is None
    assert model.exit_config == plain.exit_config
    assert checkpoint.load_tokenizer("tiny-gate").get_vocab() == bundled()[1].tokenizer.get_vocab()


def test_the_gated_model_repeats_no_weight_of_its_base():
    folder = Path(str(resources.files("deliberate.checkpoints") / "tiny-gate"))
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "adaptive_config.json", "exits.safetensors", "gate.safetensors", "calibration.json",
        "README.md",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2 * MEGABYTE
    assert checkpoint.read_adaptive_config(str(folder)).base == checkpoint.resolve("tiny")


def test_the_drafts_for_smollm2_repeat_no_weight_of_it_and_fit_in_16_megabytes():
    folder = Path(str(resources.files("deliberate.checkpoints") / "smollm2-draft"))
    names = {path.name for path in folder.iterdir()}
    assert names - {"calibration.json"} == {
        "adaptive_config.json", "draft.safetensors", "exits.safetensors", "fit.json", "README.md",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16 * MEGABYTE
    config = json.loads((folder / "adaptive_config.json").read_text())
    assert config["base"] == "smollm2"
    layer, prior = load_draft(folder, config["draft"])
    assert layer.config.hidden_size == 576 and int(layer.vocabulary.max()) < 49_152
    assert prior.survives[0] > 0.5
    card = (folder / "README.md").read_text()
    assert f"{prior.survives[0]:.2f}" in card
    exits = ExitHeads(ExitConfig.from_dict(config["exits"], num_layers=30), 576)
    checkpoint.load_exits(str(folder), exits)
    assert exits.trained and len(exits.vocabulary) == config["exits"]["vocabulary"] > 0
    assert int(exits.vocabulary.max()) < 49_152
    assert f"exits over {len(exits.vocabulary)} tokens" in card


def test_no_bundled_file_names_a_folder_of_the_machine_that_made_it():
    root = Path(str(resources.files("deliberate.checkpoints")))
    for path in (*root.rglob("*.json"), *root.rglob("*.md")):
        found = re.findall(r'"/[\w.-]+/[^"]*"|(?:/home|/root|/work|/tmp)/', path.read_text())
        assert not found, f"{path.name}: {found}"


def test_every_bundled_model_is_in_the_wheel():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["deliberate.checkpoints"]
    assert {f"{name}/*" for name in checkpoint.bundled_models()} == set(patterns)


def test_a_bundled_base_is_saved_by_its_name_and_not_by_its_place(tmp_path):
    model = gated()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adaptive_config.json").read_text())["base"] == "tiny"
    again = AdaptiveModel.from_pretrained(tmp_path)
    assert again.fingerprints() == model.fingerprints()


def test_the_gate_thinks_in_exact_as_in_dense_and_its_calibration_is_its_own():
    model, encoder = gated(), bundled()[1]
    calibration = model.require_calibration()
    weights, exits = model.fingerprints()
    calibration.check(weights=weights, exits=exits)
    with pytest.raises(DeliberateError, match="other exits"):
        bundled()[0].set_calibration(calibration)
    thoughts = 0
    for problem in word_problems("test", size=12, seed=9_100, steps=(4, 6)):
        ids = torch.tensor([encoder.prompt(problem.question)])
        how = {"max_new_tokens": 96, "return_dict_in_generate": True}
        dense = model.generate(ids, fidelity="dense", **how)
        exact = model.generate(ids, fidelity="exact", **how)
        assert torch.equal(exact.sequences, dense.sequences), problem.question
        assert [r.rounds for r in exact.trace.records] == [r.rounds for r in dense.trace.records]
        thoughts += dense.trace.rounds
        model.generate(ids, fidelity="certified", max_new_tokens=8)
    assert thoughts > 0


def test_one_price_gives_exits_and_band_of_the_gated_model():
    table = gated().require_calibration().policy
    assert table.gate_threshold(0.0) == 0.0 < table.gate_threshold(table.lambdas[-1]) <= 1.0
    assert all(before <= after for before, after in pairwise(table.gate_thresholds))
