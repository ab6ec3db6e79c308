"""Votes by confidence: weak chains are ended early, in windows that are shares of their length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.sampler import TokenChooser
from deliberate.reasoning.answer_probes import same_text
from deliberate.reasoning.chain_confidence import (
    OWN,
    ConfidenceWatch,
    WatchedConstraint,
    weakest_window,
)
from deliberate.reasoning.chain_output import ChainResult
from deliberate.reasoning.chain_runner import ChainRunner
from deliberate.reasoning.marks import ReasoningMarks
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.token_budget import BudgetSettings, ReasoningConstraint
from deliberate.reasoning.vote_runner import run_votes
from deliberate.reasoning.votes import Ballot, ConfidenceVotes, DecidedVotes
from deliberate.utils.errors import DeliberateError

MARKS = ReasoningMarks(closing=(2,))


@given(st.lists(st.floats(0, 9), min_size=1, max_size=40), st.integers(1, 50))
def test_the_weakest_window_is_the_lowest_mean(values, window):
    size = min(window, len(values))
    means = [sum(values[i : i + size]) / size for i in range(len(values) - size + 1)]
    assert weakest_window(values, window) == pytest.approx(min(means), abs=1e-9)
    watch = ConfidenceWatch(window=window, least=5.0)
    weak = len(values) >= window and sum(values[-window:]) / window < 5.0
    assert watch.weak(values) == weak


def test_the_confidence_is_that_of_the_scores_and_follows_rollbacks():
    inner = ReasoningConstraint(BudgetSettings(8, 2, answer=1), MARKS, end_tokens=[3])
    watched = WatchedConstraint(inner, top=2)
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    masked = watched.mask(scores)
    assert masked[3] == float("-inf")
    watched.advance(4)
    best = torch.log_softmax(scores, -1).topk(2).values.mean()
    assert watched.confidences == [pytest.approx(-float(best))]
    watched.mask(2 * scores)
    watched.advance(4)
    watched.rollback(1)
    assert len(watched.confidences) == 1 and watched.forced() == []
    watched.mask(scores)
    watched.advance(4)
    assert watched.forced() == [2]  # the budget of the inner one
    watched.advance(2)
    assert watched.confidences[2] == watched.confidences[1]


def test_a_token_s_own_log_probability_is_that_before_the_mask():
    inner = ReasoningConstraint(BudgetSettings(8, 1, answer=1), MARKS, end_tokens=[3])
    watched = WatchedConstraint(inner, top=OWN)
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    watched.mask(scores)
    expected = float(torch.log_softmax(scores, -1)[4])
    scores.zero_()  # the executor writes the next logits into the same memory
    watched.advance(4)
    assert watched.confidences == [pytest.approx(expected)]
    assert watched.forced() == [2]
    watched.advance(2)
    assert watched.confidences[1] == 0.0  # forced: certain


@pytest.fixture(scope="module")
def runner() -> ChainRunner:
    model = AdaptiveModel(tiny_model("llama"), executor="generic")
    return ChainRunner(
        model.engine(max_running=8), MARKS, lambda ids: " ".join(map(str, ids)), end_tokens=[3]
    )


def request(seed, watch=None):
    ids = random_ids(6, seed=1)[0].tolist()
    return ChainRequest(
        ids,
        BudgetSettings(34, 30, answer=1),
        sampling=lambda start: TokenChooser(sample=True, seed=1000 * seed + start),
        watch=watch,
    )


def test_watching_changes_no_token_and_a_weak_chain_ends_at_its_weak_window(runner):
    for seed in range(6):
        (plain,) = runner.run([request(seed)])
        (watched,) = runner.run([request(seed, ConfidenceWatch(top=5, window=4))])
        assert watched.tokens == plain.tokens and not watched.killed
        made = watched.confidences
        assert len(made) == len(watched.tokens)
        reasoning = made[: watched.reasoning_tokens]
        if len(reasoning) < 8:
            continue
        least = weakest_window(reasoning[:-1], 4) + 1e-6
        (killed,) = runner.run([request(seed, ConfidenceWatch(top=5, window=4, least=least))])
        place = len(killed.tokens)
        assert killed.killed and killed.answer == "" and place < len(plain.tokens)
        assert killed.tokens == plain.tokens[:place]
        assert sum(made[place - 4 : place]) / 4 < least


def chain(length, confidence, answer="7"):
    return ChainResult(
        tokens=[0] * length,
        reasoning_tokens=length,
        answer=answer,
        confidences=[confidence] * length,
    )


def test_the_window_is_a_share_of_the_chains_length_and_the_limit_of_their_confidence():
    rule = ConfidenceVotes(warm_up=3, keep=0.5, window=0.25)
    assert rule.watch([]).least is None
    done = [chain(40, 2.0), chain(20, 1.0), chain(400, 3.0)]
    watch = rule.watch(done)
    assert (watch.window, watch.least) == (10, 2.0)
    assert ConfidenceVotes(warm_up=3, keep=1.0).watch(done).least == 1.0
    assert rule.weights(done) == [2.0, 1.0, 3.0]


def test_the_vote_ends_when_one_answer_has_most_of_the_weight():
    rule = ConfidenceVotes(most=8, warm_up=2, consensus=0.8, at_a_time=3)
    assert rule.wanted([], same_text) == 2
    assert rule.wanted([Ballot("7", 4.0), Ballot("8", 1.0)], same_text) == 0
    assert rule.wanted([Ballot("7", 1.0), Ballot("8", 1.0)], same_text) == 3
    assert rule.wanted([Ballot("7", 1.0), Ballot("8", 1.0)] * 4, same_text) == 0


def test_a_vote_by_confidence_ends_weak_chains_and_counts_their_tokens(runner):
    rule = ConfidenceVotes(most=12, warm_up=4, keep=0.5, window=0.2, consensus=1.0, top=5)
    done = run_votes(runner, lambda number: request(number), rule)
    assert len(done.chains) == 12
    assert not any(one.killed for one in done.chains[:4])
    killed = [one for one in done.chains if one.killed]
    assert killed
    assert sum(done.tally.counts) <= 12 - len(killed)
    assert done.tokens == sum(len(one.tokens) for one in done.chains)
    few = run_votes(runner, lambda number: request(number), rule, max_tokens=34 * 5)
    assert few.over_budget and few.tokens <= 34 * 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keep": 0.0}, "keep=0.0"),
        ({"window": 1.5}, "window=1.5"),
        ({"consensus": 0.5}, "consensus=0.5"),
        ({"most": 2}, "most=2"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, words):
    with pytest.raises(DeliberateError, match=words):
        ConfidenceVotes(**change)


def test_decided_votes_weigh_the_least_likely_token_and_stop_when_hopeless(runner):
    done = run_votes(runner, request, DecidedVotes(most=8))
    assert len(done.chains) == 3  # a random model never answers alike
    least = [min(one.confidences) for one in done.chains]
    assert all(low < 0.0 for low in least)
    best = max(zip(least, done.chains, strict=True), key=lambda pair: pair[0])[1]
    assert done.answer == best.answer
    plain = run_votes(runner, request, DecidedVotes(most=8, weigh=False))
    assert plain.answer == plain.chains[0].answer and not plain.chains[0].confidences
