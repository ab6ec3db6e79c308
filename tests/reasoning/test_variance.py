"""Chains whose text is watched for repetition: across stretches and probes, within their budget."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.engine.long_text import LongTextConfig
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.spec import DecodingSpec
from deliberate.reasoning.chain_output import ChainTokens
from deliberate.reasoning.chain_runner import ChainRunner
from deliberate.reasoning.marks import ReasoningMarks
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.stop_policy import Continue, Force, Probe
from deliberate.reasoning.token_budget import BudgetSettings

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
