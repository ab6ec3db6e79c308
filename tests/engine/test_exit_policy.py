"""Exit policies: what they are told, and that their decisions are obeyed."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.exit_policy import (
    ExitAnswer,
    ExitPolicy,
    FixedPolicy,
    MonitoredPolicy,
    WrappedPolicy,
    check_policy,
)
from deliberate.engine.sequence import DecodingSequence
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.measures import measure_named
from deliberate.utils.errors import DeliberateError

NEW = 10


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama"), [1, 2, 3])


def run(model: AdaptiveModel, policy: ExitPolicy, ids=None, **settings):
    ids = random_ids(5) if ids is None else ids
    settings = {"fidelity": "threshold", "max_new_tokens": NEW} | settings
    return model.generate(ids, exit_policy=policy, return_dict_in_generate=True, **settings)


class Recorder(ExitPolicy):
    """No token exits; keeps what it is shown."""

    keeps_answers = True

    def __init__(self) -> None:
        self.readings = []

    def decide(self, reading):
        kept = (reading.exit, list(reading.rows), list(reading.confidences), list(reading.tokens))
        self.readings.append((*kept, reading.scores.clone(), reading.states.clone(), reading))
        return [False] * len(reading)


def test_a_reading_has_the_exits_token_scores_states_and_what_earlier_exits_said(model):
    policy = Recorder()
    ids = random_ids(5)
    out = run(model, policy, ids)
    assert len(policy.readings) == 3 * (NEW - 1), "every exit for every token after the first"
    whole = model(out.sequences[:, :-1], output_exit_states=True)
    position = ids.shape[1]
    for place, (k, rows, confidences, tokens, scores, states, reading) in enumerate(
        policy.readings
    ):
        assert (k, rows) == (place % 3, [0])
        state = whole.exits[k][0, position + place // 3]
        torch.testing.assert_close(states[0], state, atol=1e-5, rtol=1e-4)
        logits = model.reader().logits(k, model.backbone.norm(state))
        torch.testing.assert_close(scores[0], logits, atol=1e-4, rtol=1e-4)
        assert tokens == [int(scores[0].argmax())]
        assert confidences[0] == pytest.approx(float(scores[0].softmax(-1).max()), rel=1e-4)
        assert sorted(reading.earlier[0]) == list(range(k))
        for lower, answer in reading.earlier[0].items():
            seen = policy.readings[place - k + lower]
            assert (answer.token, answer.confidence) == (seen[3][0], seen[2][0])
            assert torch.equal(answer.state, seen[5][0])


def test_sequences_are_told_apart_by_their_index_within_the_request(model):
    class Second(Recorder):
        def decide(self, reading):
            super().decide(reading)
            return [row == 1 for row in reading.rows]

    policy = Second()
    out = run(model, policy, torch.cat([random_ids(5), random_ids(5, seed=1)]))
    assert set(out.traces[0].exit_layers) == {4} and 1 in out.traces[1].exit_layers


def test_answers_of_a_rolled_back_text_are_forgotten(model):
    # Every draft of this model is rejected sooner or later, and its place is decoded again.
    class FirstExit(Recorder):
        def decide(self, reading):
            super().decide(reading)
            assert all(set(earlier) <= set(range(reading.exit)) for earlier in reading.earlier)
            return [reading.exit == 1] * len(reading)

    policy = FirstExit()
    ids = random_ids(5)
    out = run(model, policy, ids, fidelity="exact", online=False)
    assert out.traces[0].rejected > 0
    dense = model.generate(ids, fidelity="dense", max_new_tokens=NEW)
    assert out.sequences.tolist() == dense.tolist()
    by_token = [entry for entry in policy.readings if entry[0] == 0]
    assert len(by_token) > NEW - 1, "tokens after a rejected draft are read again"


def test_a_policys_infinite_threshold_leaves_the_exit_unevaluated(model):
    out = run(model, FixedPolicy((math.inf, 0.0, math.inf)))
    assert {k for k, _ in out.batch.reads} == {1}


def test_thresholds_that_a_step_changes_are_obeyed(model):
    class Later(ExitPolicy):
        thresholds = (math.inf,) * 3

        def on_step(self, now, tokens):
            self.thresholds = (0.0 if tokens >= 4 else math.inf,) * 3

    assert run(model, Later()).trace.exit_layers == [4, 4, 4, 4, *[1] * (NEW - 4)]


def test_a_wrapped_policy_decides_as_the_one_within_and_a_monitor_is_told(model):
    counts = []

    class Alternate(ExitPolicy):
        def __init__(self):
            self.steps = 0

        def on_step(self, now, tokens):
            self.steps += 1
            self.thresholds = (0.0 if self.steps % 3 else math.inf, math.inf, math.inf)

        thresholds = (math.inf,) * 3

    plain = run(model, Alternate())
    wrapped = run(model, WrappedPolicy(Alternate()))
    told = run(model, MonitoredPolicy(Alternate(), lambda *both: counts.append(both), every=1))
    assert plain.trace.exit_layers == wrapped.trace.exit_layers == told.trace.exit_layers
    assert 1 in plain.trace.exit_layers and counts
    with pytest.raises(DeliberateError, match="every 0 deep passes: it must be at least 1"):
        MonitoredPolicy(Alternate(), print, every=0)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (FixedPolicy((0.5, 0.5)), "FixedPolicy has 2 thresholds for 3 exits: give one per exit"),
        (object(), "derive it from"),
    ],
)
def test_a_policy_that_cannot_decide_here_is_refused(model, policy, words):
    with pytest.raises(DeliberateError, match=words):
        run(model, policy)
    with pytest.raises(DeliberateError, match=words):
        check_policy(policy, 3)


def test_a_decision_for_each_token_is_required(model):
    class Short(ExitPolicy):
        def decide(self, reading):
            return []

    with pytest.raises(DeliberateError, match="returned 0 decisions for 1 tokens"):
        run(model, Short())
    with pytest.raises(DeliberateError, match="neither thresholds nor decide"):
        run(model, ExitPolicy())


def test_two_ways_of_deciding_are_not_taken_together(model):
    with pytest.raises(DeliberateError, match="exit_policy=FixedPolicy with decide=: give one"):
        run(model, FixedPolicy((0.5, 0.5, 0.5)), decide=lambda *_: True)


# -- confidence of the processed scores ------------------------------------------------------------


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
def test_the_confidence_is_that_of_the_scores_which_the_token_is_taken_from(measure):
    exits = ExitConfig.build(4, [1, 2, 3], measure=measure)
    model = AdaptiveModel(tiny_model("llama"), exits)
    policy = Recorder()
    settings = {"do_sample": True, "temperature": 0.2, "top_k": 5, "seed": 3}
    run(model, policy, **settings)
    score = measure_named(measure).score
    for _, _, confidences, tokens, scores, states, reading in policy.readings:
        raw = model.reader().logits(reading.exit, model.backbone.norm(states[0]))
        assert int(scores[0].isfinite().sum()) == 5, "top-k excludes the others"
        kept = scores[0].isfinite()
        torch.testing.assert_close(scores[0][kept], raw[kept].float() / 0.2, atol=1e-3, rtol=1e-3)
        probabilities = scores[0].double().softmax(-1)
        entropy = -(probabilities[kept] * probabilities[kept].log()).sum()
        best = probabilities.topk(2).values
        expected = {
            "max_prob": best[0],
            "margin": best[0] - best[1],
            "entropy": 1 - entropy / math.log(5),  # of the tokens that are left
        }[measure]
        assert confidences[0] == pytest.approx(float(expected), abs=1e-4)
        assert abs(confidences[0] - float(score(raw)[1])) > 1e-3
        assert tokens[0] in kept.nonzero()


def test_thresholds_compare_the_processed_confidence(model):
    sharp = {"do_sample": True, "temperature": 0.02, "seed": 1}
    policy = FixedPolicy((0.995,) * 3)
    assert set(run(model, policy).trace.exit_layers) == {4}, "raw confidences are below"
    out = run(model, policy, **sharp)
    assert min(out.trace.exit_layers) < 4
    assert all(one.confidence >= 0.995 for one in out.trace.records if one.exit_layer < 4)
    dense = model.generate(random_ids(5), fidelity="dense", max_new_tokens=NEW, **sharp)
    exact = run(model, policy, fidelity="exact", online=False, **sharp)
    assert exact.sequences.tolist() == dense.tolist() and exact.trace.drafted > 0


def test_a_probes_confidence_is_of_the_state_whatever_the_scores():
    model = AdaptiveModel(tiny_model("llama"), ExitConfig.build(4, [1, 2], measure="gate"))
    policy = Recorder()
    run(model, policy, do_sample=True, temperature=0.1, seed=2)
    assert {value for entry in policy.readings for value in entry[2]} == {0.5}


def test_a_monitor_keeps_the_schedule_of_a_policy_that_compares_itself():
    class Comparing(FixedPolicy):
        compare_every, compare_offset = 3, 2

    told = MonitoredPolicy(Comparing((0.5,)), print, every=7, offset=1)
    assert (told.compare_every, told.compare_offset) == (3, 2)
    plain = MonitoredPolicy(FixedPolicy((0.5,)), print, every=7, offset=1)
    assert (plain.compare_every, plain.compare_offset) == (7, 1)


def test_a_sequence_forgets_answers_with_the_text_that_they_followed():
    sequence = DecodingSequence(0, [1, 2], 2, 4)
    for token in (5, 6):
        sequence.draft(token, 1, 0.5, 0.0)
    answer = ExitAnswer(7, 0.5, torch.zeros(2))
    sequence.keep_answer(0, answer)
    assert sequence.earlier_answers(1) == {0: answer} and sequence.earlier_answers(0) == {}
    sequence.roll_back(1)
    sequence.draft(8, 1, 0.5, 0.0)  # as many tokens as before, but another text
    assert sequence.earlier_answers(1) == {}
