"""The decode loop: exactness, layers really not run, KV after catching up, rollback."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, VOCAB, random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.config import Fidelity
from deliberate.engine.decode_loop import DecodeLoop
from deliberate.engine.exit_policy import FixedPolicy
from deliberate.engine.loop_settings import LoopSettings
from deliberate.modeling.exit_config import ExitConfig

NEW_TOKENS = 24


@pytest.fixture(scope="module", params=ARCHITECTURES)
def adaptive(request) -> AdaptiveModel:
    return AdaptiveModel(tiny_model(request.param, layers=6), [1, 2, 4])


@pytest.fixture(scope="module")
def llama() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=6), [1, 2, 4])


def generate(model: AdaptiveModel, ids: torch.Tensor, fidelity: str, **settings):
    settings.setdefault("max_new_tokens", NEW_TOKENS)
    return model.generate(ids, fidelity=fidelity, return_dict_in_generate=True, **settings)


def make_loop(model: AdaptiveModel, exits, thresholds, **settings) -> DecodeLoop:
    settings = {
        "fidelity": Fidelity.THRESHOLD,
        "max_pending": 12,
        "max_new_tokens": NEW_TOKENS,
    } | settings
    parts = {name: settings.pop(name) for name in ("clock", "exit_policy") if name in settings}
    settings = LoopSettings(exits=exits, thresholds=thresholds, **settings)
    return DecodeLoop(model.backbone, model.reader(), settings, **parts)


# -- exactness -------------------------------------------------------------------------------------


def test_dense_equals_transformers_generate(adaptive):
    for seed, length in ((0, 3), (1, 17)):
        ids = random_ids(length, seed=seed)
        stock = adaptive.base.generate(
            ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        assert torch.equal(generate(adaptive, ids, "dense").sequences, stock)


@pytest.mark.parametrize("threshold", [0.012, 0.1, 0.5])
def test_exact_equals_dense_token_for_token(adaptive, threshold):
    drafted = rejected = 0
    for seed, length in ((0, 1), (1, 6), (2, 19)):
        ids = random_ids(length, seed=seed)
        out = generate(adaptive, ids, "exact", thresholds=threshold)
        assert torch.equal(out.sequences, generate(adaptive, ids, "dense").sequences)
        assert all(record.verified for record in out.trace.records)
        early = sum(layer < adaptive.backbone.num_layers for layer in out.trace.exit_layers)
        assert out.trace.drafted == early + out.trace.discarded, "a draft is accepted or discarded"
        drafted += out.trace.drafted
        rejected += out.trace.rejected
    if threshold == 0.012:  # above chance for 97 tokens: nearly every token is drafted
        assert drafted > 30, "the comparison is empty unless tokens exit early"
        assert rejected > 5, "the comparison is empty unless drafts are rejected"


@settings(max_examples=40, deadline=None)
@given(
    exits=st.sets(st.integers(1, 5), min_size=1, max_size=4).map(sorted),
    threshold=st.sampled_from([0.012, 0.03, 0.1, 0.3]),
    max_pending=st.integers(1, 9),
    length=st.integers(1, 20),
    new_tokens=st.integers(1, 20),
    end_token=st.none() | st.integers(0, VOCAB - 1),
    seed=st.integers(0, 50),
)
def test_exact_equals_dense_for_any_exits_and_limits(
    exits, threshold, max_pending, length, new_tokens, end_token, seed
):
    base = tiny_model("llama", layers=6)
    config = ExitConfig.build(6, exits, threshold, max_pending=max_pending)
    model = AdaptiveModel(base, config)
    ids = random_ids(length, seed=seed)
    dense = generate(model, ids, "dense", max_new_tokens=new_tokens, eos_token_id=end_token)
    exact = generate(model, ids, "exact", max_new_tokens=new_tokens, eos_token_id=end_token)
    assert exact.trace.tokens == dense.trace.tokens
    assert exact.trace.finish == dense.trace.finish


def test_an_end_token_that_an_exit_proposes_is_verified_before_it_ends_the_output(llama):
    ids = random_ids(6, seed=3)
    dense = generate(llama, ids, "dense").trace.tokens
    wrong = {
        record.token for record in generate(llama, ids, "threshold", thresholds=0.012).trace.records
    } - set(dense)
    assert wrong, "needs a token that only the exits would choose"
    exact = generate(llama, ids, "exact", thresholds=0.012, eos_token_id=sorted(wrong))
    assert exact.trace.tokens == dense


def test_the_last_token_at_the_length_limit_is_verified(llama):
    for limit in range(1, 12):
        ids = random_ids(5, seed=4)
        out = generate(llama, ids, "exact", thresholds=0.012, max_new_tokens=limit)
        assert len(out.trace.records) == limit
        assert all(record.verified for record in out.trace.records)


# -- layers are really not run ---------------------------------------------------------------------


def count_calls(model: AdaptiveModel) -> tuple[Counter, Counter, list]:
    calls: Counter = Counter()
    positions: Counter = Counter()

    def hook(layer):
        def record(_module, args, _output):
            calls[layer] += 1
            positions[layer] += args[0].shape[1]

        return record

    handles = [
        module.register_forward_hook(hook(index))
        for index, module in enumerate(model.backbone.layers)
    ]
    return calls, positions, handles


@pytest.mark.parametrize("fidelity", ["dense", "exact", "threshold"])
def test_hooks_count_exactly_the_layer_calls_that_the_trace_claims(adaptive, fidelity):
    ids = random_ids(7, seed=5)
    calls, positions, handles = count_calls(adaptive)
    try:
        trace = generate(adaptive, ids, fidelity, thresholds=0.03).trace
    finally:
        for handle in handles:
            handle.remove()
    depth = adaptive.backbone.num_layers
    # The prompt pass runs every layer once over the whole prompt; the trace counts what follows.
    assert [calls[layer] - 1 for layer in range(depth)] == trace.layer_calls
    assert [positions[layer] - 7 for layer in range(depth)] == trace.layer_positions


def test_no_layer_above_an_exit_runs_for_tokens_that_exit(llama):
    ids = random_ids(7, seed=6)
    calls, _, handles = count_calls(llama)
    try:
        loop = make_loop(llama, (2, 4), (1e-9, 1e-9), max_pending=NEW_TOKENS)
        list(loop.run(ids))
    finally:
        for handle in handles:
            handle.remove()
    # Every token after the first exits at layer 2; nothing forces a deep pass.
    assert [calls[layer] for layer in range(6)] == [NEW_TOKENS] * 2 + [1] * 4
    assert loop.trace.exit_histogram == {2: NEW_TOKENS - 1, 6: 1}
    assert loop.trace.layers_per_token == pytest.approx(2.0)


def test_dense_runs_every_layer_once_a_token(llama):
    trace = generate(llama, random_ids(4), "dense").trace
    assert trace.layer_calls == trace.layer_positions == [NEW_TOKENS - 1] * 6
    assert trace.layers_per_token == 6.0
    assert trace.drafted == trace.rejected == 0


def test_a_deep_pass_is_forced_when_too_many_tokens_are_pending(llama):
    for most in (1, 3, 5):
        loop = make_loop(llama, (2,), (1e-9,), max_pending=most)
        for _ in loop.run(random_ids(5)):
            pending = loop.cache.length(0) - loop.cache.length(5)
            assert pending <= most
        # `most` tokens exit, then one runs through all layers with them.
        assert loop.trace.exit_layers[: most + 2] == [6] + [2] * most + [6]


# -- the cache ------------------------------------------------------------------------------------


def test_after_catching_up_the_kv_equals_that_of_a_dense_run(adaptive):
    ids = random_ids(6, seed=8)
    dense = make_loop(adaptive, (), (), fidelity=Fidelity.DENSE)
    list(dense.run(ids))
    exact = make_loop(adaptive, (1, 2, 4), (0.012,) * 3, fidelity=Fidelity.EXACT)
    list(exact.run(ids))
    assert exact.trace.drafted > 0
    exact.cache.check()
    for layer in range(adaptive.backbone.num_layers):
        held = exact.cache.length(layer)
        assert held == dense.cache.length(layer), "exact ends with a full-depth pass"
        for ours, reference in zip(
            exact.cache.states(layer), dense.cache.states(layer), strict=True
        ):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_kv_lengths_never_rise_with_depth_while_decoding(llama):
    for fidelity in (Fidelity.EXACT, Fidelity.THRESHOLD):
        loop = make_loop(llama, (1, 2, 4), (0.03,) * 3, fidelity=fidelity)
        for _ in loop.run(random_ids(6, seed=9)):
            loop.cache.check()


# -- what is accepted ----------------------------------------------------------------------------


def test_exact_yields_only_verified_tokens_and_all_of_them(llama):
    ids = random_ids(6, seed=10)
    dense = generate(llama, ids, "dense").trace.tokens
    loop = make_loop(llama, (1, 2, 4), (0.012,) * 3, fidelity=Fidelity.EXACT)
    accepted: list[int] = []
    for (fresh,) in loop.run(ids):
        accepted += fresh
        assert accepted == dense[: len(accepted)]
    assert accepted == dense == loop.trace.tokens


def test_at_threshold_one_no_token_exits_and_the_output_is_dense(llama):
    ids = random_ids(6, seed=11)
    out = generate(llama, ids, "threshold", thresholds=1.0)
    assert out.trace.exit_histogram == {6: NEW_TOKENS}
    assert torch.equal(out.sequences, generate(llama, ids, "dense").sequences)


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy", "gate"])
def test_every_measure_decodes_exactly(measure):
    config = ExitConfig.build(6, [1, 3], 0.02, measure=measure)
    model = AdaptiveModel(tiny_model("llama", layers=6), config)
    ids = random_ids(6, seed=12)
    exact = generate(model, ids, "exact")
    assert exact.trace.drafted > 0
    assert torch.equal(exact.sequences, generate(model, ids, "dense").sequences)


def test_seconds_come_from_the_given_clock(llama):
    ticks = iter(range(10_000))
    loop = make_loop(llama, (2,), (0.5,), clock=lambda: float(next(ticks)))
    list(loop.run(random_ids(4)))
    seconds = [record.seconds for record in loop.trace.records]
    # Every token has a reading of its own, counted from the first one.
    assert all(one == int(one) for one in seconds) and seconds == sorted(set(seconds))
    assert loop.trace.prefill_seconds == seconds[0] >= 1.0
    assert seconds[-1] < loop.trace.seconds < next(ticks)


def test_a_token_exits_at_a_confidence_equal_to_the_threshold(llama):
    ids = random_ids(4)
    all_exit = make_loop(llama, (2,), (1e-9,))
    list(all_exit.run(ids))
    confidence = all_exit.records[1].confidence
    for threshold, layer in ((confidence, 2), (math.nextafter(confidence, 2.0), 6)):
        loop = make_loop(llama, (2,), (threshold,))
        list(loop.run(ids))
        assert loop.records[1].exit_layer == layer


@pytest.mark.parametrize(("called", "expected"), [(None, 1.0), (0.25, 0.25)])
def test_an_exit_policy_counts_from_when_the_caller_asked(llama, called, expected):
    class Policy(FixedPolicy):
        def begin(self, now, prompt_tokens, max_new_tokens, work):
            begun.append((now, prompt_tokens, max_new_tokens))

    begun: list = []
    loop = make_loop(llama, (2,), (0.5,), exit_policy=Policy([0.5]), clock=lambda: 1.0)
    list(loop.run(random_ids(4), called=called))
    assert begun == [(expected, 4, NEW_TOKENS)]
