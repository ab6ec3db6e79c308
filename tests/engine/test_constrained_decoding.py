"""Constraints while decoding, by one that needs no grammar: exact equals dense, alone and in an
engine, and forced tokens need no choice."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rhythm import Rhythm
from tiny_models import random_ids, tiny_model

from deliberate.api.loop_builder import Extent, Hooks, build_loop
from deliberate.api.model import AdaptiveModel
from deliberate.engine.request import Request
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.scheduler import Scheduler, SchedulerSettings
from deliberate.engine.spec import DecodingSpec
from deliberate.utils.errors import DeliberateError

NEW = 24


@pytest.fixture(scope="module")
def llama() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=6), [1, 2, 4])


def decode(model, prompts, constraints, chooser=None, new=NEW, **spec):
    extent = Extent(new, (5, 11), len(prompts), len(prompts[0]), chooser, constraints=constraints)
    loop = build_loop(model, DecodingSpec(gate=False, **spec), Hooks(), None, extent)
    accepted = [[] for _ in prompts]
    for fresh in loop.run(list(prompts)):
        for row, tokens in zip(accepted, fresh, strict=True):
            row += tokens
    assert accepted == [trace.tokens for trace in loop.traces]
    return loop


SPECS = [
    {"fidelity": "exact", "thresholds": 0.03, "online": False},
    {"fidelity": "exact", "thresholds": (0.2, 0.02, 0.013), "online": False, "max_pending": 2},
    {"fidelity": "exact", "thresholds": 0.05},
]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 6),
    st.integers(1, 30),
    st.integers(0, 99),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from(SPECS),
)
def test_exact_equals_dense_under_any_constraint(llama, run, length, seed, sample, rows, spec):
    prompts = random_ids(4, batch=rows, seed=seed)

    def made(**how):
        chooser = TokenChooser(sample=sample, seed=seed, batch=rows)
        constraints = [Rhythm(run, length + row) for row in range(rows)]
        return decode(llama, prompts, constraints, chooser, **how), constraints

    dense, held = made(fidelity="dense")
    exact, exact_held = made(**spec)
    assert [t.tokens for t in exact.traces] == [t.tokens for t in dense.traces]
    assert [t.finish for t in exact.traces] == [t.finish for t in dense.traces]
    for loop, constraints in ((dense, held), (exact, exact_held)):
        for trace, constraint in zip(loop.traces, constraints, strict=True):
            walked = Rhythm(constraint.run, constraint.length)
            for token in trace.tokens:
                assert not walked.finished
                walked.advance(token)
            assert all(record.verified for record in trace.records)
            assert trace.tokens[: len(constraint.tokens)] == constraint.tokens


def test_threshold_mode_obeys_the_constraint_too(llama):
    constraints = [Rhythm(), Rhythm(2)]
    loop = decode(llama, random_ids(4, batch=2), constraints, fidelity="threshold", thresholds=0.02)
    for trace, run in zip(loop.traces, (3, 2), strict=True):
        walked = Rhythm(run)
        for token in trace.tokens:
            walked.advance(token)
        assert {0, 1} & set(trace.exit_layers)


def test_a_forced_run_longer_than_what_may_be_pending_is_run_in_one_pass(llama):
    spec = {"thresholds": 0.013, "online": False, "max_pending": 1}
    loop = decode(llama, random_ids(4), [Rhythm(12)], fidelity="exact", **spec)
    assert max(one.tokens for one in loop.batch.passes) >= 12
    dense = decode(llama, random_ids(4), [Rhythm(12)], fidelity="dense")
    assert loop.trace.tokens == dense.trace.tokens
    forced = sum(not layer for layer in dense.trace.exit_layers)
    assert forced > 6
    # As many passes as tokens that were chosen, but for the last, which is not run.
    passes = len(dense.batch.passes)
    assert passes in (NEW - forced, NEW - forced - 1)


class Unsteady(Scheduler):
    """Preempts at random."""

    def __init__(self, seed):
        super().__init__(SchedulerSettings(max_running=4, prefill_tokens=7))
        self._dice = random.Random(seed)

    def plan(self, now, waiting, running, free_blocks=None):
        plan = super().plan(now, waiting, running, free_blocks)
        if running and self._dice.random() < 0.2:
            victim = self._dice.choice(running).id
            plan.preempt.append(victim)
            for ids in (plan.shallow, plan.deep):
                ids[:] = [one for one in ids if one != victim]
            plan.prefill = [one for one in plan.prefill if one[0] != victim]
        return plan


@pytest.mark.parametrize("seed", range(3))
def test_constrained_requests_of_an_engine_get_what_each_gets_alone(llama, seed):
    engine = llama.engine(max_running=4, scheduler=Unsteady(seed))
    dice, wanted, made = random.Random(seed), {}, {}
    for number in range(24):
        run, length, sample = dice.randint(0, 5), dice.randint(1, 20), dice.random() < 0.4
        spec = dice.choice([*SPECS, {"fidelity": "dense"}])
        prompt = random_ids(dice.randint(1, 12), seed=number)
        free = dice.random() < 0.3

        def chooser(sample=sample, number=number):
            return TokenChooser(sample=sample, seed=number)

        constraints = [] if free else [Rhythm(run, length)]
        alone = decode(llama, prompt, constraints, chooser(), new=16, **spec)
        request = Request(
            prompt[0],
            16,
            DecodingSpec(gate=False, **spec),
            chooser(),
            end_tokens=(5, 11),
            constraint=None if free else Rhythm(run, length),
        )
        wanted[engine.add(request)] = (alone.trace.tokens, alone.trace.finish)
    ended = {}
    while engine.unfinished:
        for output in engine.step():
            made.setdefault(output.id, []).extend(output.tokens)
            if output.finished:
                ended[output.id] = output.finished
    assert {one: (made[one], ended[one]) for one in made} == wanted
    assert engine.stats().preempted > 5


def test_an_object_that_is_no_constraint_is_refused():
    with pytest.raises(DeliberateError, match="constraint=3 has no advance: a LogitConstraint"):
        Request([1], 2, constraint=3)
