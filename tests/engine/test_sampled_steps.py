"""Several sampled or masked tokens in one call: the tokens that are chosen one by one."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from tiny_models import random_ids, tiny_model
from transformers import TemperatureLogitsWarper, TopKLogitsWarper

from deliberate.api.model import AdaptiveModel
from deliberate.engine.request import Request
from deliberate.engine.sampled_steps import SampledSteps
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.sequence import LaterEnds
from deliberate.engine.spec import DecodingSpec
from deliberate.kernels import native_build
from deliberate.reasoning.chain_confidence import OWN, WatchedConstraint
from deliberate.reasoning.marks import ReasoningMarks, Utf8Ends
from deliberate.reasoning.token_budget import BudgetSettings, ReasoningConstraint

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)
OPEN, CLOSE, END, BLANK, WAIT = 1, 2, 3, 4, 5
MARKS = {
    "one token": ReasoningMarks(closing=(CLOSE,), answer=(7,)),
    "opened": ReasoningMarks(closing=(CLOSE, 6), opening=(OPEN,), reopening=(OPEN,)),
    "long": ReasoningMarks(closing=(CLOSE, 6), answer=(7, 8), reopening=(OPEN, 9)),
    "forms": ReasoningMarks(
        closing=(CLOSE, 6),
        answer=(7, 8),
        closing_forms=(frozenset([CLOSE, 9]), frozenset([6, 18, 20])),
    ),
}
SPEC = DecodingSpec(fidelity="dense")


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    torch.manual_seed(5)
    base = tiny_model("llama", vocab_size=21, dtype=torch.float32)
    return AdaptiveModel(base, [2], executor="fused", engine="native")


def constraint_of(dice: random.Random, marks: ReasoningMarks, greedy: bool):
    """A budget whose limits, suppressed runs and extensions differ from request to request."""
    answer = dice.randint(1, 5)
    least = len(marks.opening) + len(marks.handover) + answer
    runs = [(12,), (13, 14), (13, 14, 15), (11, 11), (WAIT, 10)]
    settings = BudgetSettings(
        least + dice.randint(8, 40),
        dice.choice([None, None, 10, 25]),
        answer,
        extensions=dice.choice([0, 0, 1, 2]),
        extension=(WAIT,) if dice.random() < 0.5 else (WAIT, 16),
        suppressed=tuple(dice.sample(runs, dice.randint(0, 4))),
    )
    marks = replace(marks, call=dice.choice([(), (17, 18)]))
    ends = Utf8Ends({19: 2}, {20: 1}, frozenset([20]))
    made = ReasoningConstraint(settings, marks, [END], ends, [BLANK, END], greedy=greedy)
    return WatchedConstraint(made, OWN) if dice.random() < 0.5 else made


def drawn(seed: int) -> Request:
    dice = random.Random(seed)
    greedy = dice.random() < 0.3
    chooser = None
    if not greedy:
        warps = [TemperatureLogitsWarper(dice.choice([0.5, 0.7, 1.3]))]
        chooser = TokenChooser(warps[: dice.randint(0, 1)], sample=True, seed=seed)
    constraint = None
    if greedy or dice.random() < 0.8:
        constraint = constraint_of(dice, dice.choice(list(MARKS.values())), greedy)
    inner = getattr(constraint, "inner", constraint)
    most = 40 if inner is None else inner.settings.max_new_tokens
    prompt = (random_ids(dice.randint(1, 20), seed=seed)[0] % 21).tolist()
    later = LaterEnds(5, frozenset([10, 12])) if dice.random() < 0.2 else None
    return Request(prompt, most, SPEC, chooser, [END], constraint=constraint, later_ends=later)


def outputs(model: AdaptiveModel, requests, *, running: int, blocks: bool = True):
    cache = None
    if blocks:
        cache = model.backbone.new_block_cache(200, block_size=4, max_rows=running)
    engine = model.engine(max_running=running, cache=cache)
    made = {engine.add(one): [] for one in requests}
    steps = 0
    while engine.unfinished:
        steps += 1
        for output in engine.step():
            made[output.id] += output.tokens
    return list(made.values()), steps


@pytest.fixture
def calls(monkeypatch):
    """How often several tokens were chosen in one call."""
    done, decode = [], SampledSteps.decode

    def counted(self, sequences):
        done.append(decode(self, sequences))
        return done[-1]

    monkeypatch.setattr(SampledSteps, "decode", counted)
    return done


@pytest.mark.parametrize(("running", "blocks"), [(1, True), (5, True), (5, False)])
def test_tokens_are_those_that_are_chosen_one_by_one(model, monkeypatch, calls, running, blocks):
    seeds = range(60)
    together, fewer = outputs(model, map(drawn, seeds), running=running, blocks=blocks)
    watched = [drawn(seed) for seed in seeds]
    outputs(model, watched, running=running, blocks=blocks)
    assert sum(calls) > 60
    monkeypatch.setattr(SampledSteps, "decode", lambda self, sequences: False)
    single = [drawn(seed) for seed in seeds]
    one_by_one, steps = outputs(model, single, running=running, blocks=blocks)
    assert together == one_by_one
    assert fewer < 0.7 * steps
    for own, expected in zip(watched, single, strict=True):
        if isinstance(own.constraint, WatchedConstraint):
            assert own.constraint.confidences == pytest.approx(
                expected.constraint.confidences, abs=1e-5
            )


def test_a_call_is_counted_pass_by_pass(model):
    request = Request([1, 2], 9, SPEC, TokenChooser(sample=True, seed=1), [])
    engine = model.engine(max_running=1)
    engine.add(request)
    done = list(itertools.chain.from_iterable(iter(engine.step, [])))
    (trace,) = [one.trace for one in done if one.trace is not None]
    assert trace.layer_calls == [8] * model.backbone.num_layers  # the prefill made the first
    assert trace.layer_positions == trace.layer_calls
    assert all(record.verified for record in trace.records)


@pytest.mark.parametrize(
    "changed",
    [
        {"sampling": TokenChooser([TopKLogitsWarper(3)], sample=True, seed=1)},
        {"top_logprobs": 2},
        {"spec": DecodingSpec(fidelity="exact", lookup_tokens=2)},
        {"spec": DecodingSpec(fidelity="threshold", thresholds=0.01, online=False)},
    ],
)
def test_tokens_that_depend_on_more_are_chosen_one_by_one(model, calls, changed):
    how = {"spec": SPEC, "sampling": TokenChooser(sample=True, seed=1), "end_tokens": []} | changed
    outputs(model, [Request([1, 2], 12, **how)], running=1)
    assert not any(calls)


def test_noise_of_several_tokens_is_that_of_each():
    chooser = TokenChooser(sample=True, seed=9)
    drawn = chooser.noise(3, 5, 4, 37)
    assert drawn.shape == (4, 48)
    for row in range(4):
        scores = torch.zeros(1, 37)
        (token,), _ = chooser.choose_rows(scores, [(3, 5 + row, [])])
        assert token == int((-drawn[row, :37]).argmax())
