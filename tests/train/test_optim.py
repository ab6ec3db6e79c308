"""Muon and AdamW as one optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.train.objectives.heads import HeadsObjective
from deliberate.train.objectives.pretrain import PretrainObjective
from deliberate.train.optim import MuonWithAdamW, build_optimizer
from deliberate.utils.errors import DeliberateError


def objective(arch="llama", recipe=PretrainObjective, **overrides):
    base = tiny_model(arch, layers=2, dtype=torch.float32, **overrides)
    return recipe(AdaptiveModel(base, [1]))


def names_in(module, group):
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_muon_gets_hidden_matrices_and_adamw_the_rest(arch, tied):
    module = objective(arch, tie_word_embeddings=tied)
    optimizer = build_optimizer(module, "muon", lr=0.01, weight_decay=0.1)
    muon, adamw = optimizer.param_groups
    matrices, others = names_in(module, muon), names_in(module, adamw)
    assert matrices | others == {name for name, _ in module.named_parameters()}
    assert not matrices & others
    kept_out = ("embed", "lm_head", "norm", "bias", "gates")
    assert not [name for name in matrices if any(part in name for part in kept_out)]
    assert "model.exits.translators.0.up.weight" in matrices
    assert sum(".layers.0." in name for name in matrices) == (7 if arch == "llama" else 4)
    assert (muon["weight_decay"], adamw["weight_decay"]) == (0.1, 0.0)


def test_adamw_decays_matrices_only():
    module = objective()
    optimizer = build_optimizer(module, "adamw", lr=0.01, weight_decay=0.1)
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed, free = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    assert all(p.ndim == 2 for p in decayed["params"])


def test_frozen_parameters_are_left_out():
    module = objective(recipe=HeadsObjective)
    optimizer = build_optimizer(module, "muon", lr=0.01, weight_decay=0.0)
    every = set().union(*(names_in(module, group) for group in optimizer.param_groups))
    assert every and all(name.startswith("model.exits.") for name in every)


def train_steps(module, optimizer, scheduler, steps, seed):
    for step in range(steps):
        ids = random_ids(12, seed=seed + step, batch=3)
        module(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def prepared(module):
    optimizer = build_optimizer(module, "muon", lr=0.02, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return optimizer, schedule


def test_a_restored_state_takes_the_same_steps_as_the_original():
    module = objective().eval()
    optimizer, schedule = prepared(module)
    train_steps(module, optimizer, schedule, 3, seed=0)
    weights = copy.deepcopy(module.state_dict())
    saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    train_steps(module, optimizer, schedule, 3, seed=10)

    resumed = objective().eval()
    resumed.load_state_dict(weights)
    other, other_schedule = prepared(resumed)
    other.load_state_dict(saved[0])
    other_schedule.load_state_dict(saved[1])
    train_steps(resumed, other, other_schedule, 3, seed=10)
    for name, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("restored", [False, True])
def test_a_learning_rate_of_zero_reaches_both_parts(restored):
    module = objective().eval()
    optimizer, schedule = prepared(module)
    train_steps(module, optimizer, schedule, 1, seed=0)
    if restored:
        optimizer.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(module.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train_steps(module, optimizer, schedule, 1, seed=1)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    train_steps(module, optimizer, schedule, 1, seed=2)  # the scheduler has set it again
    moved = {name for name, value in module.state_dict().items() if not value.equal(before[name])}
    assert any("mlp" in name for name in moved) and any("norm" in name for name in moved)


def test_muon_steps_a_square_matrix_by_an_orthogonal_one():
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(16, 16))
    other = torch.nn.Parameter(torch.zeros(3))
    before = matrix.detach().clone()
    matrix.grad, other.grad = torch.randn(16, 16), torch.ones(3)
    MuonWithAdamW([matrix], [other], lr=0.01, weight_decay=0.0).step()
    step = (before - matrix.detach()) / 0.01
    # Scaled to AdamW's root mean square: 0.2 sqrt(16) times singular values near 1.
    values = torch.linalg.svdvals(step) / (0.2 * 4)
    assert values.min() > 0.5 and values.max() < 1.5
    assert torch.allclose(other.detach(), torch.full((3,), -0.01), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "match"), [({"name": "sgd"}, "'sgd'"), ({"lr": 0.0}, "learning rate 0.0")]
)
def test_impossible_settings_are_refused(change, match):
    with pytest.raises(DeliberateError, match=match):
        build_optimizer(objective(), **({"name": "muon", "lr": 0.1, "weight_decay": 0} | change))


def test_a_model_with_nothing_to_train_is_refused():
    module = objective().requires_grad_(False)
    with pytest.raises(DeliberateError, match="frozen"):
        build_optimizer(module, "adamw", lr=0.1, weight_decay=0.0)
