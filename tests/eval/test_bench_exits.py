"""`deliberate bench exits`: accuracy with every token chosen at one depth."""

from __future__ import annotations

import json

import pytest
import torch
from random_checkpoint import LAYERS, save_checkpoint

from deliberate.api.checkpoint import load_tokenizer
from deliberate.api.model import AdaptiveModel
from deliberate.data.prompts import Encoder
from deliberate.eval.benchmarks import exits as bench_exits
from deliberate.eval.benchmarks.exits import Answered, answer, paired, summarise
from deliberate.eval.benchmarks.settings import run_benchmark
from deliberate.eval.grading.graders import GraderPool
from deliberate.eval.report.detokenize import decode_text
from deliberate.eval.tasks.registry import build_task, evaluation_config
from deliberate.utils.errors import DeliberateError

NEW_TOKENS = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return AdaptiveModel.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def task():
    return build_task(evaluation_config(["task.size=5", f"task.max_new_tokens={NEW_TOKENS}"]).task)


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return Encoder(load_tokenizer(checkpoint), max_tokens=1000)


def cut_off(model, prompt, exit_index, end):
    """Tokens of the model cut off after an exit; the first is the whole model's."""
    ids = list(prompt)
    with torch.no_grad():
        for made in range(NEW_TOKENS):
            states = model(torch.tensor([ids]), output_exit_states=True)
            state = states.last if made == 0 else states.exits[exit_index]
            normed = model.backbone.norm(state[:, -1])
            if made:
                normed = model.exits.translate(exit_index, normed)
            ids.append(int(model.backbone.head_logits(normed).argmax()))
            if ids[-1] == end:
                break
    return ids[len(prompt) :]


@pytest.mark.parametrize("exit_index", [0, 1])
def test_answers_are_those_of_the_model_cut_off_after_the_exit(model, task, encoder, exit_index):
    layer = model.exit_config.layers[exit_index]
    before = model.exit_config
    with GraderPool(1) as pool:
        found = answer(model, encoder, task, layer, pool, batch=2)
    expected = [
        cut_off(model, encoder.prompt(p.question), exit_index, encoder.tokenizer.eos_token_id)
        for p in task.problems
    ]
    assert list(found.texts) == [decode_text(encoder.tokenizer, tokens) for tokens in expected]
    assert found.tokens == sum(map(len, expected))
    assert found.truncated == sum(len(tokens) == NEW_TOKENS for tokens in expected) > 0
    assert model.exit_config == before


def test_no_layer_above_the_exit_is_run_after_the_prompt(model, task, encoder):
    calls = [0] * LAYERS
    handles = []
    for index, layer in enumerate(model.base.model.layers):

        def hook(*_, index=index):
            calls[index] += 1

        handles.append(layer.register_forward_hook(hook))
    try:
        with GraderPool(1) as pool:
            answer(model, encoder, task, 1, pool, batch=8)
    finally:
        for handle in handles:
            handle.remove()
    assert calls[0] > NEW_TOKENS - 2 and calls[1:] == [1] * (LAYERS - 1)


def answered(*correct):
    return Answered(texts=("",) * len(correct), correct=correct, tokens=10, truncated=0)


def test_two_models_are_compared_problem_by_problem():
    before = answered(True, False, False, False, False, False)
    after = answered(False, True, True, True, False, False)
    found = paired(after, before)
    assert found.difference == pytest.approx(2 / 6)
    assert (found.mcnemar.b, found.mcnemar.c) == (1, 3)
    assert found.interval.low < 2 / 6 < found.interval.high


def test_depths_are_compared_with_the_last_and_with_the_same_of_the_baseline():
    own = {2: answered(True, False, False), 4: answered(True, True, True)}
    rows = summarise(own, {4: answered(False, False, False)})
    assert [row.layer for row in rows] == [2, 4]
    assert rows[0].versus_last.difference == pytest.approx(-2 / 3)
    assert rows[0].versus_baseline is None, "the baseline has no exit there"
    assert rows[1].versus_last is None and rows[1].versus_baseline.difference == 1.0


def test_the_command_writes_every_answer_and_both_models_figures(checkpoint, tmp_path, capsys):
    out = tmp_path / "exits.json"
    run_benchmark(["exits", "task=words", f"model={checkpoint}", f"baseline={checkpoint}",
                "task.size=4", "task.max_new_tokens=6", f"out={out}"])  # fmt: skip
    raw = json.loads(out.read_text())
    assert raw["problems"] == 4 and list(raw["models"]) == ["baseline", "model"]
    rows = raw["models"]["model"]["depths"]
    assert [row["layer"] for row in rows] == [1, 2, LAYERS]
    assert all(row["versus_baseline"]["difference"] == 0 for row in rows)
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert len(lines) == 4 and set(lines[0]["model"]) == {"1", "2", str(LAYERS)}
    assert "points over the baseline" in capsys.readouterr().out


def test_a_baseline_may_be_what_an_earlier_run_wrote(checkpoint, tmp_path):
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    same = ["task=words", f"model={checkpoint}", "task.size=4", "task.max_new_tokens=6"]
    run_benchmark(["exits", *same, f"out={before}"])
    run_benchmark(["exits", *same, f"baseline={before}", "layers=[2]", f"out={after}"])
    models = json.loads(after.read_text())["models"]
    assert (
        models["baseline"]["depths"] == json.loads(before.read_text())["models"]["model"]["depths"]
    )
    assert [row["versus_baseline"]["difference"] for row in models["model"]["depths"]] == [0, 0]
    with pytest.raises(DeliberateError, match="answers other problems"):
        run_benchmark(["exits", *same, "seed=1", f"baseline={before}"])
    before.write_text("{}")
    with pytest.raises(DeliberateError, match="was not written by bench exits"):
        run_benchmark(["exits", *same, f"baseline={before}"])


def test_a_prompt_that_fills_the_context_counts_as_wrong(model, task, encoder, monkeypatch):
    context = min(len(encoder.prompt(p.question)) for p in task.problems) + 1
    monkeypatch.setattr(model.backbone, "max_positions", context)
    with GraderPool(1) as pool:
        found = answer(model, encoder, task, 1, pool, batch=8)
    empty = [not text for text in found.texts]
    assert any(empty) and not all(empty)
    assert not any(c for c, none in zip(found.correct, empty, strict=True) if none)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=nix"], "task 'nix' is unknown"),
        (["batch=0"], "batch=0 must be a whole number"),
        (["layers=2"], "layers=2 must be a list"),
        (["layers=[3]"], "has no exit after layer 3, only after 1, 2"),
        (["dtype=int4"], "dtype=int4"),
        (["out=."], r"out=\. is a folder"),
        (["chat=always"], "chat=always: the tokenizer has no chat template"),
    ],
)
def test_a_setting_that_cannot_work_is_named(overrides, message, checkpoint):
    task = [] if "task" in overrides[0] else ["task=words"]
    with pytest.raises(DeliberateError, match=message):
        bench_exits.main([*task, "task.size=2", f"model={checkpoint}", *overrides])
