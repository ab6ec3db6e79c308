"""The executor that gives the speed is the default, and gives way by name; training has its own."""

from __future__ import annotations

import inspect

import pytest
import torch
from random_checkpoint import save_checkpoint
from tiny_models import tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.executors.fused.cuda.backbone import CudaFusedBackbone
from deliberate.executors.fused.weights import FUSED_ARCHITECTURES
from deliberate.modeling.backbone import Backbone
from deliberate.train.objectives.heads import HeadsObjective
from deliberate.train.objectives.pretrain import PretrainObjective
from deliberate.train.saving import plain_copy
from deliberate.train.setup import build_model
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import compose

PROMPT = torch.tensor([[5, 6, 7, 8]])


def wrapped(architecture: str = "llama", **settings) -> AdaptiveModel:
    base = tiny_model(architecture, layers=4, dtype=settings.pop("dtype", torch.float32))
    prepare = settings.pop("prepare", lambda _base: None)
    prepare(base)
    return AdaptiveModel(base, [1, 2], **settings)


def test_the_default_is_auto_in_python() -> None:
    for made in (AdaptiveModel.__init__, AdaptiveModel.from_pretrained):
        assert inspect.signature(made).parameters["executor"].default == "auto"


def test_what_the_fused_executor_runs_is_run_by_it(tmp_path) -> None:
    assert wrapped().executor.startswith("fused: llama")
    save_checkpoint(tmp_path)
    assert AdaptiveModel.from_pretrained(tmp_path).executor.startswith("fused: llama")


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "olmo2"])
def test_another_architecture_is_run_by_its_own_modules_and_the_reason_kept(architecture) -> None:
    assert architecture not in FUSED_ARCHITECTURES
    model = wrapped(architecture)
    assert model.executor == (
        f"generic: architecture {architecture} is not one of {', '.join(FUSED_ARCHITECTURES)}"
    )


def test_double_precision_is_for_references_and_compiles_nothing() -> None:
    assert wrapped(dtype=torch.float64).executor.startswith("generic: its weights are float64")
    requested = wrapped(dtype=torch.float64, executor="fused", engine="eager")
    assert requested.executor.startswith("fused")


def place_on_cuda(monkeypatch) -> None:
    """From here on a backbone says that it is on a CUDA device."""
    monkeypatch.setattr(Backbone, "device", property(lambda _self: torch.device("cuda")))


def test_auto_runs_the_cuda_executor_for_a_model_on_cuda(monkeypatch):
    place_on_cuda(monkeypatch)
    assert type(wrapped().backbone) is CudaFusedBackbone
    assert type(wrapped(executor="generic").backbone) is Backbone


def test_auto_follows_a_model_that_was_moved_to_cuda_after_wrapping(monkeypatch):
    model = wrapped()
    assert type(model.backbone) is FusedBackbone
    with monkeypatch.context() as moved:
        place_on_cuda(moved)
        assert "kernels by" in model.executor  # before anything is generated there
        assert type(model.backbone) is CudaFusedBackbone
    model.generate(PROMPT, max_new_tokens=2)
    assert type(model.backbone) is FusedBackbone  # moved back


def test_the_cuda_executor_is_taken_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert type(wrapped(executor="fused").backbone) is CudaFusedBackbone
    assert type(wrapped().backbone) is FusedBackbone  # the model is on the CPU


def _hook_on_layer(base, seen) -> None:
    base.model.layers[1].register_forward_hook(lambda *_: seen.append("layer"))


def _hook_inside_layer(base, seen) -> None:
    base.model.layers[1].mlp.register_forward_pre_hook(lambda *_: seen.append("mlp"))


def _hook_on_head(base, seen) -> None:
    base.lm_head.register_forward_hook(lambda *_: seen.append("head"))


def _hook_on_norm(base, seen) -> None:
    base.model.norm.register_forward_hook(lambda *_: seen.append("norm"))


def _hook_on_embedding(base, seen) -> None:
    base.get_input_embeddings().register_forward_hook(lambda *_: seen.append("embedding"))


def test_an_engine_for_a_model_that_cannot_have_one_is_refused_by_name() -> None:
    with pytest.raises(DeliberateError, match="engine='eager' needs the fused executor: archit"):
        wrapped("gpt2", engine="eager")


HOOKS = (_hook_on_layer, _hook_inside_layer, _hook_on_head, _hook_on_norm, _hook_on_embedding)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_of_the_base_model_is_called(hook) -> None:
    seen: list[str] = []
    model = wrapped(prepare=lambda base: hook(base, seen))
    model.generate(PROMPT, max_new_tokens=4, fidelity="dense")
    assert seen, model.executor


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_is_set_later_is_called_too(hook) -> None:
    seen: list[str] = []
    model = wrapped()
    model.generate(PROMPT, max_new_tokens=4, fidelity="dense")
    hook(model.base, seen)
    model.generate(PROMPT, max_new_tokens=4, fidelity="dense")
    assert seen, model.executor


@pytest.mark.parametrize("recipe", [PretrainObjective, HeadsObjective])
def test_a_model_that_is_wrapped_by_default_trains_as_by_transformers_modules(recipe) -> None:
    found = {}
    ids = torch.arange(12).reshape(2, 6) % 7 + 5
    for executor in ("auto", "generic"):
        torch.manual_seed(0)
        objective = recipe(wrapped(executor=executor)).eval()
        objective(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        found[executor] = {name: p.grad for name, p in objective.named_parameters()}
    assert any(gradient is not None for gradient in found["generic"].values())
    for name, gradient in found["generic"].items():
        other = found["auto"][name]
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            torch.testing.assert_close(other, gradient, msg=name)


def test_training_and_its_checkpoints_use_transformers_modules(tmp_path) -> None:
    folder = save_checkpoint(tmp_path)
    cfg = compose("train", ["model=folder", f"++model.path={folder}", "data=words"])
    model, _ = build_model(cfg, {})
    assert model.executor == "generic: asked for"
    assert plain_copy(model, model.state_dict()).executor == "generic: asked for"
