"""The recipe `qat`: the forward pass is the one that the executor will run, gradients pass it."""

from __future__ import annotations

import pytest
import torch
from objective_cases import adaptive, batch_of
from random_checkpoint import save_checkpoint
from recipe_cases import run
from torch import nn

from deliberate.api.model import AdaptiveModel
from deliberate.executors.quantization import Storage, store, widened
from deliberate.executors.rounded_layers import (
    RoundedLinear,
    as_rounded,
    round_activations,
    rounding_named,
)
from deliberate.kernels.blocks import BlockWeight
from deliberate.train.objectives.distill import DistillObjective
from deliberate.train.objectives.qat import QatObjective
from deliberate.utils.errors import DeliberateError

BATCH = batch_of(9, 14, 6)


@pytest.mark.parametrize("storage", [Storage.INT8, Storage.Q8_0, Storage.INT4])
def test_a_rounded_layer_gives_what_the_executors_kernel_gives(storage):
    torch.manual_seed(0)
    linear, x = nn.Linear(72, 40, bias=False), torch.randn(5, 72)
    stored = store(linear.weight, storage)
    if isinstance(stored, BlockWeight):
        wanted = stored.multiply(x)
    else:
        wanted = x @ widened(stored, torch.float32).T
    found = RoundedLinear(linear, storage)(x)
    assert torch.allclose(found, wanted, atol=2e-5)
    assert not torch.allclose(found, linear(x), atol=2e-5)


@pytest.mark.parametrize(("name", "bits"), [("int4_rows", 4), ("int3_rows", 3)])
def test_a_grid_with_one_scale_a_row_has_so_many_values(name, bits):
    torch.manual_seed(0)
    weight = torch.randn(6, 500)
    weight[1] *= 100  # its own scale
    weight[2] = 0
    rounded = as_rounded(weight, rounding_named(name))
    values = [len(row.unique()) for row in rounded]
    assert max(values) == 2**bits - 1 and values[2] == 1
    step = weight.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert bool(((rounded - weight).abs() <= 0.501 * step).all())
    x = torch.randn(3, 500)
    linear = nn.Linear(500, 6, bias=False)
    linear.weight.data = weight
    assert torch.allclose(RoundedLinear(linear, rounding_named(name))(x), x @ rounded.T, atol=1e-4)


def test_a_storage_that_rounds_nothing_is_refused():
    with pytest.raises(DeliberateError, match="weights 'native' round nothing: use int8, q8_0"):
        rounding_named("native")


def test_gradients_pass_the_rounding_and_follow_the_weight():
    rounded = RoundedLinear(nn.Linear(32, 4), Storage.INT4)
    x = torch.randn(3, 32, requires_grad=True)
    rounded(x).sum().backward()
    assert torch.allclose(rounded.weight.grad, round_activations(x).detach().sum(0).expand(4, -1))
    assert x.grad is not None and bool(x.grad.any())
    before = rounded(x).detach()
    with torch.no_grad():
        rounded.weight.mul_(2.0)
    wanted = widened(store(rounded.weight, Storage.INT4), torch.float32)
    again = rounded(x).detach()
    assert torch.allclose(again, round_activations(x) @ wanted.T + rounded.bias, atol=1e-5)
    assert not torch.allclose(before, again)


def test_activations_are_rounded_by_blocks_of_32():
    x = torch.randn(2, 40)
    x[0, :32] *= 100  # a scale of its own
    rounded = round_activations(x)
    for first, end in ((0, 32), (32, 40)):
        part, found = x[:, first:end], rounded[:, first:end]
        step = part.abs().amax(-1, keepdim=True) / 127
        assert bool(((found - part).abs() <= 0.501 * step).all())
    assert torch.equal(round_activations(torch.zeros(1, 5)), torch.zeros(1, 5))


def test_every_linear_of_the_layers_is_rounded_and_exits_are_trained_over_them():
    model, plain = adaptive(), adaptive()
    settings = {"gradual_share": 0.0, "layer_dropout": 0.0, "early_scale": 0.4}
    objective = QatObjective(model, weights="int4", **settings)
    kinds = [type(one) for one in model.backbone.layers.modules() if isinstance(one, nn.Linear)]
    assert len(kinds) == 4 * 7 and set(kinds) == {RoundedLinear}
    assert type(model.backbone.lm_head) is nn.Linear
    made = objective(**BATCH)
    made.loss.backward()
    assert all(p.grad is not None for p in model.backbone.layers.parameters())
    float_loss = DistillObjective(plain, **settings)(**BATCH).loss
    assert made.loss.item() != float_loss.item()
    with torch.no_grad():
        for one in plain.backbone.layers.modules():
            if isinstance(one, nn.Linear):
                one.weight.copy_(widened(store(one.weight, Storage.INT4), torch.float32))
    # What is left is the rounding of activations.
    near = DistillObjective(plain, **settings)(**BATCH).loss.item()
    assert abs(made.loss.item() - near) < 0.2 * abs(float_loss.item() - near) + 0.02


def test_a_run_saves_float_weights_that_load_as_any_other(tmp_path):
    stock = save_checkpoint(tmp_path / "stock")
    run(stock, tmp_path / "run", "model=folder", "recipe=qat", f"recipe.teacher='{stock}'")
    trained = AdaptiveModel.from_pretrained(tmp_path / "run" / "model", weights="int4")
    assert trained.executor.startswith("fused")
    before = AdaptiveModel.from_pretrained(stock)
    changed = [
        not torch.equal(one, other)
        for one, other in zip(trained.base.parameters(), before.base.parameters(), strict=True)
    ]
    assert any(changed) and trained.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4).any()


def test_a_storage_that_does_not_round_is_refused(tmp_path):
    stock = save_checkpoint(tmp_path / "stock")
    with pytest.raises(DeliberateError, match="weights='bf16' is unknown; it is one of int8, q8_0"):
        run(stock, tmp_path / "run", "model=folder", "recipe=qat", "recipe.weights=bf16")
    with pytest.raises(DeliberateError, match="have no linear modules to round"):
        QatObjective(adaptive("gpt2"))
