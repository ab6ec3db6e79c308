"""Settings that make a distillation step cheaper, against the step without them."""

from __future__ import annotations

import json

import pytest
import torch
from objective_cases import adaptive, batch_of
from random_checkpoint import save_checkpoint
from recipe_cases import run
from tiny_models import tiny_model

from deliberate.api import checkpoint
from deliberate.config import IGNORE_INDEX
from deliberate.train.batches import Example, Packed, collate
from deliberate.train.checks import check_config
from deliberate.train.objectives.distill import DistillObjective
from deliberate.train.objectives.teacher_states import TeacherStates
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import compose


def teacher(seed=7):
    return tiny_model("llama", layers=3, dtype=torch.float32, seed=seed).eval()


def passes_of(model):
    """Rows of every pass of a model, as they happen."""
    rows = []
    model.base_model.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    return rows


def reference(model, batch):
    with torch.no_grad():
        logits = model(
            batch["input_ids"], position_ids=batch.get("position_ids"), use_cache=False
        ).logits
    return logits[:, :-1][batch["labels"][:, 1:] != IGNORE_INDEX]


def test_a_text_that_was_read_costs_no_pass_of_the_teacher_in_whatever_batch_it_comes_again():
    model = teacher()
    rows, states = passes_of(model), TeacherStates(model, keep=True)
    first, both = batch_of(9, 14), batch_of(9, 14, 6)
    for batch, passes in ((first, [2]), (first, [2]), (both, [2, 1])):
        got = states.backbone.head_logits(states.read(batch["input_ids"], batch["labels"], None))
        assert rows == passes
        torch.testing.assert_close(got, reference(teacher(), batch), rtol=1e-4, atol=1e-5)


def test_the_same_tokens_with_other_targets_are_another_text():
    states, batch = TeacherStates(teacher(), keep=True), batch_of(9, 14)
    states.read(batch["input_ids"], batch["labels"], None)
    batch["labels"][:, :6] = IGNORE_INDEX
    got = states.backbone.head_logits(states.read(batch["input_ids"], batch["labels"], None))
    torch.testing.assert_close(got, reference(teacher(), batch), rtol=1e-4, atol=1e-5)


def test_packed_rows_are_kept_with_their_positions():
    rows = [Packed((Example([1, 2], [3, 4, 5]), Example([6], [7, 8]))), Example([9], [10, 11])]
    batch, states = collate(rows, 0), TeacherStates(teacher(), keep=True)
    for _ in range(2):
        got = states.read(batch["input_ids"], batch["labels"], batch["position_ids"])
    torch.testing.assert_close(
        states.backbone.head_logits(got), reference(teacher(), batch), rtol=1e-4, atol=1e-5
    )


def test_a_teacher_is_read_again_where_its_states_are_not_kept():
    model, batch = teacher(), batch_of(9, 14)
    rows, objective = passes_of(model), DistillObjective(adaptive(), teacher=model)
    for _ in range(2):
        objective(**batch)
    assert rows == [2, 2]


def test_losses_over_some_tokens_are_those_of_distributions_without_the_others():
    batch = batch_of(9, 14)
    model = adaptive()
    objective = DistillObjective(
        model, teacher=teacher(), head_tokens=40, early_scale=0.0, gate_weight=0.0
    ).eval()
    tokens = {int(one) for one in batch["input_ids"].flatten()}
    objective.prepare(tokens)
    size = max(40, len(tokens))
    rest = [one for one in range(model.backbone.vocab_size) if one not in tokens]
    rows = sorted([*tokens, *rest[: size - len(tokens)]])
    targets = batch["labels"][:, 1:]
    targets = targets[targets != IGNORE_INDEX]
    own = reference(model.base, batch)[:, rows].log_softmax(-1)
    other = reference(teacher(), batch)[:, rows].log_softmax(-1)
    places = torch.tensor([rows.index(int(one)) for one in targets])
    truth = -own.gather(1, places[:, None]).mean()
    learned = (other.exp() * (other - own)).sum(-1).mean()
    assert objective(**batch).loss.item() == pytest.approx(float(learned + 0.5 * truth), rel=1e-4)


def test_all_rows_of_the_head_are_used_where_all_were_asked_for():
    size = adaptive().backbone.vocab_size
    objective = DistillObjective(adaptive(), teacher=teacher(), head_tokens=size).eval()
    objective.prepare({3, 4})
    plain = DistillObjective(adaptive(), teacher=teacher()).eval()
    batch = batch_of(9, 14)
    assert torch.equal(objective(**batch).loss, plain(**batch).loss)


def test_a_head_that_does_not_learn_gets_no_gradient_and_the_layers_the_same_one():
    batch, gradients = batch_of(9, 14), []
    for train_head in (True, False):
        model = adaptive()
        DistillObjective(model, teacher=teacher(), train_head=train_head).eval()(
            **batch
        ).loss.backward()
        assert (model.backbone.lm_head.weight.grad is not None) == train_head
        assert (model.base.get_input_embeddings().weight.grad is not None) == train_head
        gradients.append(model.backbone.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*gradients)


def test_some_rows_of_the_head_are_refused_where_problems_are_drawn():
    objective = DistillObjective(adaptive(), teacher=teacher(), head_tokens=40)
    with pytest.raises(DeliberateError, match=r"recipe\.head_tokens=40 where problems are drawn"):
        objective.prepare(None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["recipe.teacher=tiny", "recipe.head_tokens=0"], "head_tokens=0 must be a whole"),
        (["recipe.keep_teacher=true"], "keep_teacher=true without a teacher"),
        (["recipe.teacher=tiny", "recipe.keep_teacher=7"], "keep_teacher=7 is unknown"),
    ],
)
def test_a_setting_that_cannot_be_obeyed_is_one_line(given, said):
    stock = ["recipe=distill", "data=words", "model=folder", "model.path=tiny"]
    cfg = compose("train", [*stock, *given])
    with pytest.raises(DeliberateError, match=said) as caught:
        check_config(cfg)
    assert "\n" not in str(caught.value)


def test_a_run_with_all_three_leaves_the_head_as_it_was(tmp_path):
    start = save_checkpoint(tmp_path / "start")
    text = tmp_path / "own.jsonl"
    rows = [{"tokens": [5, 6, 7, 8, 9, 10], "prompt": 2}, {"tokens": [11, 12, 13, 14], "prompt": 1}]
    text.write_text("".join(json.dumps(one) + "\n" for one in rows))
    record = run(
        start, tmp_path / "out", "recipe=distill", "data=file", f"data.files.file.path='{text}'",
        "data.files.file.tokens=tokens", "data.files.file.prompt=prompt", "model=folder",
        "model.keep_layers=[1,2,4]", f"recipe.teacher='{start}'", "recipe.keep_teacher=true",
        "recipe.head_tokens=20", "recipe.train_head=false", "trainer.tokens_per_step=20",
        f"trainer.held_out='{text}'",
    )  # fmt: skip
    before, after = (checkpoint.load_base(one) for one in (start, tmp_path / "out" / "model"))
    assert torch.equal(before.lm_head.weight, after.lm_head.weight)
    first, last = record["held_out"][0], record["held_out"][-1]
    assert last["teacher"] == first["teacher"] and last["loss"] != first["loss"]
