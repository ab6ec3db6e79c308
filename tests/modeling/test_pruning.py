"""A student from some of a checkpoint's layers."""

from __future__ import annotations

import pytest
import torch
from random_checkpoint import save_checkpoint
from recipe_cases import run
from tiny_models import ARCHITECTURES, random_ids, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from deliberate.api.model import AdaptiveModel
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.pruning import keep_layers
from deliberate.train.checks import check_config
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import compose

# Mixtures whose experts are in every second layer only: layer 1 cannot stand where layer 2 stood.
UNIFORM = [arch for arch in ARCHITECTURES if arch != "qwen3_moe"]


class Aside(nn.Module):
    """A layer that does nothing."""

    def forward(self, hidden, *args, **kwargs):
        return hidden


def without(model, dropped):
    """The model with layers `dropped` (from 0) doing nothing: what keeping the others must give."""
    layers = Backbone(model).layers
    for one in dropped:
        layers[one] = Aside()
    return model


@pytest.mark.parametrize("arch", UNIFORM)
def test_keeping_layers_is_leaving_the_others_out(arch):
    model = tiny_model(arch)
    ids = random_ids(20)
    student = keep_layers(model, [1, 2, 4])
    assert student.config.num_hidden_layers == 3 == len(Backbone(student).layers)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    got = student.eval()(ids, use_cache=False).logits
    expected = without(model, [2])(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():  # weights of its own
        for value in model.parameters():
            value.zero_()
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_keeping_every_layer_changes_nothing_and_draws_nothing():
    model, ids = tiny_model("llama"), random_ids(9)
    state = torch.get_rng_state()
    student = keep_layers(model, [1, 2, 3, 4]).eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(student(ids).logits, model(ids).logits)


def test_layers_whose_kind_hangs_on_their_number_are_refused_where_they_do_not_fit():
    model = tiny_model("qwen3_moe")
    assert keep_layers(model, [1, 2]).config.num_hidden_layers == 2
    with pytest.raises(DeliberateError, match="keep others"):
        keep_layers(model, [2, 4])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint with exits, and the same without."""
    root = tmp_path_factory.mktemp("models")
    stock = save_checkpoint(root / "stock")
    for name in ("adaptive_config.json", "exits.safetensors"):
        (stock / name).unlink()
    return {"adaptive": save_checkpoint(root / "adaptive"), "stock": stock}


@pytest.mark.parametrize("kind", ["adaptive", "stock"])
def test_a_shallower_student_is_distilled_saved_and_resumed(folders, kind, tmp_path):
    start = folders[kind]
    settings = ["recipe=distill", "model=folder", "model.keep_layers=[1,2,4]",
                f"recipe.teacher='{start}'"]  # fmt: skip
    record = run(start, tmp_path, *settings)
    assert record["steps"] == 4
    assert {"loss/exit3", "loss/teacher"} <= set(record["history"][-1] | record["history"][0])
    model = AdaptiveModel.from_pretrained(tmp_path / "model")
    assert model.exit_config.layers == (1, 2) and model.base.config.num_hidden_layers == 3
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = random_ids(8)
    assert torch.equal(plain(ids).logits, model.base(ids).logits)
    again = run(start, tmp_path, *settings, "resume=true")
    assert again["resumed_from"] == "checkpoint-4"


@pytest.mark.parametrize(
    ("kept", "named"),
    [
        ("[0,1]", "layers 1 to 4, not 0"),
        ("[1,5]", "layers 1 to 4, not 5"),
        ("[2,1]", "must ascend"),
        ("[1,1]", "must ascend"),
        ("[]", "must be a list"),
        ("3", "must be a list"),
        ("[1.5]", "whole numbers"),
        ("[1]", "1 layer"),
    ],
)
def test_layers_that_cannot_be_kept_are_one_line(folders, kept, named):
    cfg = compose("train", ["recipe=heads", "model=folder", "data=words", "data.max_tokens=100",
                            f"model.path='{folders['stock']}'",
                            f"model.keep_layers={kept}"])  # fmt: skip
    with pytest.raises(DeliberateError) as caught:
        check_config(cfg)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_an_exit_beyond_the_kept_layers_is_refused(folders):
    cfg = compose("train", ["recipe=heads", "model=folder", "data=words", "data.max_tokens=100",
                            f"model.path='{folders['adaptive']}'", "model.keep_layers=[1,2]",
                            "exits.layers=[2]"])  # fmt: skip
    with pytest.raises(DeliberateError, match="exit layer 2"):
        check_config(cfg)
