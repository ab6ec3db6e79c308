"""A rotated model gives what it gave, by other weights."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from deliberate.executors.quantization import Storage, store, widened
from deliberate.executors.rotation import orthogonal, rotate_residual
from deliberate.utils.errors import DeliberateError

IDS = torch.tensor([[5, 9, 3, 17, 40, 2, 8]])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_logits_stay_and_the_weights_do_not(family, tied):
    model = tiny_model(family, layers=3, dtype=torch.float64, tie_word_embeddings=tied).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.copy_(0.5 + torch.rand_like(parameter))
    before = model(IDS).logits
    weights = [one.clone() for one in model.model.layers.parameters() if one.ndim == 2]
    rotate_residual(model, seed=3)
    assert torch.allclose(model(IDS).logits, before, atol=1e-4)  # norms are in float32
    after = [one for one in model.model.layers.parameters() if one.ndim == 2]
    for one, other in zip(weights, after, strict=True):
        assert (one - other).abs().max() > 0.01
    assert model.lm_head.weight is not model.get_input_embeddings().weight


def test_weights_of_a_rounded_file_are_not_on_its_grid_any_more():
    model = tiny_model("llama", layers=1, dtype=torch.float32)
    linear = model.model.layers[0].mlp.up_proj

    def changed() -> float:
        weight = linear.weight.detach()
        rounded = widened(store(weight, Storage.INT4), torch.float32)
        return float((rounded - weight).norm() / weight.norm())

    with torch.no_grad():
        linear.weight.copy_(widened(store(linear.weight, Storage.INT4), torch.float32))
    assert changed() < 1e-3
    rotate_residual(model)
    assert changed() > 0.02


def test_a_rotation_is_orthogonal_and_depends_on_its_seed():
    one, other = orthogonal(24, 1), orthogonal(24, 2)
    assert torch.allclose(one @ one.T, torch.eye(24, dtype=torch.float64), atol=1e-12)
    assert not torch.allclose(one, other) and torch.equal(one, orthogonal(24, 1))


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(DeliberateError, match="the residual stream cannot be rotated: architect"):
        rotate_residual(tiny_model("gpt2"))
