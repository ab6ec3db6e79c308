"""Training under rounding can start from weights that were rounded so that outputs move least."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_checkpoint import save_checkpoint
from recipe_cases import run
from tiny_models import random_ids, tiny_model

from deliberate.executors.rounded_layers import as_rounded, round_layers
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.layer_fit import last_product
from deliberate.train.checks import check_config
from deliberate.train.rounded_start import round_in_order, start_rounded
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import compose

TEXTS = [random_ids(40, seed=one)[0].tolist() for one in range(60)]


def correlated(rows, width, seed):
    """Inputs that share a few directions, as hidden states do."""
    made = torch.Generator().manual_seed(seed)
    mix = torch.randn(width // 4, width, generator=made)
    return torch.randn(rows, width // 4, generator=made) @ mix + 0.1 * torch.randn(
        rows, width, generator=made
    )


@given(
    st.integers(0, 1000),
    st.sampled_from([("int4_rows", 4), ("int3_rows", 3)]),
    st.sampled_from([8, 63, 130]),
)
def test_what_is_kept_rounds_to_what_was_found_and_loses_less(seed, grid, width):
    name, bits = grid
    inputs = correlated(400, width, seed)
    weight = torch.randn(20, width, generator=torch.Generator().manual_seed(seed + 1))
    found, kept = round_in_order(weight, inputs.T @ inputs, bits)
    torch.testing.assert_close(as_rounded(kept, name), found, rtol=1e-5, atol=1e-6)

    def lost(rounded):
        return float((inputs @ (rounded - weight).T).square().sum())

    assert lost(found) < lost(as_rounded(weight, name))


def test_inputs_that_are_never_there_and_rows_of_zeros_round_too():
    inputs = correlated(100, 16, 0)
    inputs[:, 3] = 0
    weight = torch.randn(5, 16)
    weight[2] = 0
    found, kept = round_in_order(weight, inputs.T @ inputs, 4)
    assert found.isfinite().all() and torch.equal(found[2], torch.zeros(16))
    torch.testing.assert_close(as_rounded(kept, "int4_rows"), found)


@torch.no_grad()
def distance(model, teacher):
    """Mean squared distance of the logits on other text, rounded as training will round them."""
    own = copy.deepcopy(model)
    round_layers(Backbone(own), "int3_rows")
    total = 0.0
    for seed in range(4):
        ids = random_ids(40, seed=100 + seed)
        total += float((own(ids).logits - teacher(ids).logits)[:, 1:].square().mean())
    return total


def test_a_model_rounded_so_is_nearer_to_itself_in_float():
    teacher = tiny_model("llama", layers=4).float().eval()
    model, said = copy.deepcopy(teacher), []
    start_rounded(model, teacher, TEXTS, "int3_rows", tell=said.append)
    assert len(said) == 4 and distance(model, teacher) < 0.8 * distance(teacher, teacher)
    before = dict(teacher.named_parameters())
    changed = {name for name, value in model.named_parameters() if not value.equal(before[name])}
    assert all("proj" in name for name in changed) and len(changed) == 4 * 7


def test_an_mlps_last_matrix_takes_up_what_was_lost_before_it():
    teacher = tiny_model("llama", layers=2).float().eval()
    plain, repaired = (copy.deepcopy(teacher) for _ in range(2))
    start_rounded(plain, teacher, TEXTS, "int3_rows", repair=False)
    start_rounded(repaired, teacher, TEXTS, "int3_rows")
    one, other = (Backbone(model).layers for model in (plain, repaired))
    assert torch.equal(one[0].self_attn.q_proj.weight, other[0].self_attn.q_proj.weight)
    assert not torch.equal(last_product(one[0]).weight, last_product(other[0]).weight)


def test_an_error_of_the_first_state_moves_no_last_matrix():
    """In stock models that state is so large that a matrix would be fitted to its error alone."""
    teacher = tiny_model("llama", layers=2).float().eval()
    plain, wrong = (copy.deepcopy(teacher) for _ in range(2))

    def err(_layer, _given, output):
        states = output[0] if isinstance(output, tuple) else output
        states[:, 0] += 1e4

    handle = wrong.model.layers[1].register_forward_hook(err)
    for model in (plain, wrong):
        start_rounded(model, teacher, TEXTS[:8], "int3_rows")
    handle.remove()
    for one, other in zip(plain.parameters(), wrong.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_starts_from_there_and_says_so(tmp_path, capsys):
    start = save_checkpoint(tmp_path / "start")
    common = ["recipe=qat", "model=folder", f"recipe.teacher='{start}'", "recipe.weights=int3_rows"]
    losses = []
    for name, more in (("fitted", ["model.fit_tokens=400"]), ("plain", [])):
        record = run(start, tmp_path / name, *common, *more)
        losses.append(record["history"][0]["loss"])
    shown = capsys.readouterr().out
    assert shown.index("layers rounded in closed form on ") < shown.index("step 1/")
    assert shown.count("in closed form") == 1 and losses[0] < losses[1]


@pytest.mark.parametrize("storage", ["int4", "q8_0"])
def test_storages_that_are_not_rounded_so_are_refused(storage):
    cfg = compose("train", ["recipe=qat", "data=words", "model=folder", "model.path=tiny",
                            f"recipe.weights={storage}", "model.fit_tokens=9"])  # fmt: skip
    with pytest.raises(DeliberateError, match=r"rounds to recipe\.weights=int4_rows or int3_rows"):
        check_config(cfg)
