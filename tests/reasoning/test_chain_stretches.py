"""Stretches of chains that are decoded without the constraint, and policies that say when."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.spec import DecodingSpec
from deliberate.reasoning.answer_probes import AnswerProbes, AnswerProbeSettings
from deliberate.reasoning.chain_runner import ChainRunner
from deliberate.reasoning.fixed_length import FixedLength, FixedLengthSettings
from deliberate.reasoning.give_up import GiveUp, GiveUpSettings
from deliberate.reasoning.marks import ReasoningMarks
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.stop_policy import Continue, Force, Probe, Quiet, Stop, Together
from deliberate.reasoning.token_budget import BudgetSettings, ReasoningConstraint
from deliberate.reasoning.trial_answers import TrialAnswers, TrialAnswerSettings

OPEN, CLOSE, END, BLANK, WAIT = 1, 2, 3, 4, 5
MARKS = {
    "untagged": ReasoningMarks(closing=(CLOSE,), answer=(7,)),
    "tags": ReasoningMarks(closing=(CLOSE,), opening=(OPEN,), reopening=(OPEN,)),
    "long tags": ReasoningMarks(closing=(CLOSE, 6), answer=(7, 8)),
    "forms": ReasoningMarks(
        closing=(CLOSE, 6),
        answer=(7, 8),
        closing_forms=(frozenset([CLOSE, 9]), frozenset([6, 18, 20])),
    ),
}
SPECS = [
    {"fidelity": "dense"},
    {"fidelity": "exact", "thresholds": 0.013, "online": False},
    {"fidelity": "exact", "thresholds": 0.05},
]


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", vocab_size=24), executor="generic")


def words(tokens) -> str:
    return " ".join(map(str, tokens))


class EveryFew:
    """Due every `every` tokens, or after `token`; probes, and stops after `stop` of them.

    With `stop` 3 a probe's answer ends the chain.
    """

    def __init__(self, every, token, stop) -> None:
        self.every, self.token, self.left = every, token, stop
        self.by_answer = stop == 3

    def due(self, tokens):
        if self.token is not None:
            return tokens[-1:] == [self.token]
        return bool(tokens) and len(tokens) % self.every == 0

    def quiet(self, tokens):
        if self.token is not None:
            return Quiet(ends=frozenset([self.token]))
        return Quiet.for_tokens(self.every - 1 - len(tokens) % self.every)

    def on_step(self, tokens):
        self.left -= 1
        if self.left == 3 and self.every > 5 and not self.by_answer:
            return Force((WAIT,))
        return Probe(2) if self.left else Stop("enough")

    def on_probe(self, trial):
        return Stop("answer") if self.by_answer and self.left == 1 else Continue()


def drawn(seed: int, marks: ReasoningMarks) -> ChainRequest:
    dice = random.Random(seed)
    answer = dice.randint(1, 4)
    least = len(marks.opening) + len(marks.handover) + answer
    token = dice.choice([None, None, 9, 11])
    policy = dice.choice(
        [None, EveryFew(dice.randint(3, 12), token, dice.choice([2, 3, 3, 4, 99]))]
    )
    return ChainRequest(
        [one % 24 for one in random_ids(dice.randint(1, 12), seed=seed)[0].tolist()],
        BudgetSettings(
            least + dice.randint(0, 40),
            dice.choice([None, None, 0, 9, 25]),
            answer,
            extensions=dice.choice([0, 0, 1, 2]),
            extension=dice.choice([(WAIT,), (WAIT, 10)]),
            suppressed=dice.choice([(), ((12,), (13, 14)), ((15,),)]),
        ),
        policy,
        DecodingSpec(gate=False, **SPECS[seed % len(SPECS)]),
    )


def rounded(probes):
    # transformers' modules compute a token in passes of other sizes a little differently.
    return [dataclasses.replace(one, confidence=round(one.confidence, 5)) for one in probes]


@pytest.mark.parametrize("marks", MARKS.values(), ids=MARKS)
def test_a_stretch_without_the_constraint_gives_what_the_constraint_gives(model, marks):
    made = {}
    for least in (None, 1, 6):
        runner = ChainRunner(
            model.engine(max_running=6), marks, words, end_tokens=[END], blank=[BLANK, END],
            freely_from=least,
        )  # fmt: skip
        results = runner.run([drawn(seed, marks) for seed in range(15)])
        made[least] = [
            (one.tokens, one.reasoning_tokens, one.stopped, one.finished, rounded(one.probes))
            for one in results
        ]
    assert made[None] == made[1] == made[6]


@pytest.mark.parametrize("how", [SPECS[0], {"fidelity": "threshold", "thresholds": 0.05}])
def test_few_tokens_of_a_chain_far_from_its_limits_go_through_the_constraint(
    model, monkeypatch, how
):
    masked, rare = [], ReasoningMarks(closing=(23, 22))
    mask = ReasoningConstraint.mask
    monkeypatch.setattr(
        ReasoningConstraint, "mask", lambda own, scores: masked.append(1) or mask(own, scores)
    )

    def run(least):
        masked.clear()
        runner = ChainRunner(
            model.engine(max_running=2), rare, words, end_tokens=[22], freely_from=least
        )
        policy = FixedLength(FixedLengthSettings(60))
        budget = BudgetSettings(80, None, 4)
        spec = DecodingSpec(**how, gate=False)
        (result,) = runner.run([ChainRequest([9, 10], budget, policy, spec)])
        return result.tokens, len(masked)

    (freely, few), (limited, many) = run(8), run(None)
    assert freely == limited
    assert many > 40 and few < many / 3


def encode(text):
    return [ord(letter) % 24 for letter in text.strip()]


POLICIES = {
    "probe": lambda: AnswerProbes(AnswerProbeSettings(chunk=7)),
    "give_up": lambda: GiveUp(GiveUpSettings(window=20, every=6)),
    "cut": lambda: FixedLength(FixedLengthSettings(tokens=33)),
    "deer": lambda: TrialAnswers(TrialAnswerSettings(switches=("ab", "c")), encode),
    "together": lambda: Together([POLICIES["deer"](), POLICIES["probe"]()]),
}


@pytest.mark.parametrize("name", POLICIES)
@given(st.lists(st.integers(0, 23), max_size=60), st.integers(0, 60))
@settings(deadline=None)
def test_a_policy_is_not_due_while_it_says_that_it_is_quiet(name, tokens, start):
    policy = POLICIES[name]()
    start = min(start, len(tokens))
    quiet = policy.quiet(tokens[:start])
    for size in range(start + 1, len(tokens) + 1):
        ahead = size - start
        if policy.due(tokens[:size]):
            assert ahead > quiet.count
            late = quiet.most is not None and ahead > quiet.most
            assert tokens[size - 1] in quiet.ends or late


def test_policies_together_are_step_by_step_where_one_does_not_say_when_it_is_due():
    class Silent(EveryFew):
        quiet = None

    assert Together([POLICIES["probe"](), Silent(3, None, 2)]).quiet([1, 2]) is None
    assert dataclasses.astuple(POLICIES["probe"]().quiet([1, 2])) == (4, frozenset(), 4)


@pytest.mark.parametrize("marks", [MARKS["untagged"], MARKS["tags"]], ids=["untagged", "tags"])
def test_probes_after_a_chain_are_those_along_it(model, marks):
    requests = []
    for seed in range(6):
        one = drawn(seed, marks)
        budget = dataclasses.replace(one.budget, max_new_tokens=45, reasoning=None)
        requests.append(dataclasses.replace(one, policy=None, budget=budget))
    engine = model.engine(max_running=6)
    runner = ChainRunner(engine, marks, words, end_tokens=[END], blank=[BLANK, END])
    every = EveryFew(5, None, 99)
    along = runner.run([dataclasses.replace(one, policy=every) for one in requests])
    after = runner.run(requests)
    runner.probe(requests, after, every.due, 2, in_flight=4)
    assert [one.tokens for one in along] == [one.tokens for one in after]
    assert sum(len(one.probes) for one in after) > 6
    for one, other in zip(along, after, strict=True):
        assert [(p.at, p.answer, p.tokens) for p in one.probes] == [
            (p.at, p.answer, p.tokens) for p in other.probes
        ]
        for probe, same in zip(one.probes, other.probes, strict=True):
            assert probe.confidence == pytest.approx(same.confidence, abs=1e-5)
