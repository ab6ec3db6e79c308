"""Weights stored smaller: what is stored, how near the products are, which layers it touches."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.executors.quantization import Matrix, Storage, WeightPlan, product, store, widened
from deliberate.utils.errors import DeliberateError


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)


# -- plans -----------------------------------------------------------------------------------------


def test_a_plan_names_the_storage_of_every_layer():
    native, bf16, int8 = Storage.NATIVE, Storage.BF16, Storage.INT8
    assert WeightPlan.build(2).native
    assert WeightPlan.build(2, "int8") == WeightPlan((int8, int8), int8)
    assert WeightPlan.build(2, "int8", "native") == WeightPlan((int8, int8), native)
    mixed = WeightPlan.build(4, {"int8": [1, 2], "bf16": [3]})
    assert mixed == WeightPlan((native, int8, int8, bf16), native)
    assert WeightPlan.build(4, mixed, "bf16").head is bf16
    assert WeightPlan.build(4, mixed) is mixed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, "int2"), "weights 'int2' are unknown; they are native, bf16, int8, q8_0, int4"),
        ((2, "int8", "half"), "weights 'half' are unknown"),
        ((2, {"int8": [2]}), "layer 2 twice or the model lacks it: it has layers 0..1"),
        ((2, {"int8": [1], "bf16": [1]}), "layer 1 twice"),
        ((3, WeightPlan((Storage.INT8,) * 2)), "for 2 layers: the model has 3"),
    ],
)
def test_an_impossible_plan_is_an_error(arguments, message):
    with pytest.raises(DeliberateError) as error:
        WeightPlan.build(*arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


# -- products --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 32), (5, 123), (123, 16), (1, 48)])
@pytest.mark.parametrize("storage", list(Storage))
def test_a_product_is_that_of_the_weight_it_stands_for(storage, shape, dtype):
    stored = store(matrix(*shape, dtype), storage)
    x = matrix(6, shape[1], dtype).view(2, 3, -1)
    exact = x.double() @ widened(stored, torch.float64).t()
    made = product(x, stored)
    assert made.dtype == dtype and made.shape == (2, 3, shape[0])
    short = dtype is torch.bfloat16 or (storage is Storage.INT8 and dtype is torch.float32)
    short |= storage.in_blocks  # activations of 8 bits
    scale = x.double().norm(dim=-1).max() * widened(stored, torch.float64).norm(dim=-1).max()
    bound = {True: 2**-7, False: 2e-6 if dtype is torch.float32 else 1e-6}[short]
    assert (made.double() - exact).abs().max() <= bound * scale


@pytest.mark.parametrize("storage", list(Storage))
def test_a_row_does_not_depend_on_the_rows_beside_it(storage):
    stored = store(matrix(64, 48), storage)
    x = matrix(9, 48)
    together = product(x, stored)
    alone = torch.cat([product(x[row : row + 1], stored) for row in range(9)])
    # int8 exactly: its results are rounded coarsely, so that a last bit could become a hundredth.
    assert torch.allclose(together, alone, rtol=0, atol=0 if storage is Storage.INT8 else 1e-5)


def test_int8_errs_by_half_a_step_at_most():
    weight = matrix(20, 33)
    stored = store(weight, Storage.INT8)
    assert stored.weight.dtype == torch.int8
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((widened(stored, torch.float32) - weight).abs() <= step * 0.501).all()


def test_8_bit_blocks_err_by_half_a_step_at_most():
    weight = matrix(20, 70)
    error = (widened(store(weight, Storage.Q8_0), torch.float32) - weight).abs()
    for first in range(0, 70, 32):
        step = weight[:, first : first + 32].abs().amax(-1, True) / 127
        # The step is rounded to float16.
        assert (error[:, first : first + 32] <= step * 0.53).all()


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_4_bit_blocks_err_less_than_levels_from_the_smallest_to_the_largest(shift):
    weight = matrix(30, 96) + shift
    blocks = weight.view(30, 3, 32)
    least, step = blocks.amin(-1, True), (blocks.amax(-1, True) - blocks.amin(-1, True)) / 15
    plain = ((blocks - least) / step).round() * step + least - blocks
    ours = widened(store(weight, Storage.INT4), torch.float32) - weight
    assert ours.square().mean() < 0.97 * plain.square().mean()
    assert ours.abs().max() < 1.6 * step.max()


@pytest.mark.parametrize("storage", [Storage.Q8_0, Storage.INT4])
def test_blocks_of_equal_or_no_weights_are_exact(storage):
    weight = torch.cat([torch.zeros(2, 40), torch.full((2, 40), 0.5), torch.full((2, 40), -0.25)])
    exact = storage is Storage.INT4
    made = widened(store(weight, storage), torch.float32)
    assert torch.equal(made, weight) if exact else torch.allclose(made, weight, rtol=5e-4)


def test_the_head_of_4_bit_weights_has_8_bits_unless_it_is_named():
    int4 = Storage.INT4
    assert WeightPlan.build(2, "int4") == WeightPlan((int4, int4), Storage.Q8_0)
    assert WeightPlan.build(2, "int4", "int4").head is int4


@pytest.mark.parametrize("engine", ["eager", "inductor"])
def test_blocks_without_the_cpp_kernels_are_refused_by_name(engine):
    with pytest.raises(DeliberateError, match=f"C\\+\\+ kernels alone: engine='{engine}'"):
        FusedBackbone(tiny_model("llama", dtype=torch.float32), weights="int4", engine=engine)
    with pytest.raises(DeliberateError, match="take float32 on the CPU, not torch"):
        FusedBackbone(tiny_model("llama", dtype=torch.bfloat16), weights="int4")


def test_native_storage_is_the_weight_itself():
    weight = matrix(4, 4)
    assert store(weight, Storage.NATIVE).weight.data_ptr() == weight.data_ptr()
    assert isinstance(store(weight, Storage.BF16), Matrix)


# -- models ----------------------------------------------------------------------------------------


@torch.inference_mode()
def logits(model, ids: torch.Tensor, **settings) -> torch.Tensor:
    backbone = FusedBackbone(model, engine="eager", **settings)
    ctx = backbone.context(0, ids.shape[1], device="cpu")
    hidden = backbone.embed(ids, ctx)
    hidden = backbone.run_layers(hidden, 0, backbone.num_layers, ctx, backbone.new_cache())
    return backbone.logits(hidden)


def test_smaller_weights_err_by_little_and_bf16_by_less_than_int8():
    model, ids = tiny_model("llama", dtype=torch.float32, initializer_range=0.1), random_ids(24)
    exact = logits(model, ids)
    error = {
        storage: float((logits(model, ids, weights=storage) - exact).norm() / exact.norm())
        for storage in ("native", "bf16", "int8")
    }
    assert error["native"] < 1e-5 < error["bf16"] < error["int8"] < 0.03


def test_only_the_layers_named_are_stored_smaller():
    model = tiny_model("llama", dtype=torch.float32)
    backbone = FusedBackbone(model, weights={"int8": [1], "bf16": [2]}, engine="eager")
    kinds = [layer.gate_up.weight.dtype for layer in backbone._weights]
    assert kinds == [torch.float32, torch.int8, torch.bfloat16, torch.float32]
    assert backbone.head.weight.dtype == torch.float32
    whole = FusedBackbone(model, engine="eager").bytes_per_token
    assert backbone.bytes_per_token < whole
    exact, ids = logits(model, random_ids(9)), random_ids(9)
    partly = (logits(model, ids, weights={"int8": [1]}) - exact).norm()
    fully = (logits(model, ids, weights="int8") - exact).norm()
    assert 0 < partly < fully
