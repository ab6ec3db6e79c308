"""Ragged batches: every sequence decodes as it would alone, whatever its neighbours do."""

from __future__ import annotations

import itertools

import pytest
import torch
from batch_decoding import NEW, alone, together, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, VOCAB, left_padded, random_ids, tiny_model
from transformers import LogitsProcessor

from deliberate.api.model import AdaptiveModel
from deliberate.engine.scheduler import DeepSchedule
from deliberate.kernels.ops.int8_linear import quantise
from deliberate.modeling.exit_config import ExitConfig
from deliberate.utils.errors import DeliberateError


@pytest.fixture(scope="module")
def llama() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=6), [1, 2, 4])


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
