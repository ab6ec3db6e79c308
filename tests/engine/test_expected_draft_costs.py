"""Before drafts beside other sequences were measured: what they are expected to cost decides."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.draft_lengths import DraftLengths, DraftPrior
from deliberate.engine.ngram_drafts import NgramDrafts
from deliberate.engine.proposed_drafts import ProposedDrafts
from deliberate.engine.request import Request
from deliberate.engine.segment_runner import SegmentRunner
from deliberate.engine.spec import DecodingSpec

TEXT = [7, 3, 11, 5, 9] * 3


@pytest.mark.parametrize(("share", "drafts"), [(0.1, 2), (0.4, 1), (0.9, 0)])
def test_looked_up_drafts_are_as_many_as_their_expected_cost_allows(share, drafts):
    made = NgramDrafts(4)
    made.expect_token(share)
    assert len(made.propose(TEXT, 8)) == drafts


def test_what_was_measured_counts_more_than_what_was_expected():
    made = NgramDrafts(4)
    made.note_single(1.0)
    for _ in range(20):
        made.learn(2, 2, 1.02)
    made.expect_token(0.9)
    assert len(made.propose(TEXT, 8)) >= 2


def test_a_layer_whose_drafts_are_expected_to_lose_is_tried_more_and_more_rarely_beside_others():
    lengths = DraftLengths(DraftPrior(), 4).of_load(8)
    lengths.note_single(1.0)
    lengths.expect_token(0.9)
    tried = [turn for turn in range(1, 2000) if lengths.begin()]
    assert tried == [128, 384, 896, 1920]
    lengths.expect_token(0.1)  # it pays now
    assert lengths.begin()
    lengths.expect_token(0.9)
    assert [turn for turn in range(1, 300) if lengths.begin()] == [128]


def test_a_lone_sequence_tries_a_layer_that_loses_every_16_passes():
    lengths = DraftLengths(DraftPrior(draft_cost=2.0), 4)
    lengths.note_single(1.0)
    assert [turn for turn in range(1, 65) if lengths.begin()] == [16, 32, 48, 64]


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=4, dtype=torch.float32), [1, 2])


def drafted(model: AdaptiveModel, monkeypatch, seconds: float) -> list[int]:
    """Drafts of the first passes beside others, where a token of a prefill takes so long."""
    counts: list[int] = []
    drafts_of = ProposedDrafts._drafts_of

    def noted(self, rows, own, single):
        made = drafts_of(self, rows, own, None if single is None else 1e-3 * len(rows))
        if single is not None and len(rows) > 1:
            counts.append(sum(map(len, made)))
        return made

    monkeypatch.setattr(ProposedDrafts, "_drafts_of", noted)
    monkeypatch.setattr(NgramDrafts, "_match", lambda self, ids: [1, 2, 3, 4])
    monkeypatch.setattr(SegmentRunner, "token_seconds", seconds)
    spec = DecodingSpec(gate=False, fidelity="exact", lookup_tokens=4)
    engine = model.engine(max_running=4)
    for turn in range(4):
        prompt = [*random_ids(3, seed=turn)[0].tolist(), *TEXT]
        engine.add(Request(prompt, 30, spec=spec, end_tokens=()))
    while engine.unfinished and len(counts) < 6:
        engine.step()
    return counts


def test_requests_that_share_passes_draft_at_once_only_where_a_further_token_is_cheap(
    model, monkeypatch
):
    with monkeypatch.context() as patch:
        assert drafted(model, patch, 0.05e-3)[0] > 0
    with monkeypatch.context() as patch:
        assert sum(drafted(model, patch, 0.9e-3)) == 0


def test_a_prefill_tells_what_a_token_takes(model):
    engine = model.engine(max_running=2)
    runner = engine._runner
    assert runner.token_seconds is None
    spec = DecodingSpec(gate=False, fidelity="dense")
    engine.add(Request(random_ids(6)[0], 2, spec=spec, end_tokens=()))
    engine.step()
    assert runner.token_seconds is None  # too few tokens to say
    engine.add(Request(random_ids(40)[0], 2, spec=spec, end_tokens=()))
    while engine.unfinished:
        engine.step()
    assert runner.token_seconds > 0
