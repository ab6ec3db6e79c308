"""A student's layers are fitted to the whole model's states before training, in closed form."""

from __future__ import annotations

import pytest
import torch
from random_checkpoint import save_checkpoint
from recipe_cases import run
from tiny_models import random_ids, tiny_model

from deliberate.modeling.layer_fit import fit_layers
from deliberate.modeling.pruning import keep_layers
from deliberate.train.batches import Example, Packed, collate, rows_of
from deliberate.train.checks import check_config
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import compose

TEXTS = [random_ids(40, seed=one)[0].tolist() for one in range(12)]


def distance(student, teacher, texts):
    """Mean squared distance of the last states, behind the first position."""
    total = 0.0
    for ids in texts:
        row = torch.tensor([ids])
        with torch.no_grad():
            one, other = (
                model(row, output_hidden_states=True).hidden_states[-1]
                for model in (student, teacher)
            )
        total += float((one - other)[:, 1:].square().mean())
    return total / len(texts)


def test_a_fitted_student_is_nearer_to_its_teacher_on_other_text():
    teacher = tiny_model("llama", layers=6).float()
    student = keep_layers(teacher, [1, 2, 5, 6]).eval()
    before = distance(student, teacher, TEXTS[8:])
    left = fit_layers(student, teacher, [1, 2, 5, 6], TEXTS[:8], ridge=0.3)
    assert len(left) == 4 and left[0] == 1.0 and all(one <= 1.0 for one in left)
    assert min(left[1:]) < 0.95
    assert distance(student, teacher, TEXTS[8:]) < before


def test_layers_below_the_first_gap_stay_as_they_are_and_so_does_the_teacher():
    teacher = tiny_model("llama", layers=4).float()
    kept = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = keep_layers(teacher, [1, 2, 4])
    fit_layers(student, teacher, [1, 2, 4], TEXTS[:4])
    assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items())
    own = student.state_dict()
    changed = [name for name, value in own.items() if not torch.equal(value, kept.get(name, value))]
    assert "model.layers.1.mlp.down_proj.weight" in changed
    assert not any(name.startswith("model.layers.0.") for name in changed)
    third = "model.layers.2.mlp.down_proj.weight"
    assert not torch.equal(own[third], kept["model.layers.3.mlp.down_proj.weight"])


def test_a_first_state_that_attention_rests_on_is_made_without_the_layer_that_makes_it():
    """A dropped layer that gives the first position a large state, as stock models have one."""
    teacher = tiny_model("llama", layers=4).float()
    texts = [[5, *ids[1:6]] for ids in TEXTS]  # every text begins with the same token
    made = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 1e4
    layer = teacher.model.layers[1]

    def sink(_layer, _given, output):
        states = output[0] if isinstance(output, tuple) else output
        if states.shape[1] > 1:
            states[:, 0] += made

    handle = layer.register_forward_hook(sink)
    student = keep_layers(teacher, [1, 3, 4]).eval()

    def first(model):
        with torch.no_grad():
            return model(torch.tensor([texts[-1]]), output_hidden_states=True).hidden_states[-2][
                0, 0
            ]

    fit_layers(student, teacher, [1, 3, 4], texts[:8], ridge=1e-6)
    assert float((first(student) - first(teacher)).norm()) < 0.05 * float(first(teacher).norm())
    handle.remove()


def test_a_strong_pull_leaves_the_matrices():
    teacher = tiny_model("llama", layers=4).float()
    student, plain = (keep_layers(teacher, [1, 4]) for _ in range(2))
    fit_layers(student, teacher, [1, 4], TEXTS[:4], ridge=1e9)
    for one, other in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_texts_are_read_from_batches_packed_or_not():
    rows = [Example([1], [2, 3]), Example([4, 5], [6]), Example([7], [8, 9, 10])]
    plain = [collate(rows[:2], 0), collate(rows[2:], 0)]
    assert rows_of(plain, 4) == [[1, 2, 3], [4, 5, 6]]
    assert rows_of(plain, 7) == [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10]]
    # A text that is drawn twice is read once.
    assert rows_of([*plain, *plain], 100) == [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10]]
    packed = [collate([Packed((rows[0], rows[2])), rows[1]], 0)]
    assert rows_of(packed, 100) == [[1, 2, 3], [7, 8, 9, 10], [4, 5, 6]]


def test_a_layer_without_such_a_matrix_is_refused_by_name():
    teacher = tiny_model("gpt2")
    with pytest.raises(DeliberateError, match=r"fit_tokens: a GPT2Block has no mlp\.down_proj"):
        fit_layers(keep_layers(teacher, [1, 2]), teacher, [1, 2], TEXTS[:1])


def test_a_run_fits_its_student_first_and_says_so(tmp_path, capsys):
    start = save_checkpoint(tmp_path / "start")
    settings = ["recipe=distill", "model=folder", "model.keep_layers=[1,2,4]",
                f"recipe.teacher='{start}'", "model.fit_tokens=60"]  # fmt: skip
    run(start, tmp_path / "out", *settings)
    shown = capsys.readouterr().out
    assert "layers fitted on " in shown and shown.index("fitted") < shown.index("step 1/")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["model.fit_tokens=100"], "give model.keep_layers too"),
        (["model.fit_tokens=0", "model.keep_layers=[1,2]"], "model.fit_tokens=0 must be a whole"),
        (["model.fit_tokens=9", "model.keep_layers=[1,2]", "data=self"], "data source 'self'"),
    ],
)
def test_settings_that_cannot_be_fitted_are_one_line(settings, named):
    cfg = compose("train", ["recipe=distill", "data=words", "model=folder", "model.path=tiny",
                            "exits.layers=[1]", *settings])  # fmt: skip
    with pytest.raises(DeliberateError) as caught:
        check_config(cfg)
    assert named in str(caught.value) and "\n" not in str(caught.value)
