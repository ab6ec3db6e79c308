"""One rate: what it buys rises as it falls, probes are charged, and online is what is replayed."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_chains import LINE, synthetic_chains

from deliberate.eval.benchmarks import rate
from deliberate.eval.benchmarks.rate import compare, problems_of
from deliberate.eval.benchmarks.rate_choice import UNANSWERED, Choice, Setting, choose
from deliberate.eval.benchmarks.settings import run_benchmark
from deliberate.reasoning.answer_probes import same_text
from deliberate.reasoning.chain_calibration import fit_curves
from deliberate.reasoning.chain_replay import replay
from deliberate.reasoning.chain_walks import LookPlaces
from deliberate.reasoning.rate_replay import Spent, replay_rate
from deliberate.reasoning.rate_votes import fit_votes
from deliberate.reasoning.rated_rules import RatedChain
from deliberate.reasoning.rates import fit_tables, rate_for
from deliberate.reasoning.recorded_chains import ChainCosts, ChainSet, RecordingHeader
from deliberate.utils.errors import DeliberateError

PLACES = LookPlaces(chunk=8, boundaries=("\n",))
COSTS = ChainCosts(token=1.0, probe=2.0)
SAMPLES = 5


def encode(text):
    return [LINE]


@pytest.fixture(scope="module")
def chains() -> ChainSet:
    """Several chains a problem, of which some end wrong, each in its own way."""
    random = np.random.default_rng(5)
    found = []
    for number, chain in enumerate(synthetic_chains(120 * SAMPLES, seed=6)):
        answer = "7" if random.random() < 0.6 else str(random.integers(20, 30))
        probes = [
            type(p)(p.at, answer if p.answer == "7" else p.answer, p.confidence, p.tokens)
            for p in chain.probes
        ]
        found.append(
            type(chain)(
                f"p{number // SAMPLES}",
                answer,
                "7",
                chain.tokens,
                answer_tokens=3,
                sample=number % SAMPLES,
                probes=tuple(probes),
            )
        )
    return ChainSet(RecordingHeader(costs=COSTS), tuple(found))


@pytest.fixture(scope="module")
def fitted(chains):
    problems = problems_of([chains], PLACES, encode)
    calibration = fit_curves([one for p in problems for one in p.walks], PLACES)
    return problems, fit_tables(problems, calibration)


def test_a_lower_price_never_spends_less_and_buys_right_answers(fitted):
    problems, tables = fitted
    spent = []
    for least_rate in (10.0, 0.01, 0.003, 0.001, 0.0):
        votes = fit_votes(problems, tables, least_rate, same_text)
        done = [replay_rate(p, tables, least_rate, same_text, votes=votes) for p in problems]
        spent.append((np.mean([d.seconds for d in done]), np.mean([d.right for d in done])))
    seconds, right = zip(*spent, strict=True)
    assert list(seconds) == sorted(seconds) and seconds[0] < seconds[-1] / 3
    assert right[-1] > right[0] + 0.1


def test_probes_are_charged_where_the_length_draws_on_the_price(fitted):
    problems, tables = fitted
    with_ = replay_rate(problems[0], tables, 0.0, same_text)
    without = replay_rate(problems[0], tables, 0.0, same_text, length=False)
    looks = problems[0].walks[0].looks
    assert with_.seconds - without.seconds == sum(2.0 + look.tokens for look in looks)
    assert with_.tokens == without.tokens and with_.chains == 1


def test_a_chain_stops_while_decoding_where_the_replay_stops(chains, fitted):
    problems, tables = fitted
    for least_rate in (0.02, 0.004):
        for number in range(20):
            chain = chains.chains[number * SAMPLES]
            policy = RatedChain(tables, least_rate, encode, same_text)
            spent = replay_rate(problems[number], tables, least_rate, same_text)
            assert replay(policy, chain).tokens == spent.tokens


def test_a_budget_of_seconds_is_turned_into_the_price_that_is_right_most_often():
    assert rate_for(2.0, [1.0, 0.1, 0.0], [1.0, 2.0, 3.0], [0.5, 0.7, 0.9]) == 0.1
    assert rate_for(0.5, [1.0, 0.1], [1.0, 2.0], [0.5, 0.7]) is None
    with pytest.raises(DeliberateError, match="needs recorded chains"):
        fit_tables([], None)


def test_every_variant_is_compared_at_every_budget(chains, tmp_path, capsys):
    rows = compare([chains], PLACES, encode, 3).rows
    names = {row.name for row in rows}
    assert {"one rate", "length alone", "chains alone", "fixed length", "fixed chains"} == names
    assert all(row.seconds < 1.4 * row.budget for row in rows if row.name == "one rate")
    path = tmp_path / "chains.jsonl"
    chains.save(path)
    given = [f"chains={path}", "model=tiny", "places.boundaries=[]", "places.chunk=8"]
    run_benchmark(["rate", *given, "budgets=2", f"out={tmp_path / 'out'}"])
    assert "one rate against it" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "out" / "rate.svg").read_text()
    with pytest.raises(DeliberateError, match="chains= is missing"):
        run_benchmark(["rate", "model=tiny"])


def at_depth(chains: ChainSet, fidelity: str, token: float, *, greedy: bool = False) -> ChainSet:
    """The chains as another fidelity would have decoded them, at another time of a token."""
    conditions = {"sampling": "greedy" if greedy else "temperature 0.7"}
    header = RecordingHeader(costs=ChainCosts(token, 2.0), fidelity=fidelity, conditions=conditions)
    own = [one for one in chains.chains if one.sample == 0] if greedy else chains.chains
    return ChainSet(header, tuple(own))


def test_depth_draws_on_the_rate_and_no_level_alone_does_better(chains):
    greedy = at_depth(chains, "dense", 0.5, greedy=True)
    files = [at_depth(chains, "dense", 1.0), greedy, at_depth(chains, "exact", 0.25, greedy=True)]
    found = compare(files, PLACES, encode, 6)
    one = {row.budget: row for row in found.rows if row.name == "one rate"}
    assert len(one) == 6 and sum("exact" in row.setting for row in one.values()) >= 4
    levels = {"depth alone", "length alone", "chains alone"}
    others = [row for row in found.rows if row.name in levels]
    assert {row.name for row in others} == levels
    assert all(row.versus.interval.high >= 0 for row in others)
    assert sum(row.versus.interval.low > 0 for row in others if row.name != "depth alone") >= 3


def test_chains_of_a_problem_are_greedy_first_and_each_has_its_own_costs(chains):
    files = [at_depth(chains, "dense", 1.0), at_depth(chains, "dense", 0.5, greedy=True)]
    first = problems_of(files, PLACES, encode)[0]
    assert [one.token for one in first.costs] == [0.5] + SAMPLES * [1.0]
    own = replay_rate(first, None, 0.0, same_text, length=False)
    assert own.seconds == 0.5 * first.walks[0].tokens
    other = at_depth(chains, "dense", 1.0)
    short = ChainSet(other.header, other.chains[SAMPLES:])
    with pytest.raises(DeliberateError, match="different problems"):
        problems_of([files[0], short], PLACES, encode)
    with pytest.raises(DeliberateError, match="one of each for every chain"):
        type(first)("7", first.walks, first.answers, first.costs[:1])


def test_a_budget_between_two_settings_is_met_by_a_share_of_the_problems():
    cheap, dear = [Spent(False, 1.0, 1, 9)] * 100, [Spent(True, 3.0, 1, 9)] * 100
    settings = [
        Setting("cheap", lambda problem: cheap[0]),
        Setting("dear", lambda problem: dear[0]),
    ]
    assert choose(0.5, settings, [cheap, dear]) is None
    choice = choose(1.6, settings, [cheap, dear])
    done = choice.spend([{}] * 100)
    assert choice.share == pytest.approx(0.3) and choice.name == "cheap; 30% dear"
    assert sum(one.right for one in done) == pytest.approx(30, abs=1)
    assert np.mean([one.seconds for one in done]) == pytest.approx(1.6, abs=0.05)
    assert choose(3.0, settings, [cheap, dear]).name == "dear"
    # A setting that is dearer and no better is never mixed in.
    assert choose(1.6, settings, [cheap, [Spent(False, 3.0, 1, 9)] * 100]).dearer is None


def test_a_level_alone_that_fits_no_budget_so_small_answers_a_share_of_the_problems(chains):
    files = [at_depth(chains, "dense", 1.0, greedy=True)]
    files.append(at_depth(chains, "exact", 0.25, greedy=True))
    rows = compare(files, PLACES, encode, 4).rows
    first = {row.name: row for row in rows if row.budget == rows[0].budget}
    depth = first["depth alone"]
    assert depth.setting.startswith("unanswered") and 0.0 < depth.chains < 1.0
    assert 0.0 < depth.right < depth.chains and depth.seconds < 1.5 * depth.budget
    assert depth.versus.difference == pytest.approx(first["one rate"].right - depth.right)
    done = choose(1.0, [UNANSWERED], [[UNANSWERED.play({})]]).spend([{}])
    assert not done[0].right and done[0].seconds == 0.0


def test_a_rated_chain_says_when_it_is_not_due(fitted):
    _, tables = fitted
    policy = RatedChain(tables, 0.0, encode, same_text)
    tokens = [LINE] * 40
    quiet = policy.quiet(tokens[:1])
    assert quiet.count == PLACES.chunk - 2 and quiet.ends == {LINE}
    assert not any(policy.due(tokens[:size]) for size in range(2, 2 + quiet.count))
    assert policy.due(tokens[: 2 + quiet.count])


def test_each_half_of_the_problems_is_judged_by_what_the_other_one_chose(chains, monkeypatch):
    fitted_on, played = [], []
    fit, spend = rate.fit_tables, Choice.spend
    monkeypatch.setattr(
        rate, "fit_tables", lambda own, curves: fitted_on.append(own) or fit(own, curves)
    )
    monkeypatch.setattr(
        Choice, "spend", lambda own, problems: played.append(problems) or spend(own, problems)
    )
    rows = compare([at_depth(chains, "dense", 1.0)], PLACES, encode, 2).rows
    first, second = fitted_on
    assert len(first) + len(second) == 120
    judged = [[one["dense"] for one in own] for own in played]
    assert judged[0] == second and judged[1] == first
    assert all(row.right * 120 == pytest.approx(round(row.right * 120)) for row in rows)
