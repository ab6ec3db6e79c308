"""A small model answers, and a large one takes over where the small one is not sure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.cascade import CascadeCalibration, answer_confidence
from deliberate.config import Fidelity
from deliberate.policies.cascade import AnswerTimes, CascadeRule, Model
from deliberate.utils.errors import DeliberateError

_FULL_DEPTH = (Fidelity.DENSE, Fidelity.EXACT)


@torch.inference_mode()
def answer_logprobs(
    model: AdaptiveModel, prompt: Sequence[int], answer: Sequence[int]
) -> list[float]:
    """Log-probability of each token of an answer, by one full-depth pass over prompt and answer."""
    if not answer:
        return []
    backbone = model.backbone_for(1)
    ids = torch.tensor([[*prompt, *answer][:-1]], device=model.device)
    with model.turn():
        ctx = backbone.context(0, ids.shape[1], device=ids.device)
        cache = backbone.new_cache(ids.shape[1])
        hidden = backbone.embed(ids, ctx)
        states = backbone.run_layers(hidden, 0, backbone.num_layers, ctx, cache)
        logits = backbone.logits(states[0, len(prompt) - 1 :]).float()
    chosen = torch.tensor(answer, device=logits.device)
    found = logits.log_softmax(-1).gather(1, chosen[:, None])
    return [float(one) for one in found[:, 0]]


@dataclass(frozen=True)
class CascadeAnswer:
    """What came of one prompt.

    Attributes:
        tokens: of the answer.
        by: which model's it is.
        probability: that the small answer loses nothing; None where it made none.
        seconds: in all.
        kept: whether the deadline was; None without one.
        certified: the threshold is the certificate's, or a more careful one, and no deadline kept
            the large model out.
    """

    tokens: tuple[int, ...]
    by: Model
    probability: float | None
    seconds: float
    kept: bool | None
    certified: bool


class Cascade:
    """Two models of one tokenizer under one budget; greedy answers.

    Args:
        small: answers first, at full depth.
        large: takes over.
        calibration: of the two, in their answers to problems like those that come.
        fidelity: of the large model: dense or exact.
        clock: seconds.

    Attributes:
        times: of each model's answers.

    Raises:
        DeliberateError: other weights than those that were calibrated, or a fidelity under which
            answers are not full depth's.
    """

    def __init__(
        self,
        small: AdaptiveModel,
        large: AdaptiveModel,
        calibration: CascadeCalibration,
        *,
        fidelity: Fidelity | str = Fidelity.EXACT,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        calibration.check_models(small.fingerprints()[0], large.fingerprints()[0])
        if small.backbone.vocab_size != large.backbone.vocab_size:
            raise DeliberateError(
                f"the small model has {small.backbone.vocab_size} tokens, the large one "
                f"{large.backbone.vocab_size}: a cascade needs one tokenizer"
            )
        if fidelity not in _FULL_DEPTH:
            raise DeliberateError(
                f"fidelity={fidelity}: a cascade is calibrated with full depth's answers, so use "
                "dense or exact"
            )
        self.calibration = calibration
        self.times = {Model.SMALL: AnswerTimes(), Model.LARGE: AnswerTimes()}
        self._models = {Model.SMALL: small, Model.LARGE: large}
        self._fidelity = {Model.SMALL: Fidelity.DENSE, Model.LARGE: Fidelity(fidelity)}
        self._clock = clock

    def answer(
        self,
        prompt: Sequence[int],
        *,
        deadline_ms: float | None = None,
        mean_ms: float | None = None,
    ) -> CascadeAnswer:
        """The answer to one prompt.

        Args:
            prompt: token ids.
            deadline_ms: by when the answer should be there. Where the large model does not fit
                after the small one, the small answer is taken; where there is time for the
                large one alone, it answers at once.
            mean_ms: mean time of answers that is to be kept, as far as the measured times are
                known; moves the threshold, below the certified one too.

        Raises:
            DeliberateError: a budget that is not above 0, or that neither model can meet.
        """
        for name, value in (("deadline_ms", deadline_ms), ("mean_ms", mean_ms)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise DeliberateError(f"{name}={value} must be a number above 0, or None")
        began = self._clock()
        end = math.inf if deadline_ms is None else began + deadline_ms / 1000
        certified = self.calibration.threshold
        rule = CascadeRule(certified if mean_ms is None else self._within(mean_ms / 1000))
        small, large = (self.times[one].expected for one in Model)
        by = rule.first(end - began, small, large)
        tokens, probability = self._decode(by, prompt), None
        bound = rule.threshold >= certified
        if by is Model.SMALL:
            logprobs = answer_logprobs(self._models[by], prompt, tokens)
            confidence = answer_confidence(logprobs, self.calibration.measure)
            probability = self.calibration.probability(confidence)
            self.times[by].note(self._clock() - began)
            if rule.hands_over(probability, end - self._clock(), large):
                by = Model.LARGE
                tokens = self._timed(by, prompt)
            elif probability < rule.threshold:
                bound = False  # the deadline kept the large model out
        else:
            self.times[by].note(self._clock() - began)
        done = self._clock()
        kept = None if deadline_ms is None else done <= end
        return CascadeAnswer(tuple(tokens), by, probability, done - began, kept, bound)

    def _within(self, seconds: float) -> float:
        small, large = (self.times[one].mean for one in Model)
        if small is None or large is None:
            return self.calibration.threshold
        return self.calibration.threshold_within(seconds, small, large)

    def _timed(self, by: Model, prompt: Sequence[int]) -> list[int]:
        began = self._clock()
        tokens = self._decode(by, prompt)
        self.times[by].note(self._clock() - began)
        return tokens

    def _decode(self, by: Model, prompt: Sequence[int]) -> list[int]:
        model = self._models[by]
        limit = self.calibration.max_new_tokens
        ids = torch.tensor([list(prompt)], device=model.device)
        made = model.generate(
            ids, max_new_tokens=limit, do_sample=False, fidelity=self._fidelity[by]
        )
        return [int(one) for one in made[0, len(prompt) :]]
