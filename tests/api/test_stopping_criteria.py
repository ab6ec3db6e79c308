"""Stopping criteria see what transformers shows them: every row, every step, the scores."""

from __future__ import annotations

import pytest
import torch
from ragged_batches import LENGTHS, OWN, ragged_batch, ragged_model
from tiny_models import random_ids
from transformers import MaxLengthCriteria, MaxTimeCriteria, StoppingCriteria
from transformers.generation import stopping_criteria

from deliberate.api import stopping_criteria as stopping
from deliberate.api.model import AdaptiveModel
from deliberate.utils.errors import DeliberateError

NEW = 14


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return ragged_model()


@pytest.fixture(scope="module")
def batch():
    return ragged_batch()


class ByRow(StoppingCriteria):
    """Row r may make limits[r] tokens."""

    def __init__(self, width, limits):
        self.width, self.limits, self.shapes = width, torch.tensor(limits), []

    def __call__(self, input_ids, scores, **kwargs):
        self.shapes.append(tuple(input_ids.shape))
        return input_ids.shape[1] - self.width >= self.limits


class ByScores(StoppingCriteria):
    """Stops a row where the last token's score was low; keeps what it saw."""

    def __init__(self, below):
        self.below, self.seen = below, []

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is not None, "no scores were handed over"
        self.seen.append(scores)
        last = scores[-1].gather(1, input_ids[:, -1:])[:, 0]
        return last < self.below


class AnyRow(StoppingCriteria):
    """Stops the whole batch, by one bool, where any row chose one of these tokens."""

    def __init__(self, tokens):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids, scores, **kwargs):
        return bool(torch.isin(input_ids[:, -1], self.tokens).any())


def stopped(model, batch, fidelity, criterion, **settings):
    own = {} if fidelity is None else OWN | {"fidelity": fidelity}
    generate = model.base.generate if fidelity is None else model.generate
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | settings
    return generate(**batch, stopping_criteria=[criterion], **own, **settings)


@pytest.mark.parametrize("fidelity", ["dense", "exact", "threshold"])
def test_a_criterion_that_looks_at_the_row_index_is_obeyed_for_every_row(model, batch, fidelity):
    width, limits = batch["inputs"].shape[1], [4, 9, 2, 30]
    seen = ByRow(width, limits)
    out = stopped(model, batch, fidelity, seen, return_dict_in_generate=True)
    assert [len(trace.tokens) for trace in out.traces] == [4, 9, 2, NEW]
    # Called once a step, with every row, as transformers does.
    assert seen.shapes == [(len(LENGTHS), width + step + 1) for step in range(NEW)]
    free = model.generate(**batch, fidelity=fidelity, max_new_tokens=NEW, pad_token_id=0, **OWN)
    for row, limit in enumerate(limits):
        made = min(limit, NEW)
        assert torch.equal(out.sequences[row, width:][:made], free[row, width:][:made])
        assert not out.sequences[row, width + made :].any()


@pytest.mark.parametrize("fidelity", ["dense", "exact"])
def test_criteria_get_the_scores_that_transformers_gives_them(model, batch, fidelity):
    scored = {"output_scores": True, "return_dict_in_generate": True}
    expected, own = ByScores(-1e9), ByScores(-1e9)
    stopped(model, batch, None, expected, **scored)
    stopped(model, batch, fidelity, own, **scored)
    assert [len(scores) for scores in own.seen] == list(range(1, NEW + 1))
    for ours, theirs in zip(own.seen[-1], expected.seen[-1], strict=True):
        assert not ours.is_inference()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    # Without output_scores there are none, there as here.
    with pytest.raises(DeliberateError, match=r"ByScores failed at generated token 1: Assertion"):
        stopped(model, batch, fidelity, ByScores(0.0))


@pytest.mark.parametrize("fidelity", ["dense", "exact"])
def test_a_criterion_on_scores_stops_where_it_stops_transformers(model, fidelity):
    prompt = {"inputs": random_ids(6, seed=4)}
    scored = {"output_scores": True, "return_dict_in_generate": True}
    free = stopped(model, prompt, None, ByScores(-1e9), **scored)
    best = [scores.max().item() for scores in free.scores]
    below = sorted(best)[2] + 1e-6
    stock = stopped(model, prompt, None, ByScores(below), **scored)
    out = stopped(model, prompt, fidelity, ByScores(below), **scored)
    assert torch.equal(out.sequences, stock.sequences)
    assert 6 < out.sequences.shape[1] < 6 + NEW


@pytest.mark.parametrize("fidelity", ["dense", "exact"])
def test_a_criterion_over_the_whole_batch_stops_all_rows_at_one_step(model, batch, fidelity):
    free = stopped(model, batch, None, AnyRow([-1]))
    target = [int(free[2, batch["inputs"].shape[1] + 6])]
    stock = stopped(model, batch, None, AnyRow(target))
    out = stopped(model, batch, fidelity, AnyRow(target))
    assert stock.shape[1] < free.shape[1]
    assert torch.equal(out, stock)


def test_criteria_of_transformers_and_others_stop_together(model, batch):
    width = batch["inputs"].shape[1]
    for fidelity in ("dense", "exact"):
        out = model.generate(
            **batch,
            fidelity=fidelity,
            max_new_tokens=NEW,
            pad_token_id=0,
            stopping_criteria=[MaxLengthCriteria(width + 5), ByRow(width, [2, 9, 8, 3])],
            return_dict_in_generate=True,
            **OWN,
        )
        assert [len(trace.tokens) for trace in out.traces] == [2, 5, 5, 3]
    out = stopped(model, batch, "exact", MaxTimeCriteria(0.0, initial_timestamp=0.0))
    assert out.shape[1] == width + 1


def test_only_transformers_own_criteria_are_taken_to_look_at_one_row():
    for name in stopping._ROW_ALONE:
        assert hasattr(stopping_criteria, name), "renamed in transformers?"

    class Derived(MaxLengthCriteria):
        pass

    assert stopping._looks_at_one_row(MaxLengthCriteria(3))
    assert not stopping._looks_at_one_row(Derived(3))


def test_a_verdict_that_fits_no_batch_is_refused_by_name(model, batch):
    class ThreeVerdicts(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.zeros(3, dtype=torch.bool)

    with pytest.raises(DeliberateError, match="ThreeVerdicts gave 3 verdicts for 4 sequences"):
        stopped(model, batch, "exact", ThreeVerdicts())
