"""Ragged batches: every sequence decodes as it would alone, whatever its neighbours do."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, VOCAB, random_ids, tiny_model
from transformers import DynamicCache, LogitsProcessor, StaticCache

from deliberate.api.model import AdaptiveModel
from deliberate.config import Fidelity, KVMode
from deliberate.engine.decode_loop import DecodeLoop
from deliberate.engine.exit_policy import CallablePolicy
from deliberate.engine.loop_settings import LoopSettings
from deliberate.engine.scheduler import DeepSchedule
from deliberate.kernels.ops.int8_linear import quantise
from deliberate.modeling.exit_config import ExitConfig
from deliberate.utils.errors import DeliberateError

NEW = 16


@pytest.fixture(scope="module")
def llama() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=6), [1, 2, 4])


def left_padded(lengths, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask ``[B, longest]`` of random prompts."""
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = random_ids(length, seed=seed + row)[0]
        mask[row, width - length :] = 1
    return ids, mask


def alone(model: AdaptiveModel, ids: torch.Tensor, mask: torch.Tensor, **settings) -> list:
    """Dense tokens of each prompt decoded by itself."""
    made = []
    for own, keep in zip(ids, mask, strict=True):
        out = model.generate(
            own[keep.bool()].unsqueeze(0),
            attention_mask=keep[keep.bool()].unsqueeze(0),  # else a 0 in the text means padding
            fidelity="dense",
            return_dict_in_generate=True,
            **settings,
        )
        made.append(out.trace.tokens)
    return made


def together(model: AdaptiveModel, ids, mask, fidelity="exact", **settings):
    settings = {"online": False} | settings
    return model.generate(
        ids, attention_mask=mask, fidelity=fidelity, return_dict_in_generate=True, **settings
    )


def tokens(out) -> list:
    return [trace.tokens for trace in out.traces]


# -- identity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_ragged_batch_repeats_every_sequence_alone(arch):
    model = AdaptiveModel(tiny_model(arch, layers=4), [1, 2])
    ids, mask = left_padded([3, 11, 1, 6])
    expected = alone(model, ids, mask, max_new_tokens=NEW)
    assert tokens(together(model, ids, mask, "dense", max_new_tokens=NEW)) == expected
    out = together(model, ids, mask, thresholds=0.013, max_new_tokens=NEW)
    assert tokens(out) == expected
    assert sum(trace.drafted for trace in out.traces) > 8
    assert sum(trace.rejected for trace in out.traces) > 0


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_exact_equals_dense_for_batches_of_mixed_lengths(llama, batch):
    ids, mask = left_padded([1 + (7 * row) % 19 for row in range(batch)], seed=batch)
    expected = alone(llama, ids, mask, max_new_tokens=NEW)
    for threshold in (0.013, 0.05, 0.3):
        out = together(llama, ids, mask, thresholds=threshold, max_new_tokens=NEW)
        assert tokens(out) == expected
        assert all(record.verified for trace in out.traces for record in trace.records)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    decisions=st.lists(st.booleans(), min_size=1, max_size=60),
    max_pending=st.integers(1, 5),
    fullness=st.sampled_from([0.2, 0.6, 1.0]),
    max_wait=st.integers(0, 4),
    join=st.sampled_from([0.2, 0.7, 2.0]),
    seed=st.integers(0, 30),
    ends=st.sets(st.integers(0, VOCAB - 1), max_size=8),
)
def test_any_sequence_of_decisions_gives_the_dense_output(
    lengths, decisions, max_pending, fullness, max_wait, join, seed, ends
):
    config = ExitConfig.build(4, [1, 3], 0.5, max_pending=max_pending)
    model = AdaptiveModel(tiny_model("llama", layers=4), config)
    ids, mask = left_padded(lengths, seed=seed)
    script = itertools.cycle(decisions)
    end = {"eos_token_id": sorted(ends), "pad_token_id": 0} if ends else {}
    out = together(
        model,
        ids,
        mask,
        decide=lambda _exit, _sequence, _confidence: next(script),
        schedule=DeepSchedule(fullness, max_wait, join),
        max_new_tokens=12,
        **end,
    )
    assert tokens(out) == alone(model, ids, mask, max_new_tokens=12, **end)


def test_sequences_that_end_early_do_not_change_the_others(llama):
    ids, mask = left_padded([4, 9, 2, 6])
    dense = alone(llama, ids, mask, max_new_tokens=NEW)
    end = dense[1][3]  # ends sequence 1 at its fourth token, or before
    expected = alone(llama, ids, mask, max_new_tokens=NEW, eos_token_id=end, pad_token_id=0)
    assert len({len(made) for made in expected}) > 1
    for fidelity in ("dense", "exact"):
        out = together(
            llama,
            ids,
            mask,
            fidelity,
            thresholds=0.013,
            max_new_tokens=NEW,
            eos_token_id=end,
            pad_token_id=0,
        )
        assert tokens(out) == expected
        width = max(map(len, expected))
        rows = [made + [0] * (width - len(made)) for made in expected]
        assert out.sequences[:, ids.shape[1] :].tolist() == rows


def test_the_padded_output_equals_transformers(llama):
    ids, mask = left_padded([3, 8, 5])
    stock = llama.base.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    for fidelity in ("dense", "exact"):
        ours = together(llama, ids, mask, fidelity, thresholds=0.013, max_new_tokens=NEW)
        assert torch.equal(ours.sequences, stock)


def test_several_return_sequences_are_decoded_side_by_side(llama):
    ids = random_ids(5)
    out = llama.generate(ids, num_return_sequences=3, do_sample=True, seed=4, max_new_tokens=NEW)
    assert out.shape == (3, 5 + NEW)
    assert len({tuple(row) for row in out.tolist()}) == 3


# -- scheduling ----------------------------------------------------------------------------------


def make_loop(model: AdaptiveModel, fidelity=Fidelity.EXACT, **settings) -> DecodeLoop:
    settings = {"max_pending": 6, "max_new_tokens": NEW} | settings
    settings = {"exits": (2,), "thresholds": (0.5,), "fidelity": fidelity} | settings
    decide = settings.pop("decide", None)
    policy = None if decide is None else CallablePolicy(decide)
    wanted = LoopSettings(**settings)
    return DecodeLoop(model.backbone, model.reader(), wanted, exit_policy=policy)


def prompts(*lengths: int) -> list[torch.Tensor]:
    return [random_ids(length, seed=length)[0] for length in lengths]


def test_a_sequence_that_can_go_on_shallow_is_not_held_up_by_one_that_cannot(llama):
    # Tokens of sequence 0 never exit early, those of the others always do.
    loop = make_loop(
        llama,
        Fidelity.THRESHOLD,
        decide=lambda _exit, sequence, _confidence: sequence > 0,
        schedule=DeepSchedule(fullness=1.0, max_wait=4, join=2.0),
        max_pending=NEW,
    )
    list(loop.run(prompts(4, 5, 6)))
    shallow = [p for p in loop.batch.passes if p.segment == 0]
    # While sequence 0 waits for its first deep pass the two others go on.
    assert [p.rows for p in shallow[:5]] == [3, 2, 2, 2, 2]
    blocked_passes = 0
    for one in loop.batch.passes:
        blocked_passes = 0 if one.segment else blocked_passes + (one.rows < 3)
        assert blocked_passes <= 4, "no sequence waits longer than the bound"


@pytest.mark.parametrize(("join", "rows"), [(0.5, 2), (2.0, 1)])
def test_a_sequence_with_many_pending_drafts_joins_the_deep_pass_of_another(llama, join, rows):
    loop = make_loop(
        llama,
        decide=lambda _exit, sequence, _confidence: sequence > 0,
        schedule=DeepSchedule(fullness=1.0, max_wait=4, join=join),
        max_new_tokens=NEW,
    )
    list(loop.run(prompts(4, 5)))
    # Five drafts are pending of the second sequence, of at most six, when the first is due.
    assert next(one.rows for one in loop.batch.passes if one.segment) == rows


def test_deep_passes_are_fewer_and_fuller_than_one_for_every_blocked_sequence(llama):
    script = itertools.cycle([True, True, False, True, False, True, True])

    def deep_passes(fullness: float) -> tuple[int, float]:
        loop = make_loop(
            llama,
            decide=lambda *_: next(script),
            schedule=DeepSchedule(fullness=fullness, max_wait=50, join=2.0),
            max_new_tokens=40,
        )
        list(loop.run(prompts(4, 5, 6, 7)))
        deep = [p for p in loop.batch.passes if p.segment]
        return len(deep), sum(p.rows for p in deep) / len(deep)

    eager, full = deep_passes(0.25), deep_passes(1.0)
    assert full[0] < eager[0]
    assert full[1] > eager[1]


def test_layers_are_counted_as_hooks_count_them_in_a_batch(llama):
    calls = [0] * 6
    handles = [
        layer.register_forward_hook(
            lambda *_, index=index: calls.__setitem__(index, calls[index] + 1)
        )
        for index, layer in enumerate(llama.backbone.layers)
    ]
    try:
        ids, mask = left_padded([3, 8, 5])
        out = together(llama, ids, mask, thresholds=0.05, max_new_tokens=NEW)
    finally:
        for handle in handles:
            handle.remove()
    assert [count - 1 for count in calls] == out.batch.layer_calls  # one call is the prompts'
    assert out.batch.layer_calls[5] < out.batch.layer_calls[0]


def test_pending_states_stay_within_their_bound(llama):
    loop = make_loop(llama, decide=lambda *_: True, max_pending=3, max_new_tokens=30)
    list(loop.run(prompts(4, 5, 6)))
    # Three drafts and the newest token of each of three sequences.
    assert loop.batch.peak_pending == 3 * 4


def test_the_cache_rows_of_finished_sequences_are_freed(llama):
    loop = make_loop(llama, Fidelity.DENSE, thresholds=(), exits=())
    rows = []
    for step, _ in enumerate(loop.run(prompts(4, 5, 6))):
        if step == 2:
            loop.stop_at(2, 1)
        rows.append(loop.cache.batch)
    assert rows[:3] == [3, 3, 3] and set(rows[3:]) == {2}
    assert [sequence.row for sequence in loop.sequences if sequence.index != 1] == [0, 1]


# -- the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("fidelity", ["exact", "threshold"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_callers_cache_ends_as_transformers_leaves_it(arch, fidelity, kind):
    model = AdaptiveModel(tiny_model(arch, layers=4), [1, 2])
    # transformers' own eager attention goes wrong on padded rows behind a sliding window.
    ids, mask = left_padded([13, 13] if arch == "gemma2" else [13, 5])

    def cache():
        if kind == "static":
            return StaticCache(config=model.base.config, max_cache_len=64)
        return DynamicCache(config=model.base.config)

    stock, ours = cache(), cache()
    # In threshold mode no token exits, so that the output is the dense one.
    settings = {"thresholds": 1.0 if fidelity == "threshold" else 0.013}
    common = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0}
    expected = model.base.generate(ids, past_key_values=stock, do_sample=False, **common)
    made = model.generate(
        ids, past_key_values=ours, fidelity=fidelity, online=False, **settings, **common
    )
    assert torch.equal(made, expected)
    assert int(ours.get_seq_length()) == int(stock.get_seq_length()) == 13 + 12 - 1
    # What matters of a cache is what comes of it: the next turn, decoded by transformers itself.
    more = torch.cat((expected, random_ids(3, batch=2)), dim=1)
    wide = torch.cat((mask, torch.ones(2, 12 + 3, dtype=torch.int64)), dim=1)
    next_turn = {"attention_mask": wide, "max_new_tokens": 6, "pad_token_id": 0}
    after = [
        model.base.generate(more, past_key_values=held, do_sample=False, **next_turn)
        for held in (stock, ours)
    ]
    assert torch.equal(*after)


@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_a_conversation_goes_on_from_the_callers_cache(arch):
    model = AdaptiveModel(tiny_model(arch, layers=4), [1, 2])
    ids = random_ids(14, seed=3)
    cache = DynamicCache(config=model.base.config)
    first = model.generate(ids, past_key_values=cache, thresholds=0.013, max_new_tokens=9)
    more = torch.cat((first, random_ids(4, seed=9)), dim=1)
    went_on = model.generate(more, past_key_values=cache, thresholds=0.013, max_new_tokens=9)
    assert torch.equal(went_on, model.generate(more, fidelity="dense", max_new_tokens=9))
    assert int(cache.get_seq_length()) == more.shape[1] + 9 - 1


# -- modes of the missing KV ---------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("mode", [KVMode.PROPAGATE, KVMode.SKIP])
def test_lossy_modes_equal_dense_while_no_token_exits(arch, mode):
    model = AdaptiveModel(tiny_model(arch, layers=4), [1, 2])
    ids, mask = left_padded([4, 11])
    out = together(model, ids, mask, "threshold", thresholds=1.0, kv_mode=mode, max_new_tokens=12)
    assert tokens(out) == alone(model, ids, mask, max_new_tokens=12)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_propagated_keys_are_those_of_the_exit_state_in_every_layer_above(arch):
    model = AdaptiveModel(tiny_model(arch, layers=4), [2])
    loop = make_loop(
        model,
        Fidelity.THRESHOLD,
        kv_mode=KVMode.PROPAGATE,
        decide=lambda *_: True,
        max_new_tokens=3,
    )
    list(loop.run(prompts(5)))
    backbone = model.backbone
    # By hand: all layers for the prompt, then two layers, whose output the others project.
    with torch.inference_mode():
        cache = backbone.new_cache()
        ctx = backbone.context(0, 5, device="cpu")
        hidden = backbone.embed(prompts(5)[0].unsqueeze(0), ctx)
        backbone.run_layers(hidden, 0, 4, ctx, cache)
        ctx = backbone.context(5, 1, device="cpu")
        hidden = backbone.embed(torch.tensor([[loop.trace.tokens[0]]]), ctx)
        state = backbone.run_layers(hidden, 0, 2, ctx, cache)
        backbone.run_layers(state, 2, 3, ctx, cache)  # an ordinary pass writes the same keys
    for ours, expected in zip(loop.cache.states(2), cache.states(2), strict=True):
        torch.testing.assert_close(ours[:, :, :6], expected)
    assert loop.cache.lengths == [7] * 4


def test_layers_above_an_exit_decode_without_the_tokens_that_skipped_them(llama):
    exits = itertools.cycle([True, False])
    loop = make_loop(
        llama,
        Fidelity.THRESHOLD,
        kv_mode=KVMode.SKIP,
        decide=lambda *_: next(exits),
        max_new_tokens=3,
    )
    list(loop.run(prompts(5)))
    made = loop.trace.tokens
    assert loop.trace.exit_layers == [6, 2, 6]  # the second token exited at layer 2
    # By hand, without any mask: the token after it meets upper layers that hold the prompt only.
    backbone = llama.backbone
    cache = DynamicCache(config=llama.base.config)
    with torch.inference_mode():
        prompt = backbone.context(0, 5, device="cpu")
        hidden = backbone.embed(prompts(5)[0].unsqueeze(0), prompt)
        for layer in backbone.layers:
            hidden = layer(
                hidden, past_key_values=cache, position_embeddings=prompt.position_embeddings
            )
        for position, token, last in ((5, made[0], 2), (6, made[1], 6)):
            ctx = backbone.context(position, 1, device="cpu")
            hidden = backbone.embed(torch.tensor([[token]]), ctx)
            for layer in backbone.layers[:last]:
                hidden = layer(
                    hidden, past_key_values=cache, position_embeddings=ctx.position_embeddings
                )
    assert int(backbone.logits(hidden[:, -1]).argmax()) == made[2]


def test_lossy_modes_differ_from_defer_once_tokens_exit(llama):
    ids, mask = left_padded([4, 11, 7], seed=5)

    def made(mode: KVMode) -> list:
        script = itertools.cycle([True, True, False, False])
        out = together(
            llama,
            ids,
            mask,
            "threshold",
            decide=lambda *_: next(script),
            kv_mode=mode,
            max_new_tokens=30,
        )
        return tokens(out)

    deferred, propagated, skipped = (made(mode) for mode in KVMode)
    assert deferred != propagated
    assert deferred != skipped
    assert propagated != skipped


# -- processors, criteria, streamers ---------------------------------------------------------------


class Forbid(LogitsProcessor):
    """Forbids the token that came last; fails once a text is long enough, where asked to."""

    def __init__(self, fail_at: int | None = None):
        self.fail_at = fail_at

    def __call__(self, input_ids, scores):
        if self.fail_at is not None and input_ids.shape[1] >= self.fail_at:
            raise KeyError("no rule for this")
        return scores.scatter(1, input_ids[:, -1:], float("-inf"))


@pytest.mark.parametrize("fidelity", ["dense", "exact"])
def test_processors_get_every_sequence_as_from_transformers(llama, fidelity):
    ids, mask = left_padded([3, 9, 5])
    settings = {
        "attention_mask": mask,
        "max_new_tokens": NEW,
        "pad_token_id": 0,
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 3,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    stock = llama.base.generate(ids, logits_processor=[Forbid()], **settings)
    ours = llama.generate(
        ids,
        logits_processor=[Forbid()],
        fidelity=fidelity,
        thresholds=0.013,
        online=False,
        **settings,
    )
    assert torch.equal(ours.sequences, stock.sequences)
    assert len(ours.scores) == len(stock.scores) == NEW
    for step, expected in zip(ours.scores, stock.scores, strict=True):
        torch.testing.assert_close(step, expected.to(step.dtype), rtol=1e-4, atol=1e-4)


def test_a_failing_processor_names_its_sequence_and_changes_nothing_afterwards(llama):
    ids, mask = left_padded([3, 9, 5])
    before = llama.generate(ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0)
    with pytest.raises(DeliberateError, match=r"Forbid failed on sequence 0 .*no rule for this"):
        llama.generate(ids, attention_mask=mask, logits_processor=[Forbid(12)], max_new_tokens=NEW)
    after = llama.generate(ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0)
    assert torch.equal(before, after)


# -- quantised weights -----------------------------------------------------------------------------


class Int8Linear(torch.nn.Module):
    """A linear layer that keeps int8 weights with one scale per output channel."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.out_features = linear.out_features
        weight, scale = quantise(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, hidden):
        return hidden @ (self.weight.to(hidden.dtype) * self.scale[:, None].to(hidden.dtype)).T


def test_a_model_with_eight_bit_weights_decodes_exactly():
    base = tiny_model("llama", layers=6, dtype=torch.float32)
    for name, module in list(base.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parent = base.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Int8Linear(module))
    model = AdaptiveModel(base, [1, 2, 4])
    ids, mask = left_padded([3, 9, 5])
    expected = alone(model, ids, mask, max_new_tokens=NEW)
    out = together(model, ids, mask, thresholds=0.013, max_new_tokens=NEW)
    assert tokens(out) == expected
    assert sum(trace.rejected for trace in out.traces) > 0
    stock = base.generate(ids[1:2], max_new_tokens=NEW, do_sample=False)
    assert stock[0, 9:].tolist() == expected[1]
