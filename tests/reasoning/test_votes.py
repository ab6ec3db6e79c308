"""Votes: when a group has enough chains, and which answer wins."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.reasoning.answer_probes import same_text
from deliberate.reasoning.votes import (
    VOTE_RULES,
    AdaptiveConsistency,
    Ballot,
    ConfidenceVotes,
    DecidedVotes,
    EarlyStopWindows,
    FixedVotes,
    lead_probability,
    tally,
)
from deliberate.utils.errors import DeliberateError

answers_of = st.lists(st.sampled_from(["7", "8", "9", ""]), max_size=60)


def sampled(rule, answers):
    """How many of these answers the rule samples."""
    ballots = []
    while more := rule.wanted(ballots, same_text):
        assert more > 0
        ballots += [Ballot(a) for a in answers[len(ballots) : len(ballots) + more]]
    return len(ballots)


@pytest.mark.parametrize(
    ("answers", "count"),
    [
        (["7"] * 40, 4),  # unanimous
        (["7", "8"] + ["7"] * 40, 7),
        (["7", "8"] * 20, 40),  # never ahead
        ([""] * 40, 40),  # no answer at all
    ],
)
def test_adaptive_consistency_stops_when_the_lead_is_sure(answers, count):
    assert sampled(AdaptiveConsistency(), answers) == count


def test_the_lead_probability_is_that_of_the_beta_distribution():
    assert lead_probability(4, 0) == pytest.approx(1 - 0.5**5)
    assert lead_probability(3, 3) == 0.5
    # P(p > 1/2) under Beta(6, 3), by integrating its density.
    steps = 20_000
    density = [((i + 0.5) / steps) ** 5 * (1 - (i + 0.5) / steps) ** 2 for i in range(steps)]
    upper = math.fsum(density[steps // 2 :]) / math.fsum(density)
    assert lead_probability(5, 2) == pytest.approx(upper, abs=1e-6)


@pytest.mark.parametrize(
    ("answers", "count"),
    [(["7"] * 40, 4), (["7", "7", "8", "7"] + ["7"] * 36, 8), (["7", "8"] * 20, 40)],
)
def test_windows_stop_after_one_that_is_unanimous(answers, count):
    assert sampled(EarlyStopWindows(), answers) == count


@settings(deadline=None)
@given(answers_of, st.sampled_from(sorted(VOTE_RULES)), st.integers(1, 5))
def test_no_rule_samples_more_than_its_most_and_every_vote_ends(answers, name, size):
    rules = {
        "fixed": FixedVotes(8),
        "adaptive": AdaptiveConsistency(most=8, at_a_time=size),
        "windows": EarlyStopWindows(window=max(2, size), most=8),
        "confidence": ConfidenceVotes(most=8, warm_up=size),
        "decided": DecidedVotes(most=8, first=size, at_a_time=size),
    }
    assert 1 <= sampled(rules[name], [*answers, *["7"] * 60]) <= 8


@pytest.mark.parametrize(
    ("answers", "count"),
    [
        (["7"] * 16, 3),  # unanimous
        (["7", "8", "9", ""] * 4, 3),  # no answer will have most of them
        (["7", "7", "8", "9"] + ["7"] * 12, 8),  # open after three, ahead after eight
        (["7", "7", "8"] + ["9", "8", "", "1", "2"] * 3, 8),  # open after three, hopeless after
        (["7", "8"] * 8, 16),  # neither
    ],
)
def test_a_vote_ends_when_it_is_decided_or_hopeless(answers, count):
    assert sampled(DecidedVotes(), answers) == count


def test_a_vote_ends_when_the_second_cannot_catch_up():
    open_until = DecidedVotes(probability=0.999, hopeless=0.0, most=6, first=2, at_a_time=2)
    assert sampled(open_until, ["7"] * 6) == 4
    assert sampled(open_until, ["7", "7", "7", "8", "8", "8"]) == 6


@settings(deadline=None)
@given(st.lists(st.sampled_from(["7", "8", "9", ""]), min_size=16, max_size=16))
def test_without_giving_up_the_decided_vote_is_no_shorter(answers):
    given_up = sampled(DecidedVotes(), answers)
    assert given_up <= sampled(DecidedVotes(hopeless=0.0), answers)


@settings(deadline=None)
@given(answers_of)
def test_the_winner_is_a_most_frequent_answer_that_is_not_empty(answers):
    counted = tally([Ballot(a) for a in answers])
    given_ = [a for a in answers if a]
    if not given_:
        assert counted.winner == "" and counted.counts == ()
        return
    assert given_.count(counted.winner) == max(map(given_.count, given_))
    assert sum(counted.counts) == len(given_)


def test_votes_are_weighed_and_equal_answers_are_one():
    ballots = [Ballot("0.5", 1.0), Ballot("8", 2.5), Ballot(".50", 1.0)]
    assert tally(ballots).winner == "8"
    same = lambda one, other: float(one) == float(other)  # noqa: E731
    assert tally(ballots, same).counts == (1, 2)
    assert tally([Ballot("8", 1.5), *ballots[::2]], same).winner == "0.5"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdaptiveConsistency(probability=1.0), r"probability=1.0 must be in \(0.5, 1\)"),
        (lambda: AdaptiveConsistency(most=0), "most=0"),
        (lambda: EarlyStopWindows(window=1), "window=1"),
        (lambda: EarlyStopWindows(window=8, most=4), "most=4"),
        (lambda: FixedVotes(0), "most=0"),
        (lambda: DecidedVotes(probability=0.4), r"probability=0.4 must be in \(0.5, 1\)"),
        (lambda: DecidedVotes(hopeless=0.5), r"hopeless=0.5 must be in \[0, 0.5\)"),
        (lambda: DecidedVotes(first=0), "first=0"),
        (lambda: Ballot("1", 0.0), "weight 0.0 of a vote must be above 0"),
    ],
)
def test_rules_that_cannot_work_are_refused(make, words):
    with pytest.raises(DeliberateError, match=words):
        make()
