"""`generate`: transformers' conventions, and one-line refusals of what it cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from streamers import Collect
from tiny_models import MAX_POSITIONS, random_ids, tiny_model
from transformers import (
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteria,
)

from deliberate.api.generation import AdaptiveDecoding
from deliberate.api.model import AdaptiveModel
from deliberate.utils.errors import DeliberateError


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=6), [1, 2, 4])


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


def test_a_prompt_that_fills_all_learned_positions_is_refused():
    learned = AdaptiveModel(tiny_model("gpt2"), [1])
    with pytest.raises(DeliberateError, match=f"context is {MAX_POSITIONS}"):
        learned.generate(random_ids(MAX_POSITIONS))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"inputs": torch.zeros(1, 0, dtype=torch.int64)}, "prompt is empty"),
        ({"inputs": random_ids(4, batch=2), "streamer": Collect()}, "the batch has 2"),
        ({"inputs": torch.zeros(1, 4)}, "float32"),
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


def test_streamers_and_stop_strings_never_see_a_token_that_is_rolled_back():
    from deliberate.api import checkpoint

    tiny = AdaptiveModel.from_pretrained("tiny")
    tokenizer = checkpoint.load_tokenizer("tiny")
    prompt = tokenizer(
        "Tom has 4 apples and buys 5 more. How many apples does", return_tensors="pt"
    ).input_ids
    dense = tiny.generate(prompt, fidelity="dense", max_new_tokens=80)
    made = dense[0, prompt.shape[1] :]
    text = tokenizer.decode(made)
    stop = text[len(text) // 2 :][:6]
    settings = {"max_new_tokens": 80, "stop_strings": [stop], "tokenizer": tokenizer}
    stopped = tiny.generate(prompt, fidelity="dense", **settings)
    assert prompt.shape[1] < stopped.shape[1] < dense.shape[1]
    streamer = Collect()
    exact = tiny.generate(
        prompt,
        fidelity="exact",
        decide=lambda *_: True,  # every token is drafted at the first exit
        online=False,
        streamer=streamer,
        return_dict_in_generate=True,
        **settings,
    )
    assert exact.trace.rejected > 0, "the comparison is empty unless drafts are taken back"
    assert torch.equal(exact.sequences, stopped)
    shown = [token for put in streamer.values[1:] for token in put]
    assert shown == stopped[0, prompt.shape[1] :].tolist()


# -- model inputs ----------------------------------------------------------------------------------


def test_positions_that_follow_from_the_mask_are_taken_and_others_refused(model):
    ids = random_ids(6)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), ids), dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    free = model.generate(padded, attention_mask=mask, max_new_tokens=4)
    own = (mask.cumsum(-1) - 1).clamp(min=0)
    for positions in (own, own[0], own - 5 * (1 - mask)):
        out = model.generate(padded, attention_mask=mask, position_ids=positions, max_new_tokens=4)
        assert torch.equal(out, free)
    for positions in (own + 1, 2 * own, own[:, :4], own.unsqueeze(0), [0, 1]):
        with pytest.raises(DeliberateError, match="position_ids are not 0, 1, 2") as caught:
            model.generate(padded, attention_mask=mask, position_ids=positions, max_new_tokens=4)
        assert "\n" not in str(caught.value)
    decode = AdaptiveDecoding(model)
    with pytest.raises(DeliberateError, match="position_ids"):
        model.base.generate(ids, position_ids=torch.arange(6)[None] + 1, custom_generate=decode)
    with pytest.raises(DeliberateError, match="inputs_embeds"):
        model.base.generate(
            ids, inputs_embeds=model.base.get_input_embeddings()(ids), custom_generate=decode
        )


def test_pad_tokens_without_a_mask_are_padding_as_in_transformers(model):
    ids = random_ids(6).clamp(min=1)
    padded = torch.cat((torch.zeros(1, MAX_POSITIONS - 8, dtype=torch.int64), ids), dim=1)
    out = model.generate(padded, pad_token_id=0, max_new_tokens=5)
    assert torch.equal(out, model.base.generate(padded, pad_token_id=0, max_new_tokens=5))
    # Padding does not count against the context.
    longer = torch.cat((torch.zeros(1, 40, dtype=torch.int64), padded), dim=1)
    assert torch.equal(model.generate(longer, pad_token_id=0, max_new_tokens=5)[:, 40:], out)
    held = ids.clone()
    held[0, 3] = 0
    with pytest.raises(DeliberateError, match="prompt 0 holds pad token 0 at position 3"):
        model.generate(held, pad_token_id=0, max_new_tokens=5)
    mask = torch.ones_like(held)
    out = model.generate(held, attention_mask=mask, pad_token_id=0, max_new_tokens=5)
    stock = model.base.generate(held, attention_mask=mask, pad_token_id=0, max_new_tokens=5)
    assert torch.equal(out, stock)


def test_masks_of_any_type_are_taken_and_masks_of_other_values_refused(model):
    ids, mask = random_ids(6), torch.tensor([[0, 0, 1, 1, 1, 1]])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=5)
    for dtype in (torch.bool, torch.float32, torch.bfloat16, torch.int32, torch.uint8):
        out = model.generate(ids, attention_mask=mask.to(dtype), max_new_tokens=5)
        assert torch.equal(out, expected), dtype
    for bad, words in ((mask * 0.5, "holds 0.5"), (mask - 1, "holds -1"), ([[1] * 6], "is a list")):
        with pytest.raises(DeliberateError, match=words):
            model.generate(ids, attention_mask=bad, max_new_tokens=5)


# -- as a transformers model -----------------------------------------------------------------------


def test_a_pipeline_takes_the_adaptive_model_and_decodes_with_it():
    from transformers import pipeline

    from deliberate.api import checkpoint

    tiny, tokenizer = AdaptiveModel.from_pretrained("tiny"), checkpoint.load_tokenizer("tiny")
    settings = {"max_new_tokens": 40, "do_sample": False}
    prompts = [
        "Mia has 12 plums. Mia buys 7 more plums. How many plums does Mia have now?",
        "Ben has 3 pears.",
    ]
    calls = []
    inner = tiny.generate
    tiny.generate = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    adaptive = pipeline("text-generation", model=tiny, tokenizer=tokenizer)
    stock = pipeline("text-generation", model=tiny.base, tokenizer=tokenizer)
    assert adaptive(prompts, batch_size=2, **settings) == stock(prompts, batch_size=2, **settings)
    assert calls and "AdaptiveModel" in repr(adaptive)


def test_the_generation_config_is_the_base_models_and_is_obeyed(model):
    own = AdaptiveModel(tiny_model("llama", layers=4), [1, 2])
    assert own.generation_config is own.base.generation_config
    own.generation_config.max_new_tokens = 3
    assert own.generate(random_ids(5)).shape[1] == 8
    own.generation_config = GenerationConfig(max_new_tokens=2)
    assert own.generate(random_ids(5)).shape[1] == 7
    own.generation_config.num_beams = 3
    with pytest.raises(DeliberateError, match="num_beams=3"):
        own.generate(random_ids(5))
    assert own.generate(random_ids(5), num_beams=1).shape[1] == 7
    assert own.can_generate() and own.dtype is torch.float64
    assert own.name_or_path == own.base.name_or_path


def test_untrained_exits_are_said_once_and_trained_or_loaded_ones_never(tmp_path, recwarn):
    def said():
        held = [w for w in recwarn.list if "were never trained" in str(w.message)]
        recwarn.clear()
        return len(held)

    own, ids = AdaptiveModel(tiny_model("llama", layers=4), [1, 2]), random_ids(5)
    own.generate(ids, fidelity="dense", max_new_tokens=2)
    assert said() == 0, "dense asks no exit"
    own.generate(ids, max_new_tokens=2)
    assert said() == 1
    own.generate(ids, max_new_tokens=2)
    assert said() == 0
    trained = AdaptiveModel(tiny_model("llama", layers=4), [1, 2])
    with torch.no_grad():
        trained.exits.translators[1].up.weight.add_(0.1)
    trained.generate(ids, max_new_tokens=2)
    trained.save_pretrained(tmp_path / "m", merge=True)
    AdaptiveModel.from_pretrained(tmp_path / "m").generate(ids, max_new_tokens=2)
    assert said() == 0


def test_a_stock_model_decodes_adaptively_through_custom_generate(model):
    ids = random_ids(6)
    decode = AdaptiveDecoding(model, fidelity="exact", thresholds=0.013, online=False)
    out = model.base.generate(
        ids, custom_generate=decode, max_new_tokens=12, return_dict_in_generate=True
    )
    stock = model.base.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(out.sequences, stock)
    assert out.trace.drafted > 0
    assert out.past_key_values.get_seq_length() == stock.shape[1] - 1
    with pytest.raises(DeliberateError, match="another model"):
        tiny_model("llama").generate(ids, custom_generate=decode, max_new_tokens=2)


def test_unload_gives_the_stock_model_back_and_pruned_parameters_are_printed(model, capsys):
    model.print_trainable_parameters()
    assert "trainable params" in capsys.readouterr().out
    assert model.unload() is model.base


def test_push_to_hub_uploads_what_save_pretrained_writes(monkeypatch):
    import huggingface_hub

    calls = []

    class Hub:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo, private, exist_ok):
            calls.append(("create", repo, private))

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    own = AdaptiveModel(tiny_model("llama"), [1])
    own.push_to_hub("me/adaptive", merge=True, private=True)
    assert calls[1] == ("create", "me/adaptive", True)
    assert {"adaptive_config.json", "exits.safetensors", "model.safetensors"} <= set(calls[2][1])
    with pytest.raises(DeliberateError, match="owner/name"):
        own.push_to_hub("adaptive")
