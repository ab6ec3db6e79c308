"""Positions that a model was not made for: what transformers does there is done here too."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, random_ids, tiny_model
from transformers import DynamicCache, StaticCache

from deliberate.api.model import AdaptiveModel
from deliberate.config import KVMode

SWITCH = 16
LONGROPE = {
    "original_max_position_embeddings": SWITCH,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": SWITCH,
    },
}
DYNAMIC = {
    "max_position_embeddings": SWITCH,
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
}
DRAFTING = {"thresholds": 0.013, "online": False}


def adaptive(arch="phi3", **settings) -> AdaptiveModel:
    return AdaptiveModel(tiny_model(arch, **settings), [1, 2])


def stock(ids, new, arch="phi3", **settings):
    return tiny_model(arch, **settings).generate(ids, max_new_tokens=new, do_sample=False)


@pytest.mark.parametrize("prompt", [1, 5, *range(SWITCH - 3, SWITCH + 4)])
@pytest.mark.parametrize("fidelity", ["dense", "exact"])
@pytest.mark.parametrize("window", [None, 8])
def test_longrope_goes_on_past_its_original_length_as_in_transformers(prompt, fidelity, window):
    ids = random_ids(prompt, seed=prompt)
    expected = stock(ids, 24, **LONGROPE, sliding_window=window)
    out = adaptive(**LONGROPE, sliding_window=window).generate(
        ids, max_new_tokens=24, fidelity=fidelity, return_dict_in_generate=True, **DRAFTING
    )
    assert torch.equal(out.sequences, expected)
    if fidelity == "exact":
        assert out.trace.drafted > 3 and all(record.verified for record in out.trace.records)


def test_the_comparison_with_longrope_would_notice_keys_that_are_not_computed_anew():
    model = adaptive(**LONGROPE)
    model.backbone.rope_switch = None
    differs = [
        not torch.equal(
            model.generate(random_ids(5, seed=s), max_new_tokens=24, fidelity="dense"),
            stock(random_ids(5, seed=s), 24, **LONGROPE),
        )
        for s in range(4)
    ]
    assert any(differs)


@pytest.mark.parametrize("mode", list(KVMode))
def test_longrope_in_every_mode_of_the_missing_kv(mode):
    model, ids = adaptive(**LONGROPE), random_ids(9)
    expected = stock(ids, 20, **LONGROPE)
    settings = {"fidelity": "threshold", "kv_mode": mode, "max_new_tokens": 20}
    assert torch.equal(model.generate(ids, thresholds=1.0, **settings), expected)
    out = model.generate(ids, return_dict_in_generate=True, **settings, thresholds=0.013)
    assert out.trace.drafted > 3 and out.sequences.shape == expected.shape


@pytest.mark.parametrize(
    ("arch", "settings"), [("phi3", LONGROPE), ("llama", DYNAMIC), ("llama", LONGROPE)]
)
def test_rows_of_a_batch_take_the_frequencies_of_their_own_length(arch, settings):
    model, lengths = adaptive(arch, **settings), (20, 4, 15, 11)
    width = max(lengths)
    ids = random_ids(width, batch=len(lengths), seed=2)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    together = {
        fidelity: model.generate(
            ids, attention_mask=mask, max_new_tokens=16, fidelity=fidelity, **DRAFTING
        )
        for fidelity in ("dense", "exact")
    }
    assert torch.equal(together["dense"], together["exact"])
    for row, length in enumerate(lengths):
        alone = stock(ids[row : row + 1, -length:], 16, arch, **settings)
        assert together["exact"][row, width:].tolist() == alone[0, length:].tolist()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_callers_cache_is_computed_anew_where_longrope_changes(kind):
    model, ids = adaptive(**LONGROPE), random_ids(7)

    def cache():
        if kind == "static":
            return StaticCache(config=model.base.config, max_cache_len=64)
        return DynamicCache(config=model.base.config)

    held = cache()
    for turn in range(4):  # the switch comes in the second turn
        expected = model.generate(ids, fidelity="dense", max_new_tokens=5)
        assert torch.equal(expected, stock(ids, 5, **LONGROPE))
        made = model.generate(ids, past_key_values=held, max_new_tokens=5, **DRAFTING)
        assert torch.equal(made, expected), f"turn {turn}"
        assert int(held.get_seq_length()) == made.shape[1] - 1
        ids = torch.cat((made, random_ids(2, seed=turn)), dim=1)
    # And a prompt that is past it already drops what a shorter one left.
    short = cache()
    model.generate(ids[:, :6], past_key_values=short, max_new_tokens=2)
    made = model.generate(ids, past_key_values=short, max_new_tokens=5, **DRAFTING)
    assert torch.equal(made, stock(ids, 5, **LONGROPE))


def test_dynamic_rope_does_not_depend_on_what_was_decoded_before():
    model = adaptive("llama", **DYNAMIC)
    for seed, length in enumerate((10, 18, 5, 17, 30)):
        ids = random_ids(length, seed=seed)
        expected = stock(ids, 14, "llama", **DYNAMIC)
        for fidelity in ("dense", "exact", "dense"):
            made = model.generate(ids, max_new_tokens=14, fidelity=fidelity, **DRAFTING)
            assert torch.equal(made, expected), f"{length} tokens, {fidelity}"


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "gpt2"])
@pytest.mark.parametrize("prompt", [12, 20])
def test_rotary_models_go_on_past_max_position_embeddings_as_transformers_does(arch, prompt):
    ids = random_ids(prompt)
    model = AdaptiveModel(tiny_model(arch, max_position_embeddings=16), [1, 2])
    expected = model.base.generate(ids, max_new_tokens=12, do_sample=False)
    with pytest.warns(UserWarning, match="made for 16 positions"):
        made = model.generate(ids, max_new_tokens=12, **DRAFTING)
    assert torch.equal(made, expected)


def test_learned_positions_end_the_answer_with_a_word():
    model = AdaptiveModel(tiny_model("gpt2", max_position_embeddings=16), [1, 2])
    with pytest.warns(UserWarning, match="max_new_tokens=12") as caught:
        assert model.generate(random_ids(10), max_new_tokens=12).shape[1] == 16
    assert all("\n" not in str(one.message) for one in caught)


def test_the_fused_executor_goes_on_past_max_position_embeddings_too():
    base = tiny_model("llama", max_position_embeddings=16, dtype=torch.float32)
    ids = random_ids(300)  # past the first table of positions, too
    expected = base.generate(ids, max_new_tokens=12, do_sample=False)
    model = AdaptiveModel(base, [1, 2], executor="fused")
    with pytest.warns(UserWarning, match="made for 16 positions"):
        assert torch.equal(model.generate(ids, max_new_tokens=12, **DRAFTING), expected)
