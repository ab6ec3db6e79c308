"""The watch over long text: its rule, the same in every mode, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from long_text_rule import written_out
from tiny_models import VOCAB, left_padded, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.long_text import (
    LongTextConfig,
    LongTextWatch,
    nearest_distances,
    penalties,
    unit_states,
)
from deliberate.engine.scheduler import DeepSchedule
from deliberate.engine.sequence import DecodingSequence
from deliberate.modeling.deliberation_gate import GateConfig
from deliberate.trace import TokenRecord
from deliberate.utils.errors import DeliberateError

NEW = 36
# Random models seldom repeat: a short window, a high threshold and great strength show every part.
RULE = LongTextConfig(window=4, threshold=0.8, tokens=5, strength=30.0, sharpness=4.0)


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama"), exits=[1, 2])


def decode(model, ids, mask, fidelity="dense", rule=RULE, **how):
    how = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | how
    return model.generate(
        ids,
        attention_mask=mask,
        fidelity=fidelity,
        long_text=rule,
        online=False,
        return_dict_in_generate=True,
        **how,
    )


def outcome(out):
    """Tokens, triggers and counts of every sequence; statistics to a digit that rounding keeps."""
    return [
        (
            trace.tokens,
            [(one.index, round(one.statistic, 9)) for one in trace.triggers],
            trace.reweighed,
        )
        for trace in out.traces
    ]


def test_dense_decoding_follows_the_documented_rule(model):
    ids, mask = left_padded([8])
    (found,) = outcome(decode(model, ids, mask))
    assert found == written_out(model.base, ids[0].tolist(), RULE, NEW)
    plain = decode(model, ids, mask, rule=None).trace
    assert len(found[1]) > 1 and found[0] != plain.tokens
    assert found[0][: found[1][0][0]] == plain.tokens[: found[1][0][0]]
    assert 0 < found[2] < NEW
    assert plain.triggers == [] and plain.reweighed == 0


def test_a_batch_gives_what_each_gives_alone(model):
    lengths = [6, 9, 8]
    ids, mask = left_padded(lengths)
    alone = [
        outcome(decode(model, ids[row : row + 1, -length:], mask[row : row + 1, -length:]))[0]
        for row, length in enumerate(lengths)
    ]
    assert outcome(decode(model, ids, mask)) == alone
    assert len({str(one) for one in alone}) == 3


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    script=st.lists(st.booleans(), min_size=3, max_size=12),
    fullness=st.sampled_from([0.3, 1.0]),
    window=st.sampled_from([1, 4]),
)
def test_exact_equals_dense_under_any_exits(model, script, fullness, window):
    rule = LongTextConfig(window=window, threshold=0.8, tokens=3, strength=30.0, sharpness=4.0)
    ids, mask = left_padded([7, 9])
    expected = outcome(decode(model, ids, mask, rule=rule))
    exits = itertools.cycle(script)
    out = decode(
        model,
        ids,
        mask,
        "exact",
        rule=rule,
        decide=lambda *_: next(exits),
        schedule=DeepSchedule(fullness, 3, 0.5),
    )
    assert outcome(out) == expected


def test_exact_rolls_back_drafts_that_re_weighing_would_not_choose(model):
    ids, mask = left_padded([8])
    out = decode(model, ids, mask, "exact", decide=lambda *_: True)
    assert out.trace.rejected > 0 and out.trace.triggers
    assert outcome(out) == outcome(decode(model, ids, mask))


def test_sampling_exact_draws_what_dense_draws(model):
    ids, mask = left_padded([4, 8])
    how = {"do_sample": True, "temperature": 0.2, "seed": 5, "top_k": 0}
    expected = outcome(decode(model, ids, mask, **how))
    assert outcome(decode(model, ids, mask, "exact", thresholds=0.013, **how)) == expected
    assert any(triggers for _, triggers, _ in expected)


def test_with_a_gate_exact_equals_dense(model):
    gated = AdaptiveModel(tiny_model("llama"), exits=[1, 2])
    gate = gated.attach_gate(GateConfig(rounds=1, think_below=2.0, width=24, heads=2))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in gate.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    rule = dataclasses.replace(RULE, threshold=1.5)
    ids, mask = left_padded([5])
    exits = itertools.cycle([True, False, True])
    expected = decode(gated, ids, mask, rule=rule)
    out = decode(gated, ids, mask, "exact", rule=rule, decide=lambda *_: next(exits))
    assert outcome(out) == outcome(expected)
    assert expected.trace.triggers and expected.trace.rounds
    assert outcome(expected) != outcome(decode(model, ids, mask, rule=rule))


def test_in_threshold_mode_no_token_exits_while_logits_are_re_weighed(model):
    always = dataclasses.replace(RULE, threshold=4.0)
    ids, mask = left_padded([9])
    trace = decode(model, ids, mask, "threshold", rule=always, decide=lambda *_: True).trace
    # The first token is the prompt's pass; the watch gets the others at the first deep pass.
    early = [record.exit_layer < model.backbone.num_layers for record in trace.records][1:]
    assert early == sorted(early, reverse=True)
    assert any(early) and not all(early)
    assert trace.triggers[0].index == RULE.window
    assert trace.reweighed == len(early) - sum(early)


@pytest.mark.parametrize("fidelity", ["dense", "exact", "threshold"])
def test_a_watch_that_never_triggers_changes_nothing(model, fidelity):
    ids, mask = left_padded([4, 6])
    idle = LongTextConfig(window=2, threshold=0.0)
    with_watch = decode(model, ids, mask, fidelity, rule=idle, thresholds=0.02)
    without = decode(model, ids, mask, fidelity, rule=None, thresholds=0.02)
    assert [t.tokens for t in with_watch.traces] == [t.tokens for t in without.traces]
    assert with_watch.traces[0].exit_layers == without.traces[0].exit_layers


def test_without_the_option_nothing_is_looked_at(model, monkeypatch):
    monkeypatch.setattr(LongTextWatch, "__init__", None)
    ids, mask = left_padded([4])
    assert len(decode(model, ids, mask, rule=None).trace.records) == NEW


def test_the_prompt_is_neither_a_loop_nor_something_to_avoid(model):
    """The same generated states and tokens trigger alike, whatever repeats in the prompt."""
    states = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    for index, prompt in enumerate(([1, 2] * 20, [3])):
        watch = LongTextWatch(STRICT)
        sequence = DecodingSequence(index, prompt, len(prompt), 4)
        watch.observe(sequence, 0, states)
        assert sequence.trace.triggers == []


# What the states are made up for.
STRICT = dataclasses.replace(RULE, threshold=0.3)


def shown(states, rule=STRICT, parts=(1,)):
    """The triggers of a sequence whose states come in so many at a time."""
    watch = LongTextWatch(rule)
    sequence = DecodingSequence(0, [1], 1, 4)
    sizes, at = itertools.cycle(parts), 0
    while at < len(states):
        count = next(sizes)
        watch.observe(sequence, at, states[at : at + count])
        at += count
    return watch, sequence


@settings(max_examples=30, deadline=None)
@given(
    period=st.integers(1, 9),
    seed=st.integers(0, 99),
    parts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_a_loop_of_any_period_triggers_as_soon_as_the_window_is_in_it(period, seed, parts):
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(12, 64, generator=generator, dtype=torch.float64)
    loop = torch.randn(period, 64, generator=generator, dtype=torch.float64)
    states = torch.cat((fresh, loop.repeat(30, 1)))[: 12 + period + 3 * STRICT.window]
    _, sequence = shown(states, parts=parts)
    first = sequence.trace.triggers[0]
    # From its second time round each state has stood before; the window may still hold others.
    assert 12 + period < first.index <= 12 + period + STRICT.window
    assert 0 <= first.statistic < STRICT.threshold


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), cut=st.integers(0, 20))
def test_showing_states_again_after_a_rollback_is_as_if_they_came_first(seed, cut):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(6, 16, generator=generator, dtype=torch.float64).repeat(4, 1)
    junk = torch.randn(24 - cut, 16, generator=generator, dtype=torch.float64)
    watch, sequence = shown(torch.cat((states[:cut], junk)), parts=(3,))
    watch.observe(sequence, cut, states[cut:])
    _, straight = shown(states)
    assert [one.index for one in sequence.trace.triggers] == [
        one.index for one in straight.trace.triggers
    ]
    assert straight.trace.triggers


def test_what_was_cut_off_at_the_end_leaves_no_trace():
    """Exact mode confirms several tokens at once; a stopping criterion may end among them."""
    watch, sequence = shown(torch.cat((torch.ones(9, 8), torch.randn(9, 8), torch.ones(9, 8))))
    before = [one.index for one in sequence.trace.triggers]
    for count in (27, before[-1], 4, 0):
        records = [TokenRecord(3, 4, 0.0, 0.0, True)] * count
        sequence.records[:] = records
        watch.close(sequence)
        assert [one.index for one in sequence.trace.triggers] == [i for i in before if i < count]
        assert sequence.trace.reweighed <= max(0, count - STRICT.window)
    assert len(before) > 1


def test_states_with_a_gap_are_a_programming_error():
    watch, sequence = shown(torch.randn(3, 8))
    with pytest.raises(RuntimeError, match="state 5 was given, the next one is 3"):
        watch.observe(sequence, 5, torch.randn(1, 8))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), total=st.integers(1, 12), first=st.integers(0, 11))
def test_nearest_distances_are_those_of_a_search_among_earlier_states(seed, total, first):
    first = min(first, total - 1)
    generator = torch.Generator().manual_seed(seed)
    units = unit_states(torch.randn(total, 6, generator=generator, dtype=torch.float64))
    for place, found in enumerate(nearest_distances(units, first).tolist(), start=first):
        gaps = [float((units[place] - units[s]).square().sum()) for s in range(place)]
        assert found == pytest.approx(min(gaps, default=4.0), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(1, 10), sharpness=st.floats(0, 64))
def test_a_token_loses_by_its_most_similar_state_and_new_ones_lose_nothing(seed, count, sharpness):
    generator = torch.Generator().manual_seed(seed)
    units = unit_states(torch.randn(count + 1, 6, generator=generator, dtype=torch.float64))
    units[0] = units[-1]
    tokens = torch.randint(0, 5, (count,), generator=generator)
    found = penalties(units[:-1], units[-1], tokens, VOCAB, sharpness)
    assert found.shape == (VOCAB,) and float(found.min()) >= 0 and float(found.max()) <= 1
    assert found[tokens[0]] == pytest.approx(1.0)
    for token in range(VOCAB):
        similar = [float(units[s] @ units[-1]) for s in range(count) if tokens[s] == token]
        wanted = math.exp(-sharpness * (1 - max(similar))) if similar else 0.0
        assert float(found[token]) == pytest.approx(wanted, abs=1e-9)


def test_logits_are_copied_before_they_are_changed():
    watch, sequence = shown(torch.ones(9, 8))
    sequence.records.extend(TokenRecord(3, 4, 0.0, 0.0, True) for _ in range(8))
    logits = torch.zeros(1, VOCAB)
    changed = watch.reweigh(sequence, 8, logits)
    assert (
        not logits.any()
        and float(changed[0, 3]) == pytest.approx(-STRICT.strength)
        and not changed[0, 4:].any()
    )
    assert watch.reweigh(sequence, 2, logits) is logits


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"fidelity": "certified"}, "long_text with fidelity 'certified'"),
        ({"fidelity": "budget"}, "long_text with fidelity 'budget'"),
        ({"fidelity": "threshold", "kv_mode": "skip"}, "long_text with kv_mode 'skip'"),
        ({"fidelity": "threshold", "kv_mode": "propagate"}, "use 'defer'"),
        ({"rule": True}, "long_text=True is not a LongTextConfig"),
    ],
)
def test_modes_without_re_weighing_are_refused_in_one_line(model, how, message):
    ids, mask = left_padded([4])
    with pytest.raises(DeliberateError, match=message) as error:
        decode(model, ids, mask, **how)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 0},
        {"window": 2.5},
        {"tokens": True},
        {"threshold": -0.1},
        {"threshold": math.nan},
        {"strength": math.inf},
        {"sharpness": "much"},
    ],
)
def test_impossible_settings_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(DeliberateError, match=f"long_text {name} {value!r}"):
        LongTextConfig(**wrong)
