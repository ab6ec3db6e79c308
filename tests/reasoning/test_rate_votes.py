"""Another chain under one rate: only where the first one wavered, and online as in the replay."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from synthetic_chains import LINE, synthetic_chains

from deliberate.eval.benchmarks.rate import problems_of
from deliberate.reasoning.answer_probes import same_text
from deliberate.reasoning.chain_calibration import fit_curves
from deliberate.reasoning.chain_output import ChainResult, ProbeRecord
from deliberate.reasoning.chain_walks import LookPlaces
from deliberate.reasoning.rate_replay import replay_rate
from deliberate.reasoning.rate_votes import chain_sign, fit_votes, run_of
from deliberate.reasoning.rated_rules import RatedVotes
from deliberate.reasoning.rates import fit_tables
from deliberate.reasoning.recorded_chains import ChainCosts, ChainSet, RecordingHeader
from deliberate.reasoning.votes import Ballot, tally

PLACES = LookPlaces(chunk=8, boundaries=("\n",))
SAMPLES = 4


def encode(text):
    return [LINE]


@pytest.fixture(scope="module")
def wavering():
    """Problems of two kinds: chains that never waver and are right, and chains whose end is a
    guess that their probes contradict, right in two of three."""
    random = np.random.default_rng(3)
    found = []
    for number, chain in enumerate(synthetic_chains(200 * SAMPLES, seed=4)):
        hard = (number // SAMPLES) % 2 == 1
        guess = "7" if random.random() < 0.67 else str(random.integers(20, 40))
        answer = guess if hard else "7"
        probes = tuple(
            dataclasses.replace(one, answer=str(50 + place) if hard else "7")
            for place, one in enumerate(chain.probes)
        )
        found.append(
            dataclasses.replace(
                chain,
                id=f"p{number // SAMPLES}",
                answer=answer,
                expected="7",
                sample=number % SAMPLES,
                probes=probes,
            )
        )
    chains = ChainSet(RecordingHeader(costs=ChainCosts(1.0, 2.0)), tuple(found))
    problems = problems_of([chains], PLACES, encode)
    calibration = fit_curves([one for p in problems for one in p.walks], PLACES)
    return problems, fit_tables(problems, calibration)


def test_the_sign_of_a_chain_is_how_it_came_to_its_answer():
    assert chain_sign(["4", "4", "4", "4"], "4", same_text) == (0, 3, True)
    assert chain_sign(["4", "5", "5"], None, same_text) == (1, 2, False)
    assert chain_sign(["4", "5", "4", "6"], "7", same_text) == (2, 0, True)
    assert chain_sign([], "7", same_text) == (0, 0, True)
    assert chain_sign(["", ""], None, same_text) == (0, 0, False)


def test_seconds_go_to_the_problems_whose_first_chain_wavered(wavering):
    problems, tables = wavering
    rate = 1e-4
    votes = fit_votes(problems, tables, rate, same_text)
    done = [replay_rate(p, tables, rate, same_text, votes=votes) for p in problems]
    sure, hard = done[::2], done[1::2]
    assert {one.chains for one in sure} == {1}
    assert np.mean([one.chains for one in hard]) > 2
    # The same number of chains for every problem gives less for more.
    mean = np.mean([one.seconds for one in done])
    all_alike = [replay_rate(p, tables, 0.0, same_text, votes=votes) for p in problems]
    assert mean < 0.75 * np.mean([one.seconds for one in all_alike])
    right, alone = (np.mean([one.right for one in own]) for own in (hard, problems_alone(wavering)))
    assert right > alone + 0.05


def problems_alone(wavering):
    """The hard problems by one chain each."""
    problems, tables = wavering
    return [replay_rate(p, tables, 1e-4, same_text) for p in problems[1::2]]


def test_a_vote_weighs_the_log_odds_of_chains_that_came_to_their_answer_so(wavering):
    problems, tables = wavering
    votes = fit_votes(problems, tables, 0.0, same_text)
    sure, guessed = votes.weigh((0, 3, True)), votes.weigh((2, 0, True))
    assert sure > 4.0 and guessed == pytest.approx(np.log(2), abs=0.35)
    assert votes.weigh(None) == votes.weigh((1, 1, False)) == votes.weight
    ballots = [Ballot("4", guessed), Ballot("4", guessed), Ballot("7", sure)]
    assert tally(ballots, same_text).winner == "7"
    plain = fit_votes(problems, tables, 0.0, same_text, length=False)
    assert not plain.weights and plain.weigh((0, 3, True)) == plain.weight


def test_further_chains_are_priced_as_the_same_rate_ends_them(wavering):
    problems, tables = wavering
    short = fit_votes(problems, tables, 1.0, same_text)
    whole = fit_votes(problems, tables, 1.0, same_text, length=False)
    ends = [run_of(p, 1, tables, 1.0, same_text, length=True).tokens for p in problems]
    assert np.mean(ends) < 40 and problems[0].walks[0].tokens == 80
    assert short.most == whole.most == SAMPLES and short.rates != whole.rates


def result_of(problem, number, tables, rate):
    """What the runner would give for a recorded chain."""
    walk = problem.walks[number]
    stop = tables.stop(walk, rate)
    looks = walk.looks if stop is None else walk.looks[: stop + 1]
    return ChainResult(
        answer=problem.answers[number] if stop is None else looks[-1].answer,
        stopped=None if stop is None else "worth too little",
        probes=[ProbeRecord(one.at, one.answer, one.confidence, one.tokens) for one in looks],
    )


@pytest.mark.parametrize("rate", [1e-4, 2e-3])
def test_as_many_chains_are_sampled_while_decoding_as_in_the_replay(wavering, rate):
    problems, tables = wavering
    votes = fit_votes(problems, tables, rate, same_text)
    rule = RatedVotes(votes, rate, str, same_text)
    for problem in problems[:24]:
        chains, ballots = [], []
        while rule.wanted(ballots, same_text):
            chains.append(result_of(problem, len(chains), tables, rate))
            weights = rule.weights(chains)
            ballots = [Ballot(one.answer, w) for one, w in zip(chains, weights, strict=True)]
        spent = replay_rate(problem, tables, rate, same_text, votes=votes)
        assert len(ballots) == spent.chains
        assert (tally(ballots, same_text).winner == "7") == spent.right


def test_chains_that_are_not_probed_weigh_alike(wavering):
    problems, tables = wavering
    votes = fit_votes(problems, tables, 0.0, same_text, length=False)
    rule = RatedVotes(votes, 0.0, str, same_text, probed=False)
    assert rule.weights([result_of(p, 0, tables, 0.0) for p in problems[:3]]) == 3 * [votes.weight]
    assert rule.watch([]) is None and rule.most == SAMPLES
