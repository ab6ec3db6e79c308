"""`generate` of a model that trains: what it hands out, checkpointing, dropout."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from streamers import Collect
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache, LogitsProcessor

from deliberate.api.model import AdaptiveModel
from deliberate.utils.errors import DeliberateError


@pytest.mark.parametrize("fidelity", ["dense", "exact", "threshold"])
def test_outputs_can_be_trained_on_and_changed_in_place(fidelity):
    own = AdaptiveModel(tiny_model("llama", layers=4), [1, 2])
    streamer, ids = Collect(), random_ids(5)
    out = own.generate(
        ids,
        fidelity=fidelity,
        thresholds=0.013,
        max_new_tokens=6,
        output_scores=True,
        return_dict_in_generate=True,
        past_key_values=DynamicCache(),
        streamer=streamer,
    )
    plain = own.generate(ids, fidelity=fidelity, thresholds=0.013, max_new_tokens=6)
    for sequences in (out.sequences, plain):
        assert not sequences.is_inference()
        own(sequences, labels=sequences).loss.backward()
        sequences[0, 0] = 1
    for scores in out.scores:
        assert not scores.is_inference()
        scores += 1.0
    for layer in out.past_key_values.layers:
        assert not layer.keys.is_inference() and not layer.values.is_inference()
    assert not any(value.is_inference() for value in streamer.raw)
    assert own.base.lm_head.weight.grad is not None


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_a_model_that_trains_with_gradient_checkpointing_decodes(arch):
    own = AdaptiveModel(tiny_model(arch, layers=6), [1, 2, 4])
    ids = random_ids(5)
    expected = own.generate(ids, fidelity="dense", max_new_tokens=12)
    own.base.gradient_checkpointing_enable()
    own.train()
    layers = own.backbone.layers
    for fidelity in ("dense", "exact"):
        out = own.generate(ids, fidelity=fidelity, thresholds=0.013, max_new_tokens=12)
        assert torch.equal(out, expected)
        assert all(layer.gradient_checkpointing and layer.training for layer in layers)
    with pytest.raises(DeliberateError, match="no rule"):
        own.generate(ids, logits_processor=[FailsLater()], max_new_tokens=12)
    assert all(layer.gradient_checkpointing for layer in layers)
    own(ids, output_exit_states=True).exits[0].sum().backward()


def test_a_budget_is_measured_and_met_with_gradient_checkpointing_on():
    tiny = AdaptiveModel.from_pretrained("tiny")
    ids = torch.tensor([[47, 506, 291, 223, 19, 20, 653]])
    tiny.base.gradient_checkpointing_enable()
    tiny.train()
    out = tiny.generate(
        ids,
        max_new_tokens=10,
        latency_budget={"ms_per_token": 10_000.0},
        return_dict_in_generate=True,
    )
    assert out.budget is not None
    assert torch.equal(out.sequences, tiny.eval().generate(ids, max_new_tokens=10))


def test_threads_that_decode_in_training_mode_do_not_disturb_each_other():
    own = AdaptiveModel(tiny_model("llama", layers=6), [1, 2, 4])
    ids = random_ids(5)
    expected = own.generate(ids, fidelity="dense", max_new_tokens=12)
    own.base.gradient_checkpointing_enable()
    own.train()

    def decode(_):
        return own.generate(ids, fidelity="dense", max_new_tokens=12)

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(out, expected) for out in pool.map(decode, range(16)))
    assert all(layer.gradient_checkpointing for layer in own.backbone.layers)


def test_a_guarantee_in_training_mode_with_dropout_is_refused():
    own = AdaptiveModel(tiny_model("llama", attention_dropout=0.1), [1, 2])
    own.train()
    with pytest.raises(DeliberateError, match=r"attention_dropout=0.1 in .*model.eval\(\)"):
        own.generate(random_ids(5), fidelity="exact", max_new_tokens=3)
    own.generate(random_ids(5), fidelity="dense", max_new_tokens=3)
    own.eval()
    own.generate(random_ids(5), fidelity="exact", max_new_tokens=3)
    other = AdaptiveModel(tiny_model("gpt2", resid_pdrop=0.2), [1, 2])
    other.train()
    with pytest.raises(DeliberateError, match="in training mode with p="):
        other.generate(random_ids(5), max_new_tokens=3)


class FailsLater(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 8:
            raise ValueError("no rule")
        return scores
