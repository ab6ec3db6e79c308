"""`generate`: transformers' conventions, and one-line refusals of what it cannot do."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MAX_POSITIONS, random_ids, tiny_model
from transformers import GenerationConfig, MaxLengthCriteria, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from deliberate.errors import DeliberateError
from deliberate.model import AdaptiveModel


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=6), [1, 2, 4])


class Collect(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value.reshape(-1).tolist())

    def end(self):
        self.ended = True


class StopAtToken(StoppingCriteria):
    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids[0, -1].item() == self.token])


@pytest.mark.parametrize("fidelity", ["dense", "exact", "threshold"])
def test_the_streamer_gets_the_prompt_then_every_token_in_order(model, fidelity):
    ids, streamer = random_ids(5), Collect()
    out = model.generate(
        ids, max_new_tokens=15, fidelity=fidelity, thresholds=0.02, streamer=streamer
    )
    assert streamer.values[0] == ids[0].tolist()
    assert [t for put in streamer.values[1:] for t in put] == out[0, 5:].tolist()
    assert streamer.ended


def test_stopping_criteria_end_exact_where_they_end_dense(model):
    ids = random_ids(5)
    dense = model.generate(ids, max_new_tokens=20, fidelity="dense")
    target = dense[0, 5 + 9].item()
    first = dense[0, 5:].tolist().index(target)
    for fidelity in ("dense", "exact"):
        out = model.generate(
            ids,
            max_new_tokens=20,
            fidelity=fidelity,
            thresholds=0.02,
            stopping_criteria=[StopAtToken(target)],
            return_dict_in_generate=True,
        )
        assert out.sequences[0, 5:].tolist() == dense[0, 5 : 5 + first + 1].tolist()
        assert out.trace.tokens == out.sequences[0, 5:].tolist()
        assert out.trace.finish == "stop"
    out = model.generate(ids, max_new_tokens=20, stopping_criteria=[MaxLengthCriteria(9)])
    assert out.shape[1] == 9


def test_lengths_follow_transformers(model):
    ids = random_ids(5)
    assert model.generate(ids).shape[1] == 25
    assert model.generate(ids, max_length=12).shape[1] == 12
    assert model.generate(ids, generation_config=GenerationConfig(max_new_tokens=3)).shape[1] == 8
    out = model.generate(ids, max_new_tokens=6, return_dict_in_generate=True)
    assert out.trace.prompt_tokens == 5 and out.trace.finish == "length"


def test_left_padding_is_ignored_but_kept_in_the_output(model):
    ids = random_ids(6)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), ids), dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    out = model.generate(padded, attention_mask=mask, max_new_tokens=10)
    assert torch.equal(out[:, 3:], model.generate(ids, max_new_tokens=10))
    assert torch.equal(out[:, :9], padded)


def test_the_dense_context_turns_adaptivity_off_and_back_on(model):
    ids = random_ids(5)
    with model.dense():
        inside = model.generate(ids, max_new_tokens=8, return_dict_in_generate=True)
    assert inside.trace.exit_histogram == {6: 8}
    assert model.fidelity == "exact"
    with pytest.raises(RuntimeError), model.dense():
        raise RuntimeError
    assert model.fidelity == "exact"


def test_an_answer_stops_at_the_end_of_the_context(model):
    out = model.generate(random_ids(MAX_POSITIONS - 4), max_new_tokens=50)
    assert out.shape[1] == MAX_POSITIONS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"inputs": torch.zeros(1, 0, dtype=torch.int64)}, "prompt is empty"),
        ({"inputs": random_ids(4, batch=2), "streamer": Collect()}, "the batch has 2"),
        ({"inputs": torch.zeros(1, 4)}, "float32"),
        ({"inputs": random_ids(MAX_POSITIONS)}, f"context is {MAX_POSITIONS}"),
        ({"inputs": None}, "one of the two"),
        ({"inputs": random_ids(4), "input_ids": random_ids(4)}, "one of the two"),
        ({"inputs": random_ids(4), "penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
        ({"inputs": random_ids(4), "kv_mode": "dfer"}, "'dfer' is unknown"),
        ({"inputs": random_ids(4), "fidelity": "exact", "kv_mode": "skip"}, "'defer'"),
        ({"inputs": random_ids(4), "stop_strings": ["a"]}, "tokenizer"),
        ({"inputs": random_ids(4), "num_beams": 4}, "num_beams=4"),
        ({"inputs": random_ids(4), "do_sample": True, "temperature": -1.0}, "temperature"),
        ({"inputs": random_ids(4), "logits_processor": [object()]}, "logits_processor"),
        ({"inputs": random_ids(4), "max_new_tokens": 0}, "max_new_tokens"),
        ({"inputs": random_ids(4), "max_length": 4}, "max_length"),
        ({"inputs": random_ids(4), "fidelity": "exactly"}, "'exactly' is unknown"),
        ({"inputs": random_ids(4), "thresholds": 1.5}, "1.5 is outside"),
        ({"inputs": random_ids(4), "thresholds": (0.5,)}, "1 thresholds for 3 exits"),
        ({"inputs": random_ids(4), "max_new_token": 4}, "max_new_token"),
        (
            {"inputs": random_ids(4), "attention_mask": torch.tensor([[1, 1, 0, 1]])},
            "pad on the left",
        ),
        ({"inputs": random_ids(4), "attention_mask": torch.zeros(1, 4)}, "prompt is empty"),
        ({"inputs": random_ids(4), "attention_mask": torch.ones(1, 3)}, "[1, 3]"),
    ],
)
def test_bad_input_is_refused_in_one_line_that_names_it(model, arguments, words):
    with pytest.raises(DeliberateError) as caught:
        model.generate(**arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
