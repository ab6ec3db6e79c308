"""Chains whose text is watched for repetition: across stretches and probes, within their budget."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.engine.long_text import LongTextConfig
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.spec import DecodingSpec
from deliberate.reasoning.chain_output import ChainTokens
from deliberate.reasoning.chain_replay import replay
from deliberate.reasoning.chain_runner import ChainRunner
from deliberate.reasoning.marks import ReasoningMarks
from deliberate.reasoning.recorded_chains import RecordedChain
from deliberate.reasoning.registry import chain_policy
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.stop_policy import Branch, Continue, Force, Fork, Probe
from deliberate.reasoning.token_budget import BudgetSettings
from deliberate.reasoning.variance import Variance, VarianceSettings
from deliberate.reasoning.vote_runner import run_votes
from deliberate.reasoning.votes import FixedVotes
from deliberate.utils.errors import DeliberateError

MARKS = ReasoningMarks(closing=(2,), answer=(7,))
RULE = LongTextConfig(window=4, threshold=1.0, tokens=5, strength=30.0, sharpness=4.0)
SPECS = [
    {"fidelity": "dense"},
    {"fidelity": "exact", "thresholds": 0.013, "online": False},
    {"fidelity": "exact", "thresholds": 0.05},
]


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama"), executor="generic")


def run(model, requests, rows=4):
    engine = model.engine(max_running=rows)
    runner = ChainRunner(engine, MARKS, lambda ids: " ".join(map(str, ids)), end_tokens=[3])
    return runner.run(requests)


def chain(policy=None, spec=None, seed=4, sample=False, rule=RULE):
    def sampling(start):
        return TokenChooser(sample=True, seed=1000 * seed + start)

    return ChainRequest(
        random_ids(9, seed=seed)[0].tolist(),
        BudgetSettings(50, 40, 4),
        policy,
        DecodingSpec(gate=False, long_text=rule, **(spec or SPECS[0])),
        sampling if sample else None,
    )


class Every:
    """Acts at every so many tokens."""

    def __init__(self, every, *actions) -> None:
        self.every, self.actions = every, list(actions)

    def due(self, tokens):
        return len(tokens) % self.every == 0

    def on_step(self, tokens):
        return self.actions.pop(0) if len(self.actions) > 1 else self.actions[0]

    def on_probe(self, trial):
        return Continue()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("seed", [4, 7])
def test_a_watched_chain_is_the_same_whether_or_not_it_is_probed(model, spec, seed):
    (plain,) = run(model, [chain(seed=seed)])
    (probed,) = run(model, [chain(Every(4, Probe(3)), spec, seed)])
    (paused,) = run(model, [chain(Every(3, Continue()), spec, seed)], rows=1)
    assert probed.tokens == paused.tokens == plain.tokens and len(probed.probes) > 2
    (without,) = run(model, [chain(seed=seed, rule=None)])
    assert plain.tokens != without.tokens


def test_tokens_that_a_policy_forces_are_watched_too(model):
    forced = (5, 6, 5, 6, 5, 6, 5, 6)
    (found,) = run(model, [chain(Every(12, Force(forced), Continue()))])
    assert tuple(found.tokens[12:20]) == forced
    (without,) = run(model, [chain(Every(12, Force(forced), Continue()), rule=None)])
    assert found.tokens[20:] != without.tokens[20:]


@pytest.mark.parametrize("sample", [False, True])
def test_watched_chains_keep_their_budget_and_have_an_answer(model, sample):
    for spec in [*SPECS, {"fidelity": "threshold", "thresholds": 0.02}]:
        requests = [chain(None, spec, seed, sample) for seed in range(4)]
        for result in run(model, requests):
            assert len(result.tokens) <= 50 and result.reasoning_tokens <= 40
            assert ChainTokens(MARKS, result.tokens).closed and result.answer


def test_generate_takes_a_budget_of_reasoning_with_long_text():
    model, tokenizer = AdaptiveModel.from_pretrained("tiny"), checkpoint.load_tokenizer("tiny")
    question = "Question: Tom has 3 apples and buys 4 more. How many apples does Tom have?\nAnswer:"

    def answered(**how):
        out = model.generate(
            torch.tensor([tokenizer.encode(question)]),
            tokenizer=tokenizer,
            max_new_tokens=48,
            do_sample=False,
            reasoning={"budget": 30},
            return_dict_in_generate=True,
            **how,
        )
        return out.chains[0]

    rule = LongTextConfig(window=2, threshold=4.0, strength=30.0, sharpness=1.0)
    plain, watched = answered(), answered(long_text=rule)
    assert watched.reasoning_tokens <= 30 and len(watched.tokens) <= 48
    assert watched.tokens[:3] == plain.tokens[:3] and watched.tokens != plain.tokens
    assert answered(long_text=rule, fidelity="exact").tokens == watched.tokens


# -- the stop policy -------------------------------------------------------------------------------

FORKS = {"action": "fork", "window": 4, "threshold": 1.0, "tokens": 5, "branches": 3}


def variance(**settings):
    return chain_policy({"variance": settings}, lambda text: [])


def forking(spec=None, seed=4, sample=False, **settings):
    return chain(variance(**FORKS | settings), spec, seed, sample, rule=None)


def test_its_constants_are_those_of_long_texts():
    assert VarianceSettings().long_text() == LongTextConfig()
    assert VarianceSettings(action="fork").long_text() == LongTextConfig(strength=0.0)
    assert isinstance(variance(), Variance)


def test_it_forks_where_the_statistic_is_low_and_the_newest_fork_is_behind():
    policy = variance(action="fork", tokens=5, branches=3)
    assert not policy.due([1] * 30)  # nothing is known yet
    policy.see(0.1)
    assert policy.due([1] * 30) and policy.on_step([1] * 30) == Fork(3, 5)
    assert not policy.due([1] * 34) and policy.due([1] * 35)
    policy.see(0.2)
    assert not policy.due([1] * 35)
    watching = variance()
    watching.see(0.0)
    assert not watching.due([1] * 30)


@pytest.mark.parametrize(
    ("branches", "kept"),
    [
        ([(-1.0, 0.1), (-3.0, 0.5), (-2.0, 0.4)], 2),  # the likeliest still repeats itself
        ([(-1.0, 0.1), (-3.0, 0.15), (-2.0, 0.12)], 1),  # all do: the farthest from it
        ([(-1.0, 0.2), (-3.0, 0.9)], 0),
    ],
)
def test_the_likeliest_continuation_that_left_the_repetition_is_kept(branches, kept):
    found = [Branch((1,), logprob, statistic) for logprob, statistic in branches]
    assert variance(action="fork").on_branches(found) == kept


def test_to_reweigh_is_what_long_text_does(model):
    rule = dataclasses.asdict(RULE)
    for seed in (4, 7):
        (asked,) = run(model, [chain(variance(**rule), seed=seed, rule=None)])
        (given,) = run(model, [chain(seed=seed)])
        assert asked.tokens == given.tokens and asked.triggers and asked.reweighed
        assert asked.triggers == given.triggers and not asked.forks


@pytest.mark.parametrize("seed", [4, 5])
def test_a_fork_keeps_what_stood_before_it_and_its_continuation(model, seed):
    chosen = []

    class Noted(Variance):
        def on_branches(self, branches):
            chosen.append((branches, super().on_branches(branches)))
            return chosen[-1][1]

    policy = Noted(VarianceSettings(**FORKS))
    (found,) = run(model, [chain(policy, seed=seed, rule=None)])
    (plain,) = run(model, [chain(seed=seed, rule=None)])
    first = next(i for i in range(50) if found.tokens[i : i + 1] != plain.tokens[i : i + 1])
    assert found.forks == len(chosen) > 0 and first >= 4
    lost = [one for branches, own in chosen for i, one in enumerate(branches) if i != own]
    assert found.rolled_back == sum(len(one.tokens) for one in lost)
    text = tuple(found.tokens)
    for branches, own in chosen:
        kept = branches[own].tokens
        assert any(text[at : at + len(kept)] == kept for at in range(len(text)))
        assert len({one.tokens for one in branches}) > 1
        assert all(one.logprob < 0 for one in branches)


@pytest.mark.parametrize("spec", SPECS[1:])
@pytest.mark.parametrize("sample", [False, True])
def test_a_chain_that_forks_is_the_same_in_exact_and_beside_others(model, spec, sample):
    seeds = [4, 5, 6, 7]
    alone = [run(model, [forking(seed=seed, sample=sample)])[0] for seed in seeds]
    together = run(model, [forking(spec, seed, sample) for seed in seeds], rows=3)
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert [one.forks for one in together] == [one.forks for one in alone]
    assert any(one.forks for one in alone)


@pytest.mark.parametrize("sample", [False, True])
def test_forks_keep_the_budget_and_the_answer(model, sample):
    for spec in [*SPECS, {"fidelity": "threshold", "thresholds": 0.02}]:
        chains = [forking(spec, seed, sample, tokens=7) for seed in range(6)]
        for result in run(model, chains):
            assert len(result.tokens) <= 50 and result.reasoning_tokens <= 40
            assert ChainTokens(MARKS, result.tokens).closed and result.answer


def test_probes_and_forks_go_together(model):
    both = {"variance": FORKS, "probe": {"chunk": 8, "agree": 9, "answer_tokens": 2}}
    policy = chain_policy(both, lambda text: [])
    (found,) = run(model, [chain(policy, rule=None)])
    assert found.forks and found.probes
    assert found.tokens == run(model, [forking()])[0].tokens


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"action": "stop"}, "variance action=stop is not one of reweigh, fork"),
        ({"branches": 1}, "variance branches=1"),
        ({"branches": 17}, "variance branches=17: 16 at most"),
        ({"window": 0}, "long_text window 0"),
        ({"size": 2}, "has no setting 'size'"),
    ],
)
def test_settings_of_the_trigger_that_cannot_work_are_refused(settings, words):
    with pytest.raises(DeliberateError, match=words):
        variance(**settings)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"fidelity": "threshold", "kv_mode": "skip"}, "policy 'variance': long_text with kv_mode"),
        ({"fidelity": "exact", "strict": True}, "strict=True with the reasoning policy 'variance'"),
    ],
)
def test_without_states_it_is_refused_by_name(model, spec, words):
    with pytest.raises(DeliberateError, match=words):
        run(model, [forking(spec)])


def test_what_watches_twice_and_what_was_recorded_is_refused(model):
    with pytest.raises(DeliberateError, match="long_text with the reasoning policy 'variance'"):
        run(model, [chain(variance())])
    with pytest.raises(DeliberateError, match="recorded chains lack: run it"):
        replay(variance(), RecordedChain("a", "7", tokens=(1, 2, 3)))


def test_a_vote_charges_continuations_that_were_not_kept_to_its_budget(model):
    engine = model.engine(max_running=4)
    runner = ChainRunner(engine, MARKS, lambda ids: " ".join(map(str, ids)), end_tokens=[3])
    for tokens in (40, 50, 100, 150):
        vote = run_votes(
            runner,
            lambda number: forking(seed=4 + number, sample=True, threshold=4.0),
            FixedVotes(3),
            max_tokens=tokens,
        )
        assert 0 < vote.tokens <= tokens
        for one in vote.chains:
            assert one.answer and len(one.tokens) + one.rolled_back <= 50
    assert any(one.forks for one in vote.chains)
