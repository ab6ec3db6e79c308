"""The deliberation gate: it fires by its own rule, the same in every way of decoding."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from gate_cases import NEW, decode, gated_model, rounds, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import left_padded, random_ids, tiny_model
from transformers import DynamicCache

from deliberate.api.model import AdaptiveModel
from deliberate.engine.scheduler import DeepSchedule
from deliberate.modeling.deliberation_gate import (
    GateConfig,
    refined_states,
    run_rounds,
)
from deliberate.utils.errors import DeliberateError


@pytest.fixture(scope="module", params=["transformer", "document"])
def model(request) -> AdaptiveModel:
    return gated_model(request.param)


def naive(model, prompt, count=NEW):
    """Token by token, every state anew from the stock model: the rule as it is written."""
    gate, backbone, ids, taken = model.gate, model.backbone, list(prompt), []
    heads, width = gate.config.heads, backbone.hidden_size
    for _ in range(count):
        with torch.inference_mode():
            hidden = model(torch.tensor([ids]), output_exit_states=True).last[0]
            places = torch.arange(len(ids))
            keys, values = gate.memory(hidden.unsqueeze(0), places.unsqueeze(0))
            state, used = hidden[-1], 0
            for _ in range(gate.config.rounds):
                if backbone.logits(state).softmax(-1).max() >= gate.config.think_below:
                    break
                query = gate.queries(state.unsqueeze(0), places[-1:])[0]
                mixed = []
                for head in range(heads):
                    weights = (keys[0, head] @ query[head]) * gate.block.scale
                    mixed.append(weights.softmax(-1) @ values[0, head])
                g = torch.sigmoid(gate.mix(gate.norm(state)))
                state = state + g * gate.block.change(state, torch.cat(mixed))
                used += 1
            assert torch.cat(mixed).shape == (width,) if used else True
            ids.append(int(backbone.logits(state).argmax()))
            taken.append(used)
    return ids[len(prompt) :], taken


# -- identity --------------------------------------------------------------------------------------


def test_decoding_follows_the_rule_as_it_is_written(model):
    ids, mask = left_padded([6])
    out = decode(model, ids, mask, "dense")
    expected = naive(model, ids[0].tolist())
    assert (tokens(out)[0], rounds(out)[0]) == expected
    assert len(set(rounds(out)[0])) > 1  # some take rounds, some do not
    plain = decode(model, ids, mask, "dense", gate=False)
    assert tokens(plain) != tokens(out) and rounds(plain) == [[0] * NEW]


def test_an_untrained_gate_changes_nothing():
    base = tiny_model("llama", layers=4)
    plain, gated = AdaptiveModel(base, [1, 2]), AdaptiveModel(base, [1, 2])
    ids, mask = left_padded([5, 9])
    for block in ("transformer", "document"):
        gated.gate = None
        gated.attach_gate(GateConfig(block=block, think_below=2.0, heads=2))
        wanted, out = decode(plain, ids, mask, "dense"), decode(gated, ids, mask, "dense")
        assert tokens(out) == tokens(wanted)
        assert rounds(out) == [[2] * NEW] * 2


def alone(model, ids, mask, **how):
    rows = [
        decode(model, own[keep.bool()][None], keep[keep.bool()][None], "dense", **how)
        for own, keep in zip(ids, mask, strict=True)
    ]
    return [tokens(out)[0] for out in rows], [rounds(out)[0] for out in rows]


def test_ragged_batches_and_exact_mode_repeat_every_sequence_alone(model):
    ids, mask = left_padded([3, 11, 1, 6])
    expected, taken = alone(model, ids, mask)
    assert len({count for row in taken for count in row}) > 1
    dense = decode(model, ids, mask, "dense")
    assert (tokens(dense), rounds(dense)) == (expected, taken)
    out = decode(model, ids, mask, "exact", thresholds=0.013)
    assert (tokens(out), rounds(out)) == (expected, taken)
    assert sum(trace.drafted for trace in out.traces) > 8
    assert sum(trace.rejected for trace in out.traces) > 0


@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "mistral"])
def test_exact_equals_dense_in_other_architectures(arch):
    model = gated_model(arch=arch)
    ids, mask = left_padded([2, 7])
    expected = alone(model, ids, mask)
    out = decode(model, ids, mask, "exact", thresholds=0.013)
    assert (tokens(out), rounds(out)) == expected
    assert out.traces[0].drafted + out.traces[1].drafted > 0


_DRAWN = gated_model()


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    decisions=st.lists(st.booleans(), min_size=1, max_size=40),
    fullness=st.sampled_from([0.2, 0.6, 1.0]),
    join=st.sampled_from([0.2, 2.0]),
    seed=st.integers(0, 20),
    ends=st.sets(st.integers(0, 96), max_size=8),
)
def test_any_sequence_of_decisions_gives_the_dense_output_and_rounds(
    lengths, decisions, fullness, join, seed, ends
):
    ids, mask = left_padded(lengths, seed=seed)
    script = itertools.cycle(decisions)
    end = {"eos_token_id": sorted(ends), "pad_token_id": 0} if ends else {}
    out = decode(
        _DRAWN,
        ids,
        mask,
        "exact",
        decide=lambda _exit, _sequence, _confidence: next(script),
        schedule=DeepSchedule(fullness, 3, join),
        max_new_tokens=10,
        **end,
    )
    assert (tokens(out), rounds(out)) == alone(_DRAWN, ids, mask, max_new_tokens=10, **end)


def test_sampling_draws_the_same_tokens_as_dense(model):
    ids, mask = left_padded([4, 8])
    how = {"do_sample": True, "seed": 11, "top_k": 0}
    assert tokens(decode(model, ids, mask, "exact", thresholds=0.013, **how)) == tokens(
        decode(model, ids, mask, "dense", **how)
    )


def test_the_whole_text_at_once_takes_the_same_rounds_to_the_same_states(model):
    ids, mask = left_padded([5])
    out = decode(model, ids, mask, "dense")
    whole = out.sequences
    with torch.inference_mode():
        last = model(whole, output_exit_states=True).last
        wanted = torch.zeros(whole.shape, dtype=torch.bool)
        wanted[0, 4:-1] = True
        outputs = run_rounds(model.gate, last, wanted, model.backbone.logits)
        assert outputs.rounds.tolist() == rounds(out)[0]
        refined = model.backbone.logits(
            refined_states(model.gate, last, wanted, model.backbone.logits)
        )
    assert refined.argmax(-1).tolist() == tokens(out)[0]


def test_packed_texts_do_not_see_each_other(model):
    one, two = random_ids(6, seed=1), random_ids(9, seed=2)
    with torch.inference_mode():
        apart = [model(ids, output_exit_states=True).last for ids in (one, two)]
        every = [torch.ones(1, n, dtype=torch.bool) for n in (6, 9, 15)]
        logits = model.backbone.logits
        expected = [
            run_rounds(model.gate, h, w, logits).states[-1]
            for h, w in zip(apart, every, strict=False)
        ]
        places = torch.cat([torch.arange(6), torch.arange(9)]).unsqueeze(0)
        packed = torch.cat(apart, dim=1)
        got = run_rounds(model.gate, packed, every[2], logits, position_ids=places).states[-1]
    torch.testing.assert_close(got, torch.cat(expected))


# -- threshold mode, lossy keys, caches -----------------------------------------------------------


def test_tokens_that_exit_early_take_no_round_but_are_in_the_memory(model):
    """Threshold mode: with tokens dictated, the full-depth predictions are those of dense mode."""
    ids, mask = left_padded([5])
    script = itertools.cycle([True, False, False, True, True, False, False, False])
    out = decode(model, ids, mask, "threshold", decide=lambda *_: next(script))
    with torch.inference_mode():
        last = model(out.sequences, output_exit_states=True).last
        wanted = torch.zeros(out.sequences.shape, dtype=torch.bool)
        wanted[0, 4:-1] = True
        outputs = run_rounds(model.gate, last, wanted, model.backbone.logits)
        answers = model.backbone.logits(outputs.states[-1]).argmax(-1).tolist()
    left = [record.exit_layer < 4 for record in out.trace.records]
    assert any(left) and not all(left)
    for place, record in enumerate(out.trace.records):
        if left[place]:
            assert record.rounds == 0
        else:
            assert (record.token, record.rounds) == (answers[place], outputs.rounds[place])


@pytest.mark.parametrize("kv_mode", ["propagate", "skip"])
def test_lossy_modes_equal_dense_while_no_token_exits_and_run_when_some_do(model, kv_mode):
    ids, mask = left_padded([4, 7])
    expected = decode(model, ids, mask, "dense")
    stay = decode(model, ids, mask, "threshold", kv_mode=kv_mode, decide=lambda *_: False)
    assert (tokens(stay), rounds(stay)) == (tokens(expected), rounds(expected))
    script = itertools.cycle([True, False, False])
    some = decode(model, ids, mask, "threshold", kv_mode=kv_mode, decide=lambda *_: next(script))
    again = itertools.cycle([True, False, False])
    other = decode(model, ids, mask, "threshold", kv_mode=kv_mode, decide=lambda *_: next(again))
    assert tokens(some) == tokens(other) and sum(map(sum, rounds(some))) > 0


def test_a_token_that_skipped_the_last_layers_is_not_in_the_memory():
    from deliberate.engine.deliberation import GateRunner

    model = gated_model(think_below=2.0, rounds=1)
    backbone, gate = model.backbone, model.gate
    hidden = torch.randn(1, 4, backbone.hidden_size, dtype=torch.float64)

    def refined(keep, junk):
        runner = GateRunner(gate, backbone, [])
        runner.open(1)
        runner.remember(hidden[:, :2], backbone.context(0, 2, device="cpu"))
        if junk is None:
            runner.skip(0, 3)
        else:
            runner.remember(junk, backbone.context(2, 1, device="cpu"))
        runner.remember(hidden[:, 3:], backbone.context(3, 1, device="cpu"))
        logits = backbone.logits(hidden[0, 3:])
        return runner.deliberate(hidden[0, 3:], logits, [0], [3], [runner.threshold])[0]

    with torch.inference_mode():
        skipped = refined(hidden, None)
        assert not torch.equal(skipped, refined(hidden, hidden[:, 2:3]))
        # Softmax over the slots that hold something: computed without the third state at all.
        places = torch.tensor([[0, 1, 3]])
        keys, values = gate.memory(hidden[:, [0, 1, 3]], places)
        query = gate.queries(hidden[:, 3:], torch.tensor([[3]])).transpose(1, 2)
        state, _ = gate.step(hidden[0, 3:], gate.attend(query, keys, values)[0])
        torch.testing.assert_close(skipped, backbone.logits(state))


def test_a_callers_cache_is_filled_and_its_lack_of_final_states_made_good(model):
    ids, _ = left_padded([6])
    expected = model.generate(ids, fidelity="dense", max_new_tokens=NEW)
    cache = DynamicCache()
    first = model.generate(ids, fidelity="dense", max_new_tokens=5, past_key_values=cache)
    rest = model.generate(first, fidelity="exact", max_new_tokens=NEW - 5, past_key_values=cache)
    assert torch.equal(rest, expected)


# -- settings, storage ----------------------------------------------------------------------------


def test_the_gate_stays_on_in_the_dense_context_and_can_be_turned_off(model):
    ids, mask = left_padded([5])
    on = tokens(decode(model, ids, mask, "dense"))
    with model.dense():
        assert tokens(decode(model, ids, mask, None)) == on
    stock = model.base.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert tokens(decode(model, ids, mask, "dense", gate=False)) == [stock[0, 5:].tolist()]


def test_rounds_are_counted_in_the_traces(model):
    ids, mask = left_padded([5, 3])
    out = decode(model, ids, mask, "dense")
    assert [trace.rounds for trace in out.traces] == [sum(row) for row in rounds(out)]
    assert sum(out.batch.deliberation_rounds) == sum(trace.rounds for trace in out.traces) > 0
    never = dataclasses.replace(model.gate.config, think_below=0.0)
    before, _ = model.gate.config, model.attach_gate(never)
    try:
        assert decode(model, ids, mask, "dense").batch.deliberation_rounds == []
    finally:
        model.attach_gate(before)


def test_a_gate_is_saved_and_loaded_with_its_model(model, tmp_path):
    ids, mask = left_padded([5])
    model.save_pretrained(tmp_path, merge=True)
    again = AdaptiveModel.from_pretrained(tmp_path, dtype="float64")
    assert again.gate.config == model.gate.config and not again.gate.training
    assert tokens(decode(again, ids, mask, "dense")) == tokens(decode(model, ids, mask, "dense"))
    assert again.fingerprints() == model.fingerprints()
    plain = AdaptiveModel(again.base, again.exit_config)
    plain.exits.load_state_dict(again.exits.state_dict())
    assert plain.fingerprints()[1] != again.fingerprints()[1]
    plain.save_pretrained(tmp_path, merge=True)
    assert not (tmp_path / "gate.safetensors").exists()
    assert AdaptiveModel.from_pretrained(tmp_path).gate is None


@pytest.mark.parametrize("break_it", ["missing", "foreign", "setting"])
def test_a_broken_gate_is_one_line(tmp_path, break_it):
    model = gated_model()
    model.save_pretrained(tmp_path, merge=True)
    config = tmp_path / "adaptive_config.json"
    raw = json.loads(config.read_text())
    if break_it == "missing":
        (tmp_path / "gate.safetensors").unlink()
    if break_it == "foreign":
        raw["gate"]["width"] = 16
    if break_it == "setting":
        raw["gate"]["depth"] = 2
    config.write_text(json.dumps(raw))
    with pytest.raises(DeliberateError) as error:
        AdaptiveModel.from_pretrained(tmp_path)
    assert "gate" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"block": "mamba"},
        {"rounds": 0},
        {"rounds": True},
        {"think_below": -0.1},
        {"think_below": float("nan")},
        {"width": 0},
        {"gated": 1},
    ],
)
def test_an_impossible_setting_is_refused(wrong):
    with pytest.raises(DeliberateError, match=next(iter(wrong))):
        GateConfig(**wrong)


def test_a_gate_that_does_not_fit_is_refused():
    model = AdaptiveModel(tiny_model("llama", layers=4), [1])
    with pytest.raises(DeliberateError, match="heads 5"):
        model.attach_gate(GateConfig(heads=5))
    model.attach_gate(GateConfig(heads=2, width=16))
    with pytest.raises(DeliberateError, match="width 16"):
        model.attach_gate(GateConfig(heads=2, width=24))
    assert model.attach_gate(GateConfig(heads=2, width=16, rounds=5)).config.rounds == 5
