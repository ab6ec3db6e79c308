"""Replay: a rule stops on a recorded chain where it stops on the same chain while it is decoded."""

from __future__ import annotations

import pytest
from synthetic_chains import LINE, synthetic_chains
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.reasoning.answer_probes import AnswerProbes, AnswerProbeSettings
from deliberate.reasoning.chain_output import ChainTokens
from deliberate.reasoning.chain_recorder import (
    RecordProbes,
    SpacedProbes,
    measure_costs,
    recorded,
)
from deliberate.reasoning.chain_replay import matched_length, replay, replay_rule
from deliberate.reasoning.chain_runner import ChainRunner
from deliberate.reasoning.fixed_length import FixedLength, FixedLengthSettings
from deliberate.reasoning.marks import ReasoningMarks
from deliberate.reasoning.recorded_chains import ChainCosts, ProbePlaces, RecordedChain
from deliberate.reasoning.registry import chain_policy
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.stop_policy import Continue, Force, Probe, Trial
from deliberate.reasoning.token_budget import BudgetSettings
from deliberate.reasoning.trial_answers import TrialAnswers, TrialAnswerSettings
from deliberate.utils.errors import DeliberateError

CLOSE, END, BLANK = 2, 3, 4
MARKS = ReasoningMarks(closing=(CLOSE,), answer=(7,))
PLACES = ProbePlaces(chunk=4, boundaries=(), switches=("11", "12", "13"), answer_tokens=2)


def words(tokens):
    return " ".join(map(str, tokens))


def encode(text):
    return [int(word) for word in text.split()]


@pytest.fixture(scope="module")
def runner() -> ChainRunner:
    model = AdaptiveModel(tiny_model("llama"), executor="generic")
    engine = model.engine(max_running=8)
    return ChainRunner(engine, MARKS, words, end_tokens=[END], blank=[BLANK, END])


def request(seed, policy=None):
    ids = random_ids(6, seed=seed)[0].tolist()
    return ChainRequest(ids, BudgetSettings(44, 40, answer=2), policy)


@pytest.fixture(scope="module")
def chains(runner) -> list[RecordedChain]:
    found = []
    for seed in range(8):
        (result,) = runner.run([request(seed, RecordProbes(PLACES, encode))])
        reasoning = ChainTokens(MARKS, result.tokens).reasoning
        found.append(recorded(str(seed), result, reasoning, str.strip, expected="9"))
    return found


RULES = {
    "probes": lambda: AnswerProbes(AnswerProbeSettings(agree=2, chunk=4, answer_tokens=2)),
    "probes apart": lambda: AnswerProbes(
        AnswerProbeSettings(agree=1, chunk=12, answer_tokens=2), same=lambda one, other: True
    ),
    "trials": lambda: TrialAnswers(
        TrialAnswerSettings(confidence=0.01, answer_tokens=2, switches=PLACES.switches), encode
    ),
    "cut": lambda: FixedLength(FixedLengthSettings(8)),
}


@pytest.mark.parametrize("name", RULES)
def test_a_replayed_rule_stops_where_the_rule_stops_while_decoding(runner, chains, name):
    stopped = 0
    for seed, chain in enumerate(chains):
        (online,) = runner.run([request(seed, RULES[name]())])
        offline = replay(RULES[name](), chain)
        assert offline.tokens == online.reasoning_tokens
        assert offline.reason == online.stopped
        assert offline.probes == len(online.probes)
        assert offline.probe_tokens == online.probe_tokens
        if online.stopped is None:
            assert offline.answer == chain.answer
        else:
            stopped += 1
            assert online.answer.startswith(f"7 {offline.answer}")
    assert name == "trials" or stopped


def test_a_recorded_chain_is_the_chain_without_probes(runner, chains):
    for seed, chain in enumerate(chains):
        (plain,) = runner.run([request(seed)])
        assert chain.tokens == tuple(ChainTokens(MARKS, plain.tokens).reasoning)
        every = list(range(4, len(chain.tokens) + 1, 4))
        assert set(every) <= {probe.at for probe in chain.probes} | {len(chain.tokens)}


def test_costs_of_tokens_and_probes_are_told_apart():
    class Timed:
        """Counts 2 s a token and 5 s a probe."""

        now = 0.0

        def run(self, requests):
            (one,) = requests
            probes = [] if one.policy is None else [None] * 3
            self.now += 2.0 * (10 + 2 * len(probes)) + 5.0 * len(probes)
            return [_Result(probes)]

    class _Result:
        tokens, probe_tokens = [0] * 10, 6

        def __init__(self, probes):
            self.probes = probes

    timed = Timed()
    costs = measure_costs(timed, [lambda: request(0)] * 3, PLACES, encode, lambda: timed.now)
    assert costs.token == pytest.approx(2.0) and costs.probe == pytest.approx(5.0)


def test_costs_are_measured_with_probes_as_far_apart_as_a_rule_s():
    places = ProbePlaces(chunk=8, boundaries=("\n",), switches=())
    probes, asked = SpacedProbes(places, lambda text: [LINE]), []
    tokens = [LINE if n % 3 == 2 else 1 for n in range(60)]
    silent = 0
    for size in range(1, len(tokens) + 1):
        if probes.due(tokens[:size]):
            assert size > silent and tokens[size - 1] == LINE
            assert isinstance(probes.on_step(tokens[:size]), Probe)
            asked.append(size)
        quiet = probes.quiet(tokens[:size])
        assert quiet.ends == {LINE}
        silent = size + quiet.count
    assert asked == [9, 18, 27, 36, 45, 54]
    assert isinstance(probes.on_probe(Trial("4")), Continue)


def test_a_missing_probe_is_refused_unless_the_one_before_may_answer(chains):
    policy = AnswerProbes(AnswerProbeSettings(agree=1, chunk=5))
    with pytest.raises(DeliberateError, match="no probe after token 5"):
        replay(policy, synthetic_chains(1)[0])
    done = replay(
        AnswerProbes(AnswerProbeSettings(agree=1, chunk=13)), synthetic_chains(1)[0], exact=False
    )
    assert done.tokens == 13 and done.moved == 5


def test_a_policy_that_forces_tokens_cannot_be_replayed(chains):
    class Forces:
        def due(self, tokens):
            return True

        def on_step(self, tokens):
            return Force((1,))

        def on_probe(self, trial):
            return Continue()

    with pytest.raises(DeliberateError, match="cannot be replayed"):
        replay(Forces(), chains[0])


def test_probes_are_charged_and_answers_are_compared():
    chains = synthetic_chains(40)
    make = lambda: AnswerProbes(AnswerProbeSettings(agree=2, chunk=8))  # noqa: E731
    done = replay_rule("probe", make, chains)
    whole = replay_rule("whole", lambda: None, chains)
    assert whole.tokens_saved == 0 and not any(whole.changed) and whole.probe_share == 0
    assert 0 < done.tokens_saved < 1 and 0 < done.probe_share < 1
    costs = ChainCosts(1.0, 100.0)
    probes = sum(one.probes + (one.reason is not None) for one in done.replayed)
    charged = sum(one.charged for one in done.replayed)
    assert done.seconds(costs) == charged + 100 * probes
    assert done.right is not None and whole.right is not None
    assert LINE in chains[0].tokens


def test_the_matched_length_makes_as_many_tokens():
    chains = [RecordedChain(str(size), "7", tokens=(1,) * size) for size in (10, 20, 30, 40, 50)]
    for length in (5, 17, 33, 50):
        mean = sum(min(length, len(chain.tokens)) for chain in chains) / 5
        assert matched_length(chains, mean) == length


class Unsaid:
    """A policy that does not say for how long it is quiet."""

    def __init__(self, policy):
        self.due, self.on_step, self.on_probe = policy.due, policy.on_step, policy.on_probe


@pytest.mark.parametrize(
    "chosen",
    [
        {"probe": {"agree": 2, "chunk": 8}},
        {"give_up": {"window": 16, "every": 4, "share": 0.3}},
        {"cut": {"tokens": 37}},
        {"probe": {"agree": 3, "chunk": 16}, "give_up": {"window": 32}},
    ],
)
def test_places_that_a_policy_is_quiet_at_are_passed_over_and_nothing_else(chosen):
    for chain in synthetic_chains(8, seed=5):
        said = replay(chain_policy(chosen, encode), chain, exact=False)
        assert said == replay(Unsaid(chain_policy(chosen, encode)), chain, exact=False)
        assert said.reason is not None or "probe" in chosen


def test_a_long_chain_is_replayed_in_no_more_looks_than_there_are_places():
    looks = []

    class Counted(AnswerProbes):
        def due(self, tokens):
            looks.append(len(tokens))
            return super().due(tokens)

    chain = RecordedChain("long", "7", tokens=tuple(range(40_000)))
    replay(Counted(AnswerProbeSettings(chunk=64)), chain, exact=False)
    assert len(looks) == 40_000 // 64 and all(at % 64 == 0 for at in looks)
