"""One budget for a group of chains, and characters of several bytes that no action cuts."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.sampler import TokenChooser
from deliberate.eval.grading.equality import same_value
from deliberate.reasoning.chain_output import ChainTokens
from deliberate.reasoning.chain_runner import ChainRunner
from deliberate.reasoning.loop_rollback import roll_back
from deliberate.reasoning.marks import ReasoningMarks, Utf8Ends
from deliberate.reasoning.registry import chain_policy
from deliberate.reasoning.running_chain import ChainRequest, RunningChain
from deliberate.reasoning.settings import ReasoningSettings, VoteGroup
from deliberate.reasoning.stop_policy import Continue, Rollback, Stop, Trial
from deliberate.reasoning.token_budget import BudgetSettings, ReasoningConstraint
from deliberate.reasoning.vote_runner import run_votes
from deliberate.reasoning.votes import VOTE_RULES, FixedVotes
from deliberate.utils.errors import DeliberateError

CLOSE, END, BLANK = 2, 3, 4
MARKS = ReasoningMarks(closing=(CLOSE,), answer=(7,))
# Every third token begins a character of three bytes, every token after those goes on with one.
LEADS = frozenset(range(10, 97, 3))
TAILS = frozenset(range(11, 97, 3))
ENDS = Utf8Ends(dict.fromkeys(LEADS, 2), dict.fromkeys(TAILS, 1), TAILS)


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama"), executor="generic")


def words(tokens) -> str:
    return " ".join(map(str, tokens))


def runner_of(model, ends=None) -> ChainRunner:
    engine = model.engine(max_running=8)
    return ChainRunner(engine, MARKS, words, end_tokens=[END], ends=ends, blank=[BLANK, END])


def policy_of(dice):
    chosen = dice.choice(
        [
            {},
            {
                "probe": {
                    "chunk": dice.randint(2, 6),
                    "agree": 2,
                    "answer_tokens": dice.randint(1, 9),
                }
            },
            {"cut": {"tokens": dice.randint(1, 12)}},
            {"rollback": {"window": 8, "gram": 2, "every": 2, "share": 0.2}},
            {"give_up": {"window": 8, "gram": 2, "every": 4, "share": 0.3}},
        ]
    )
    return chain_policy(chosen, lambda text: [9]) if chosen else None


@pytest.mark.parametrize("seed", range(24))
def test_a_group_s_budget_holds_all_its_chains_with_their_probes(model, seed):
    dice = random.Random(seed)
    rule = VOTE_RULES[dice.choice(sorted(VOTE_RULES))]()
    prompt = random_ids(dice.randint(2, 9), seed=seed)[0].tolist()
    budget = BudgetSettings(dice.randint(8, 40), answer=dice.randint(1, 3))
    most = dice.randint(6, 160)

    def chain(number: int) -> ChainRequest:
        return ChainRequest(
            prompt,
            budget,
            policy_of(random.Random(1000 * seed + number)),
            sampling=lambda start: TokenChooser(sample=True, seed=10**6 * number + start + seed),
        )

    vote = run_votes(runner_of(model), chain, rule, max_tokens=most)
    assert vote.chains and vote.tokens <= most
    for one in vote.chains:
        spent = len(one.tokens) + one.probe_tokens + one.rolled_back
        assert spent <= budget.max_new_tokens
        assert one.killed or one.answer.strip()


def test_a_budget_of_too_few_tokens_for_one_chain_is_refused(model):
    chain = ChainRequest([5, 6], BudgetSettings(30, answer=4), sampling=lambda _: TokenChooser())
    with pytest.raises(DeliberateError, match=r"votes\.tokens=3: a chain takes at least 6"):
        run_votes(runner_of(model), lambda _: chain, FixedVotes(2), max_tokens=3)


def test_chains_begin_while_there_is_room_for_ones_as_long_as_those_before(model):
    """A limit of a chain that is larger than the group's budget does not leave one chain alone."""

    def chain(number: int) -> ChainRequest:
        return ChainRequest(
            [5, 6, 8],
            BudgetSettings(1000, 3, 4),
            sampling=lambda start: TokenChooser(sample=True, seed=1000 * number + start),
        )

    end = runner_of(model)
    alone = [end.run([chain(number)])[0] for number in range(5)]
    lengths = [len(one.tokens) for one in alone]
    vote = run_votes(runner_of(model), chain, FixedVotes(5), max_tokens=6 * max(lengths))
    assert len(vote.chains) == 5 and not vote.over_budget
    assert vote.tokens == sum(lengths)


def cut_within(tokens) -> bool:
    """Whether a character of the reasoning is open at the closing tag."""
    walk = ChainTokens(MARKS, tokens)
    need = 0
    for token in walk.reasoning:
        need = ENDS.after(need, token)
    return walk.closed and need > 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_no_policy_cuts_a_character(model, seed, sampled):
    dice = random.Random(seed)
    policy = policy_of(dice)
    request = ChainRequest(
        random_ids(4, seed=seed)[0].tolist(),
        BudgetSettings(48, dice.choice([None, 20]), 4),
        policy,
        sampling=(lambda start: TokenChooser(sample=True, seed=seed + start)) if sampled else None,
    )
    (result,) = runner_of(model, ENDS).run([request])
    if result.stopped is not None:
        walk = ChainTokens(MARKS, result.tokens)
        assert walk.closed and not cut_within(result.tokens)
    for probe in result.probes:
        need = 0
        for token in ChainTokens(MARKS, result.tokens).reasoning[: probe.at]:
            need = ENDS.after(need, token)
        assert not need or result.rolled_back


def test_a_chain_goes_back_to_the_front_of_a_character():
    lead, tail = min(LEADS), min(TAILS)
    output = [5, lead, tail, tail, 5, lead, tail, tail]
    budget = BudgetSettings(48, answer=4)
    constraint = ReasoningConstraint(budget, MARKS, [END], ENDS, start=output)
    chain = RunningChain(ChainRequest([5], budget), MARKS, constraint, 0.0)
    for token in output:
        chain.tokens.add(token)
    roll_back(chain, Rollback(1, (lead, tail, tail)), MARKS)
    assert chain.tokens.output == output[:5] and chain.result.rolled_back == 3
    assert chain.request.budget.suppressed == ((tail, 5, lead),)


def test_a_probe_answers_no_longer_than_an_answer_could_be(model):
    policy = chain_policy({"probe": {"chunk": 4, "agree": 9, "answer_tokens": 500}}, lambda _: [9])
    request = ChainRequest([5, 6, 8], BudgetSettings(40, answer=4), policy)
    (result,) = runner_of(model).run([request])
    assert result.probes
    for probe in result.probes:
        assert probe.at + len(MARKS.handover) + probe.tokens <= 40


def test_a_rule_and_its_tokens_are_read_together():
    group = VoteGroup.of({"adaptive": {"most": 6}, "tokens": 300})
    assert (group.rule.most, group.tokens) == (6, 300)
    assert VoteGroup.of(4) == VoteGroup(FixedVotes(4)) and VoteGroup.of(group) is group
    for wrong, named in (
        ({"tokens": 5}, "give a number"),
        ({"fixed": None, "tokens": 0}, "votes.tokens=0"),
    ):
        with pytest.raises(DeliberateError, match=named):
            VoteGroup.of(wrong)


def test_policies_and_votes_count_answers_as_equal_where_the_settings_say_so():
    settings_ = ReasoningSettings.of({"probe": {"agree": 2, "chunk": 1}, "same": same_value})
    policy = settings_.policy(lambda text: [9])
    assert isinstance(policy.on_probe(Trial("1/2")), Continue)
    assert isinstance(policy.on_probe(Trial("0.5")), Stop)
    with pytest.raises(DeliberateError, match="same='text'"):
        ReasoningSettings.of({"same": "text"})


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("7", "7.0", True),
        ("$1,000", "1000", True),
        (r"\frac{1}{2}", "0.5", True),
        ("The answer is 7.", "7", True),
        ("7", "The answer is 7.", True),
        ("Paris", "paris.", True),
        ("7", "8", False),
        ("", "7", False),
        ("0.33", "1/3", False),
    ],
)
def test_equal_values_are_one_answer_whatever_their_form(one, other, same):
    assert same_value(one, other) is same


@pytest.mark.parametrize("rule", sorted(VOTE_RULES))
def test_a_limit_that_holds_no_chain_is_named_whatever_the_group_s_budget(model, rule):
    budget = BudgetSettings(3, answer=4)
    request = ChainRequest([5, 6], budget)
    for most in (None, 100):
        with pytest.raises(DeliberateError, match="max_new_tokens=3 leaves no room"):
            run_votes(runner_of(model), lambda _: request, VOTE_RULES[rule](), max_tokens=most)
