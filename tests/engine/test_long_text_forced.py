"""The watch over long texts beside a constraint, whose forced tokens have states but no choice."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from long_text_rule import written_out
from rhythm import Rhythm
from tiny_models import random_ids, tiny_model

from deliberate.api.loop_builder import Extent, Hooks, build_loop
from deliberate.api.model import AdaptiveModel
from deliberate.engine.long_text import LongTextConfig, LongTextWatch
from deliberate.engine.request import Request
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.spec import DecodingSpec
from deliberate.utils.errors import DeliberateError

NEW = 32
RULE = LongTextConfig(window=4, threshold=1.0, tokens=5, strength=30.0, sharpness=4.0)
DENSE = {"fidelity": "dense"}


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=4), [1, 2])


def decode(model, prompts, runs, chooser=None, rule=RULE, new=NEW, **spec):
    """Traces of prompts that are decoded together, each under its own constraint."""
    constraints = [Rhythm(run) for run in runs]
    extent = Extent(new, (), len(prompts), len(prompts[0]), chooser, constraints=constraints)
    spec = DecodingSpec(gate=False, long_text=rule, **spec)
    loop = build_loop(model, spec, Hooks(), None, extent)
    for _ in loop.run(list(prompts)):
        pass
    return loop.traces


def outcome(trace):
    triggers = [(one.index, round(one.statistic, 9)) for one in trace.triggers]
    return trace.tokens, triggers, trace.reweighed


@pytest.mark.parametrize("run", [1, 3, 6])
@pytest.mark.parametrize("seed", [0, 5])
def test_forced_tokens_are_watched_and_never_re_weighed(model, run, seed):
    prompt = random_ids(5, seed=seed)
    (trace,) = decode(model, prompt, [run], **DENSE)
    expected = written_out(model.base, prompt[0].tolist(), RULE, NEW, Rhythm(run))
    assert outcome(trace) == expected
    assert 0 in trace.exit_layers and expected[1] and expected[2]


def test_the_watch_chooses_another_text_than_the_constraint_alone(model):
    prompts = random_ids(5, batch=3)
    watched = decode(model, prompts, [1, 2, 3], **DENSE)
    plain = decode(model, prompts, [1, 2, 3], rule=None, **DENSE)
    assert any(one.tokens != two.tokens for one, two in zip(watched, plain, strict=True))


@settings(max_examples=8, deadline=None)
@given(
    run=st.integers(1, 6),
    seed=st.integers(0, 99),
    sample=st.booleans(),
    rows=st.integers(1, 3),
    spec=st.sampled_from(
        [
            {"thresholds": 0.03, "online": False},
            {"thresholds": (0.02, 0.013), "online": False, "max_pending": 2},
        ]
    ),
)
def test_exact_equals_dense_beside_a_constraint(model, run, seed, sample, rows, spec):
    prompts = random_ids(4, batch=rows, seed=seed)

    def made(**how):
        chooser = TokenChooser(sample=sample, seed=seed, batch=rows)
        return list(
            map(outcome, decode(model, prompts, range(run, run + rows), chooser, new=20, **how))
        )

    dense = made(**DENSE)
    assert made(fidelity="exact", **spec) == dense


def test_a_trigger_at_forced_tokens_that_end_a_text_is_of_no_mode(model):
    """Exact mode runs their layers, dense does not; re-weighing has no part in them."""
    made = [
        outcome(
            decode(
                model,
                random_ids(4, batch=2, seed=98),
                [1, 2],
                TokenChooser(sample=True, seed=98, batch=2),
                new=20,
                fidelity=fidelity,
                **({} if fidelity == "dense" else {"thresholds": 0.03, "online": False}),
            )[1]
        )
        for fidelity in ("dense", "exact")
    ]
    assert made[0] == made[1]


def test_in_threshold_mode_tokens_that_do_not_exit_are_re_weighed(model):
    prompts = random_ids(4, batch=2)
    traces = decode(model, prompts, [2, 3], fidelity="threshold", thresholds=0.02)
    assert all(len(trace.tokens) == NEW and trace.triggers for trace in traces)
    assert any(trace.reweighed for trace in traces)


def test_requests_of_an_engine_with_watch_and_constraint_are_what_they_are_alone(model):
    def requests():
        return [
            Request(
                random_ids(4 + row, seed=row)[0].tolist(),
                NEW - row,
                DecodingSpec(gate=False, long_text=RULE, fidelity=fidelity, thresholds=0.02),
                constraint=Rhythm(row + 1),
                end_tokens=(),
            )
            for row, fidelity in enumerate(("dense", "exact", "threshold", "dense"))
        ]

    alone = [run_all(model.engine(max_running=1), [one])[0] for one in requests()]
    assert run_all(model.engine(max_running=3), requests()) == alone


def run_all(engine, requests):
    numbers = [engine.add(one) for one in requests]
    done = {}
    while engine.unfinished:
        for output in engine.step():
            if output.finished is not None:
                done[output.id] = outcome(output.trace)
    return [done[number] for number in numbers]


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("fidelity", ["dense", "exact"])
def test_a_text_made_by_several_requests_is_that_of_one(model, fidelity, hold):
    """Its watch goes along; states that the next request takes over are not run again."""
    prompt = random_ids(6, seed=3)[0].tolist()
    spec = DecodingSpec(gate=False, long_text=RULE, fidelity=fidelity, thresholds=0.02)
    engine = model.engine(max_running=2)
    ((whole, triggers, reweighed),) = run_all(engine, [Request(prompt, NEW, spec, end_tokens=())])
    dice, watch, text, newest = random.Random(1), LongTextWatch(RULE), [], None
    found, count = [], 0
    with engine.constant_weights():
        while len(text) < NEW:
            watch.follow(text)
            size = min(dice.randint(1, 9), NEW - len(text))
            request = Request(
                [*prompt, *text],
                size,
                spec,
                end_tokens=(),
                watch=watch,
                hold=hold,
                after=newest if hold else None,
            )
            newest = engine.add(request)
            ((made, own, few),) = finish(engine)
            found += [(index + len(text), statistic) for index, statistic in own]
            text += made
            count += few
    assert text == whole and count == reweighed
    assert [index for index, _ in triggers] == [index for index, _ in found]


def finish(engine):
    made = []
    while engine.unfinished:
        made += [outcome(one.trace) for one in engine.step() if one.finished is not None]
    return made


def test_a_fork_of_a_watch_leaves_it_as_it_was(model):
    prompt = random_ids(6, seed=3)[0].tolist()
    spec = DecodingSpec(gate=False, long_text=RULE, fidelity="dense")
    watch, engine = LongTextWatch(RULE), model.engine(max_running=2)
    ((text, _, _),) = run_all(engine, [Request(prompt, 12, spec, end_tokens=(), watch=watch)])
    before = [watch.statistic(index) for index in range(20)]
    other = watch.fork()
    other.follow(text)
    run_all(engine, [Request([*prompt, *text], 8, spec, end_tokens=(), watch=other)])
    assert [watch.statistic(index) for index in range(20)] == before
    assert [other.statistic(index) for index in range(12)] == pytest.approx(before[:12])
    assert other.statistic(19) != before[19]


def test_a_watch_with_other_settings_than_its_request_is_refused():
    other = LongTextWatch(dataclasses.replace(RULE, window=5))
    with pytest.raises(DeliberateError, match="give the spec the watch's own settings"):
        Request([1], 4, DecodingSpec(long_text=RULE), watch=other)
