"""A cascade of two tiny random models: who answers, with which tokens, in what time."""

from __future__ import annotations

import math

import pytest
import torch

from deliberate.api.cascade import Cascade, answer_logprobs
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibrator import Calibrator, Form
from deliberate.calibration.cascade import THRESHOLDS, CascadeCalibration, answer_confidence
from deliberate.export.draft import export_draft
from deliberate.policies.cascade import Model
from deliberate.utils.errors import DeliberateError

PROMPTS = [[5 + (7 * place + number) % 900 for place in range(9)] for number in range(6)]
LIMIT = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascade") / "small"
    export_draft("tiny", folder, layer=2)
    return [AdaptiveModel.from_pretrained(one).eval() for one in (folder, "tiny")]


def calibration(models, threshold: float, **given) -> CascadeCalibration:
    """Probability = confidence."""
    plain = Calibrator(Form.LOGISTIC, slope=1.0, intercept=0.0)
    settings = {
        "measure": "least",
        "calibrator": plain,
        "threshold": threshold,
        "epsilon": 0.1,
        "delta": 0.1,
        "n": 400,
        "observed": 0.0,
        "shares": (0.5,) * len(THRESHOLDS),
        "small": models[0].fingerprints()[0],
        "large": models[1].fingerprints()[0],
        "max_new_tokens": LIMIT,
    }
    return CascadeCalibration(**settings | given)


def alone(model, prompt) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    made = model.generate(ids, max_new_tokens=LIMIT, do_sample=False, fidelity="dense")
    return tuple(made[0, len(prompt) :].tolist())


class Clock:
    """A second longer at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_log_probabilities_of_an_answer_are_the_models_own(models) -> None:
    for model in models:
        prompt = PROMPTS[0]
        answer = alone(model, prompt)
        ids = torch.tensor([[*prompt, *answer]])
        with torch.inference_mode():
            logits = model.base(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        places = range(len(prompt) - 1, ids.shape[1] - 1)
        expected = [float(logits[at, ids[0, at + 1]]) for at in places]
        assert answer_logprobs(model, prompt, answer) == pytest.approx(expected, abs=1e-3)
    assert answer_logprobs(models[0], PROMPTS[0], []) == []


@pytest.mark.parametrize("fidelity", ["dense", "exact"])
def test_each_answer_is_one_models_own_by_the_small_ones_confidence(models, fidelity) -> None:
    sure = []
    for prompt in PROMPTS:
        own = alone(models[0], prompt)
        sure.append(answer_confidence(answer_logprobs(models[0], prompt, own), "least"))
    middle = sorted(sure)[len(sure) // 2]
    cascade = Cascade(*models, calibration(models, middle), fidelity=fidelity)
    for prompt, confidence in zip(PROMPTS, sure, strict=True):
        one = cascade.answer(prompt)
        assert one.by is (Model.SMALL if one.probability >= middle else Model.LARGE)
        assert one.probability == pytest.approx(confidence, abs=1e-3)
        assert one.tokens == alone(models[one.by is Model.LARGE], prompt)
        assert one.certified and one.kept is None and one.seconds > 0
    by = [cascade.answer(prompt).by for prompt in PROMPTS]
    assert set(by) == set(Model)


def test_a_deadline_keeps_the_large_model_out_or_takes_it_at_once(models) -> None:
    cascade = Cascade(*models, calibration(models, math.inf), clock=Clock())
    for seconds, model in ((2.0, Model.SMALL), (10.0, Model.LARGE)):
        for _ in range(64):
            cascade.times[model].note(seconds)
    both = cascade.answer(PROMPTS[0], deadline_ms=30_000)
    assert both.by is Model.LARGE and both.probability is not None and both.kept
    at_once = cascade.answer(PROMPTS[0], deadline_ms=11_500)
    assert at_once.by is Model.LARGE and at_once.probability is None and at_once.certified
    small = cascade.answer(PROMPTS[0], deadline_ms=9_000)
    assert small.by is Model.SMALL and small.kept and not small.certified
    with pytest.raises(DeliberateError, match="cannot be met"):
        cascade.answer(PROMPTS[0], deadline_ms=500)


def test_a_mean_time_below_the_certified_one_is_kept_and_said(models) -> None:
    made = calibration(models, 0.9, shares=tuple(1.0 - t for t in reversed(THRESHOLDS)))
    cascade = Cascade(*models, made)
    for model in Model:
        for _ in range(4):
            cascade.times[model].note(0.1 if model is Model.SMALL else 1.0)
    one = cascade.answer(PROMPTS[0], mean_ms=300)
    assert not one.certified
    with pytest.raises(DeliberateError, match="cannot be met"):
        cascade.answer(PROMPTS[0], mean_ms=1)
    with pytest.raises(DeliberateError, match="mean_ms"):
        cascade.answer(PROMPTS[0], mean_ms=-1)


def test_models_that_were_not_calibrated_together_are_refused(models) -> None:
    with pytest.raises(DeliberateError, match="another small model"):
        Cascade(models[1], models[1], calibration(models, 0.5))
    with pytest.raises(DeliberateError, match="fidelity=threshold"):
        Cascade(*models, calibration(models, 0.5), fidelity="threshold")
