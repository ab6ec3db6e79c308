"""A server whose small model answers first, and whose large one takes over where that is not sure.

Greedy requests go to the small model's engine. Its answer is handed out once it is whole and sure
enough; otherwise the large model's engine decodes the request as if it had just come. Requests that
the calibration does not cover go to the large model at once (`CascadeService.covers`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from deliberate.api.cascade import Cascade
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.cascade import CascadeCalibration, answer_confidence
from deliberate.config import Fidelity
from deliberate.engine.engine import Engine
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec
from deliberate.policies.cascade import AnswerTimes, CascadeRule, Model
from deliberate.serving.metrics import Metrics
from deliberate.serving.parts import Part, PartStream
from deliberate.serving.served_version import ServedVersion
from deliberate.serving.service import EngineService
from deliberate.serving.settings import ServerSettings
from deliberate.utils.errors import DeliberateError

_FULL_DEPTH = (Fidelity.DENSE, Fidelity.EXACT)


def check_cascade(settings: ServerSettings) -> None:
    """Raises where a setting cannot be obeyed beside a cascade.

    Raises:
        DeliberateError: names it.
    """
    for name, given in (
        ("registry", settings.registry is not None),
        ("cache-entries", settings.cache_entries > 0),
    ):
        if given:
            raise DeliberateError(
                f"--{name} with --cascade: a cascade has no versions and no cache"
            )


class CascadeService(EngineService):
    """The large model's engine, with the small one's in front of it.

    Args:
        engine: of the large model.
        small: of the small one, not started.
        calibration: of both.
        note: called with the name of the model that answers a request, and how many it is.
        **how: as `EngineService`.

    Attributes:
        answered: requests that the calibration covers, by the model that answered them.
    """

    def __init__(
        self,
        engine: Engine,
        small: EngineService,
        calibration: CascadeCalibration,
        *,
        note: Callable[[str, int], None] = lambda *_: None,
        **how: Any,
    ) -> None:
        super().__init__(engine, **how)
        self._note = note
        for model in Model:
            note(model, 0)  # a series that appears with its first event shows no rise
        self.small = small
        self.calibration = calibration
        self.answered = dict.fromkeys(Model, 0)
        self.times = {model: AnswerTimes() for model in Model}
        self.rule = CascadeRule(calibration.threshold)

    def start(self) -> None:
        """Starts both engines' threads."""
        self.small.start()
        super().start()

    def stop(self) -> None:
        """Ends both."""
        self.small.stop()
        super().stop()

    def abandon(self, reason: str) -> None:
        """Ends every request of both with an error."""
        self.small.abandon(reason)
        super().abandon(reason)

    def release(self) -> None:
        """Drops both engines."""
        self.small.release()
        super().release()

    @property
    def trouble(self) -> str | None:
        """Of either engine."""
        return super().trouble or self.small.trouble

    @property
    def unfinished(self) -> int:
        """Requests that wait or run in either engine."""
        return super().unfinished + self.small.unfinished

    def covers(self, request: Request) -> bool:
        """Whether the calibration is of such requests: greedy, full depth's answers, with its limit
        of tokens, without a constraint, a latency budget or log-probabilities."""
        plain = request.sampling is None or request.sampling.plain
        bare = request.constraint is None and request.budget is None
        limit = request.max_new_tokens == self.calibration.max_new_tokens
        full = request.spec.fidelity in _FULL_DEPTH
        return plain and bare and limit and full and request.top_logprobs is None

    def open(self, request: Request) -> PartStream:
        """As `EngineService.open`, by the model that is to answer first."""
        if not self.covers(request):
            return self.open_large(request)
        small, large = (self.times[model].expected for model in Model)
        try:
            first = self.rule.first(self.remaining(request), small, large)
        except DeliberateError:  # whether a deadline is refused is the admission's to say
            first = Model.SMALL
        if first is Model.LARGE:
            self.note_answered(first)
            return self.open_large(request)
        return CascadeParts(self, request)

    def note_answered(self, by: Model) -> None:
        """A request is answered by one of the models."""
        self.answered[by] += 1
        self._note(by, 1)

    def open_large(self, request: Request) -> PartStream:
        """Hands a request to the large model's engine."""
        return super().open(request)

    @staticmethod
    def remaining(request: Request) -> float:
        """Seconds until a request's deadline; infinite without one."""
        if request.deadline is None:
            return float("inf")
        return request.deadline - time.perf_counter()


class CascadeParts(PartStream):
    """The parts of a request: the small model's answer in one, or the large one's as they come."""

    def __init__(self, service: CascadeService, request: Request) -> None:
        self._service = service
        self._request = request
        self._began = time.perf_counter()
        asked = dataclasses.replace(
            request, spec=DecodingSpec(fidelity=Fidelity.DENSE), top_logprobs=0
        )
        self._stream = self._first = service.small.open(asked)
        self._by: Model | None = None  # not known yet

    @property
    def entered(self) -> float:
        """Second at which the small model's engine took the request."""
        return self._first.entered

    @property
    def silent(self) -> bool:
        """Whether nothing has come that was not read."""
        return self._stream.silent

    def put(self, part: Part | Exception) -> None:
        """Ends it as the engine would."""
        self._stream.put(part)

    async def _take(self, most: int | None) -> list[Part]:
        """As `PartStream._take`; the first part comes once the small answer is whole.

        Raises:
            QueueFull: it is handed over, and too many requests wait for the large model.
        """
        if self._by is None:
            one = await self._small_answer()
            if one is not None:
                return [one]
        parts = await self._stream._take(most)
        if parts[-1].finished is not None:
            self._service.times[Model.LARGE].note(time.perf_counter() - self._began)
        return parts

    async def _small_answer(self) -> Part | None:
        """The small model's answer; None where the request was handed over."""
        parts = await self._stream.ready()
        while parts[-1].finished is None:
            parts += await self._stream.ready()
        self._stream.close()
        service, now = self._service, time.perf_counter()
        service.times[Model.SMALL].note(now - self._began)
        logprobs = [one.logprob for part in parts for one in part.logprobs]
        confidence = answer_confidence(logprobs, service.calibration.measure)
        probability = service.calibration.probability(confidence)
        left, large = service.remaining(self._request), service.times[Model.LARGE].expected
        over = service.rule.hands_over(probability, left, large)
        self._by = Model.LARGE if over else Model.SMALL
        service.note_answered(self._by)
        if not over:
            return dataclasses.replace(
                parts[-1],
                tokens=[token for part in parts for token in part.tokens],
                exit_layers=[layer for part in parts for layer in part.exit_layers],
                logprobs=(),
            )
        self._began = now
        self._stream = service.open_large(self._request)
        return None

    def close(self) -> None:
        """It has ended, or nobody reads it any more."""
        self._stream.close()


class CascadeVersion(ServedVersion):
    """One version of a cascade: `ServedVersion` of the large model, with the small one's engine.

    Args:
        small: model, in eval mode.
        calibration: of both models.
        large, tokenizer, model_name, settings, metrics, **given: as of `ServedVersion`.

    Raises:
        DeliberateError: a setting that a cascade cannot obey, or other models than those of the
            calibration.
    """

    def __init__(
        self,
        small: AdaptiveModel,
        calibration: CascadeCalibration,
        large: AdaptiveModel,
        tokenizer: Any,
        model_name: str,
        settings: ServerSettings,
        metrics: Metrics,
        **given: Any,
    ) -> None:
        check_cascade(settings)
        Cascade(small, large, calibration)  # checks that they belong together
        self._small = small
        self._calibration = calibration
        super().__init__(large, tokenizer, model_name, settings, metrics, **given)

    def _serve(self, engine: Engine, **how: Any) -> EngineService:
        limits = {name: how[name] for name in ("max_unfinished", "step_limit")}
        settings = self._parts[2]
        small = EngineService(self._small.engine(max_running=settings.max_running), **limits)
        note = self._parts[3].note_cascade
        return CascadeService(engine, small, self._calibration, note=note, **how)

    def again(self) -> CascadeVersion:
        """The same version with new engines, which are not started; the models are shared."""
        return CascadeVersion(
            self._small,
            self._calibration,
            self.model,
            *self._parts,
            number=self.number,
            builder=self.builder,
        )
