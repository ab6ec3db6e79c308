"""Strict exact mode: equal to dense in bf16 and fp16 too, where rounding decides near-ties."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import ARCHITECTURES, random_ids, tiny_model
from transformers import DynamicCache, RepetitionPenaltyLogitsProcessor
from transformers.generation import LogitsProcessorList

from deliberate.api.model import AdaptiveModel
from deliberate.engine.long_text import LongTextConfig
from deliberate.engine.sequence import DecodingSequence
from deliberate.engine.strict import NearTies
from deliberate.utils.errors import DeliberateError

NEW = 16
# Every token is drafted; the exits' tokens are mostly wrong, so that everything is verified.
DRAFTING = {"fidelity": "exact", "decide": lambda *_: True, "online": False}


@functools.cache
def model(arch: str, dtype: torch.dtype = torch.bfloat16, layers: int = 3) -> AdaptiveModel:
    return AdaptiveModel(tiny_model(arch, layers=layers, dtype=dtype), [1, 2], executor="generic")


def decode(own: AdaptiveModel, seed: int, **how):
    how = {"max_new_tokens": NEW, "return_dict_in_generate": True} | how
    return own.generate(random_ids(5, seed=seed), **how)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_strict_exact_repeats_dense_in_half_precision(arch, dtype):
    own = model(arch, dtype)
    dense = decode(own, 1, fidelity="dense")
    strict = decode(own, 1, strict=True, **DRAFTING)
    assert torch.equal(strict.sequences, dense.sequences)
    trace = strict.trace
    assert trace.drafted > 0 and all(record.verified for record in trace.records)
    assert trace.near_ties > 0 or dtype is torch.float16
    assert bool(trace.near_ties) == bool(trace.run_again) and trace.run_again < NEW


def test_without_strict_exact_differs_from_dense():
    own = AdaptiveModel(
        tiny_model("mistral", layers=6, dtype=torch.bfloat16), [1, 2, 4], executor="generic"
    )
    how = {"fidelity": "exact", "thresholds": 0.02, "online": False, "max_new_tokens": 40}
    for seed in range(12):
        dense = decode(own, seed, fidelity="dense", max_new_tokens=40).sequences
        assert torch.equal(decode(own, seed, strict=True, **how).sequences, dense)
        if not torch.equal(decode(own, seed, **how).sequences, dense):
            return
    pytest.fail("no near-tie was decided differently: the comparison is empty")


@pytest.mark.parametrize("thresholds", [0.015, 0.05])
def test_an_infinite_bound_runs_every_drafted_token_as_dense_does_bit_for_bit(thresholds):
    own = model("llama", layers=4)
    how = {"output_scores": True, "thresholds": thresholds, "online": False}
    for seed in range(2):
        dense = decode(own, seed, fidelity="dense", output_scores=True)
        strict = decode(own, seed, fidelity="exact", strict=math.inf, **how)
        assert torch.equal(strict.sequences, dense.sequences)
        for ours, theirs in zip(strict.scores, dense.scores, strict=True):
            assert torch.equal(ours, theirs)


def test_a_token_without_a_near_tie_costs_nothing_more():
    own = model("llama", torch.float64)
    plain, strict = (decode(own, 3, strict=on, **DRAFTING) for on in (False, True))
    assert torch.equal(plain.sequences, strict.sequences)
    assert strict.trace.near_ties == strict.trace.run_again == 0
    assert plain.trace.layer_calls == strict.trace.layer_calls


def test_calls_of_layers_count_what_was_run_again():
    own, calls = model("llama"), [0]
    handle = own.backbone.layers[-1].register_forward_hook(
        lambda *_: calls.__setitem__(0, calls[0] + 1)
    )
    try:
        trace = decode(own, 0, strict=True, **DRAFTING).trace
    finally:
        handle.remove()
    assert trace.layer_calls[-1] == calls[0] - 1 > 0  # one call is the prompt's


def test_strict_with_processors_end_tokens_padding_and_a_planner():
    own = model("gpt2")
    seed = 2
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
    dense = decode(own, seed, fidelity="dense", logits_processor=processors)
    how = {"logits_processor": processors, "strict": True}
    assert torch.equal(decode(own, seed, **how, **DRAFTING).sequences, dense.sequences)
    end = int(dense.sequences[0, 5 + 9])
    how |= {"eos_token_id": end, "pad_token_id": 0}
    stopped = decode(own, seed, fidelity="dense", **how | {"strict": False})
    assert torch.equal(decode(own, seed, **how, **DRAFTING).sequences, stopped.sequences)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), random_ids(5, seed=seed)), dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 5])
    dense = decode(own, seed, fidelity="dense")
    made = own.generate(
        padded, attention_mask=mask, max_new_tokens=NEW, strict=True, thresholds=0.02
    )
    assert torch.equal(made[:, 3:], dense.sequences)


def test_the_callers_cache_gets_the_keys_of_dense():
    own = model("mistral")
    caches = DynamicCache(config=own.base.config), DynamicCache(config=own.base.config)
    turns = [{"fidelity": "dense"}, DRAFTING | {"strict": True}]
    for cache, how in zip(caches, turns, strict=True):
        decode(own, 1, past_key_values=cache, **how)
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_a_single_token_pass_repeats_dense_only_where_all_tokens_before_it_do():
    cache = SimpleNamespace(length=lambda _layer, _row: held)
    runner = SimpleNamespace(cache=cache, shared=None)
    near_ties = NearTies(model("llama").backbone, runner, math.inf)  # type: ignore[arg-type]
    sequence, logits = DecodingSequence(0, [], 5, 3), torch.tensor([1.0, 2.0])
    near_ties.begin(5)
    held = 6
    near_ties.note_pass(sequence, 1)
    assert not near_ties.undecided(sequence, 1, logits)  # as dense runs it
    held = 8
    near_ties.note_pass(sequence, 2)
    assert near_ties.undecided(sequence, 3, logits)
    held = 9
    near_ties.note_pass(sequence, 1)
    assert near_ties.undecided(sequence, 4, logits)  # its keys follow those of the pass before


def test_strict_across_the_switch_of_longrope():
    settings = {
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": 16,
        },
    }
    own = AdaptiveModel(
        tiny_model("phi3", dtype=torch.bfloat16, **settings), [1, 2], executor="generic"
    )
    dense = decode(own, 0, fidelity="dense")
    for bound in (True, math.inf):
        strict = decode(own, 0, strict=bound, **DRAFTING)
        assert torch.equal(strict.sequences, dense.sequences)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"strict": -1.0}, "strict=-1.0"),
        ({"strict": "yes"}, "strict='yes'"),
        ({"strict": math.nan}, "strict=nan"),
        ({"strict": True, "fidelity": "dense"}, "'dense'"),
        ({"strict": True, "fidelity": "threshold"}, "'threshold'"),
        ({"strict": True, "do_sample": True}, "sampling"),
        ({"strict": True, "long_text": LongTextConfig(threshold=0.2)}, "long_text"),
        ({"strict": True, "inputs": random_ids(4, batch=2)}, "a batch of 2"),
    ],
)
def test_strict_is_refused_by_name_where_it_cannot_work(how, words):
    with pytest.raises(DeliberateError) as caught:
        model("llama").generate(**({"inputs": random_ids(4), "max_new_tokens": 4} | how))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_compiled_kernels_need_no_strict_mode_and_take_the_setting():
    own = AdaptiveModel(tiny_model("llama", dtype=torch.float32), [1, 2], executor="fused")
    dense = decode(own, 0, fidelity="dense")
    strict = decode(own, 0, strict=True, **DRAFTING)
    assert torch.equal(strict.sequences, dense.sequences) and strict.trace.run_again == 0
