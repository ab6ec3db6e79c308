"""Chains in the engine: budgets in every mode, probes that change nothing, stops that answer."""

from __future__ import annotations

import random

import pytest
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.spec import DecodingSpec
from deliberate.reasoning.chain_output import ChainTokens
from deliberate.reasoning.chain_runner import ChainRunner
from deliberate.reasoning.marks import ReasoningMarks
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.stop_policy import Continue, Force, Probe, Stop
from deliberate.reasoning.token_budget import BudgetSettings
from deliberate.reasoning.vote_runner import run_votes
from deliberate.reasoning.votes import AdaptiveConsistency, FixedVotes
from deliberate.utils.errors import DeliberateError

OPEN, CLOSE, END, BLANK, WAIT = 1, 2, 3, 4, 5
SPECS = [
    {"fidelity": "dense"},
    {"fidelity": "exact", "thresholds": 0.013, "online": False},
    {"fidelity": "exact", "thresholds": 0.05},
    {"fidelity": "threshold", "thresholds": 0.02},
    {"fidelity": "threshold", "thresholds": 0.03, "max_pending": 3},
]
PLAIN = ReasoningMarks(closing=(CLOSE,), answer=(7,))


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama"), executor="generic")


def words(tokens) -> str:
    return " ".join(map(str, tokens))


def runner_of(model, marks=PLAIN, **settings) -> ChainRunner:
    engine = model.engine(max_running=8)
    return ChainRunner(engine, marks, words, end_tokens=[END], blank=[BLANK, END], **settings)


class Scripted:
    """Due every `every` tokens; acts as it is told, then as the last of them."""

    def __init__(self, every, actions, after=()) -> None:
        self.every, self.actions, self.after = every, list(actions), list(after)
        self.trials = []

    def due(self, tokens):
        return len(tokens) % self.every == 0

    def on_step(self, tokens):
        return self.actions.pop(0) if len(self.actions) > 1 else self.actions[0]

    def on_probe(self, trial):
        self.trials.append(trial)
        return self.after.pop(0) if self.after else Continue()


def draw_chain(seed: int, marks: ReasoningMarks) -> ChainRequest:
    """One of many: limits, mode, sampling and policy differ from request to request."""
    dice = random.Random(seed)
    answer = dice.randint(1, 3)
    least = len(marks.opening) + len(marks.handover) + answer
    limit = dice.choice([None, 0, 1, 5, 12])
    policy = dice.choice(
        [
            lambda: None,
            lambda: Scripted(dice.randint(2, 5), [Probe(2), Continue(), Probe(3), Continue()]),
            lambda: Scripted(3, [Continue(), Stop("enough")]),
        ]
    )()
    return ChainRequest(
        random_ids(dice.randint(1, 20), seed=seed)[0].tolist(),
        BudgetSettings(
            least + dice.randint(0, 16),
            limit,
            answer,
            extensions=dice.choice([0, 0, 1]),
            extension=(WAIT,),
        ),
        policy,
        DecodingSpec(gate=False, **SPECS[seed % len(SPECS)]),
        (lambda start: TokenChooser(sample=True, seed=1000 * seed + start))
        if dice.random() < 0.5
        else None,
    )


@pytest.mark.parametrize(
    "marks",
    [
        PLAIN,
        ReasoningMarks(closing=(CLOSE,), opening=(OPEN,)),
        ReasoningMarks(closing=(CLOSE, 6), answer=(7, 8)),
    ],
    ids=["untagged", "tags", "long tags"],
)
def test_no_mode_exceeds_its_budget_and_no_answer_is_empty(model, marks):
    requests = [draw_chain(seed, marks) for seed in range(40)]
    for request, result in zip(requests, runner_of(model, marks).run(requests), strict=True):
        budget = request.budget
        assert len(result.tokens) <= budget.max_new_tokens
        assert budget.reasoning is None or result.reasoning_tokens <= budget.reasoning
        again = ChainTokens(marks, result.tokens)
        assert not again.reasons
        assert [token for token in again.answer if token not in (BLANK, END)]


def test_a_chain_is_what_it_is_alone_whoever_runs_beside_it(model):
    some = [draw_chain(seed, PLAIN) for seed in range(20)]
    together = runner_of(model).run(some)
    for seed in (0, 1, 3, 7, 11):
        (alone,) = runner_of(model).run([draw_chain(seed, PLAIN)])
        assert alone.tokens == together[seed].tokens


@pytest.mark.parametrize("spec", SPECS[:3])
def test_probes_that_stop_nothing_change_no_token(model, spec):
    def chain(policy):
        return ChainRequest(
            random_ids(9, seed=4)[0].tolist(), BudgetSettings(40, 30, 4), policy,
            DecodingSpec(gate=False, **spec),
        )  # fmt: skip

    probes = Scripted(4, [Probe(3)])
    (plain,) = runner_of(model).run([chain(None)])
    (probed,) = runner_of(model).run([chain(probes)])
    assert probed.tokens == plain.tokens and len(probed.probes) == len(probes.trials) > 2
    for trial, record in zip(probes.trials, probed.probes, strict=True):
        assert len(trial.tokens) == len(trial.probabilities) <= record.tokens <= 3
        assert all(0.0 <= p <= 1.0 for p in trial.probabilities)
    assert probed.probe_tokens == sum(record.tokens for record in probed.probes)


def test_a_stop_hands_over_to_the_answer_where_the_probe_was(model):
    policy = Scripted(4, [Probe(3)], [Continue(), Stop("sure", gave_up=True)])
    request = ChainRequest(random_ids(9, seed=4)[0].tolist(), BudgetSettings(40, 30, 4), policy)
    (result,) = runner_of(model).run([request])
    assert result.stopped == "sure" and result.gave_up
    assert result.reasoning_tokens == 8
    assert result.tokens[8:10] == list(PLAIN.handover)
    # The answer goes on as the probe did: both are greedy over the same tokens.
    assert tuple(result.tokens[10:13]) == policy.trials[-1].tokens
    assert result.answer.split()[0] == "7"


def test_forced_tokens_are_the_chains_own_and_must_fit(model):
    prompt = random_ids(9, seed=4)[0].tolist()
    fits = Scripted(6, [Force((WAIT, WAIT)), Continue()])
    (result,) = runner_of(model).run([ChainRequest(prompt, BudgetSettings(40, 20, 4), fits)])
    assert result.tokens[6:8] == [WAIT, WAIT] and result.reasoning_tokens <= 20
    late = Scripted(6, [Force((WAIT,) * 3)])
    with pytest.raises(DeliberateError, match="forces 3 tokens where the budget has room for 2"):
        runner_of(model).run([ChainRequest(prompt, BudgetSettings(40, 8, 4), late)])


def test_a_vote_samples_until_it_is_decided_within_its_budget(model):
    prompt = random_ids(9, seed=4)[0].tolist()

    def chain(number):
        return ChainRequest(
            prompt, BudgetSettings(12, 4, 4),
            sampling=lambda start: TokenChooser(sample=True, seed=100 * number + start),
        )  # fmt: skip

    runner = runner_of(model)
    same = run_votes(runner, chain, AdaptiveConsistency(), answer_of=lambda result: "7")
    assert len(same.chains) == 4 and same.answer == "7"
    fixed = run_votes(runner, chain, FixedVotes(5))
    assert len(fixed.chains) == 5 and fixed.tokens <= 60
    assert len({tuple(one.tokens) for one in fixed.chains}) > 1  # each has noise of its own
    short = run_votes(runner, chain, FixedVotes(5), max_tokens=30)
    assert len(short.chains) == 2 and short.over_budget and short.tokens <= 30
    (alone,) = run_votes(runner, chain, FixedVotes(5), max_tokens=9).chains
    assert len(alone.tokens) <= 9 and alone.answer


def test_chains_need_an_end(model):
    with pytest.raises(DeliberateError, match="end_tokens is empty"):
        ChainRunner(model.engine(), PLAIN, words, end_tokens=[])


@pytest.mark.parametrize("action", [Stop("a new line"), Probe(3)])
def test_a_policy_is_due_at_a_token_that_may_begin_the_closing_tag(model, action):
    """As a new line does where answers follow one: what is missing of the tag is added alone."""
    prompt = random_ids(9, seed=3)[0].tolist()
    runner = runner_of(model, ReasoningMarks(closing=(90, 91), answer=(92,)))
    plain = runner.run([ChainRequest(prompt, BudgetSettings(30, answer=4))])[0]
    begins = plain.tokens[5]
    marks = ReasoningMarks(closing=(begins, 91), answer=(92,))

    class AtLine(Scripted):
        def due(self, tokens):
            return len(tokens) > 4 and tokens[-1] == begins

    policy = AtLine(1, [action, Continue()])
    (chain,) = runner_of(model, marks).run(
        [ChainRequest(prompt, BudgetSettings(30, answer=4), policy)]
    )
    if isinstance(action, Stop):
        assert chain.tokens[:8] == [*plain.tokens[:6], 91, 92] and chain.reasoning_tokens == 5
        assert chain.stopped == "a new line"
    else:
        assert chain.tokens[:6] == plain.tokens[:6] and chain.probes[0].at == 6
        assert policy.trials and chain.stopped is None
