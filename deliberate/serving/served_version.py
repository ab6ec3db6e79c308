"""A version that decodes: a model, its engine in a thread, and what reads bodies for it."""

from __future__ import annotations

import dataclasses
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from deliberate import __version__
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibration import Calibration
from deliberate.config import Fidelity
from deliberate.cost.cache import fingerprint, recall
from deliberate.cost.model import CostModel
from deliberate.engine.admitted import StepOutput
from deliberate.engine.engine import Engine
from deliberate.engine.feedback_scheduler import FeedbackScheduler, FeedbackSettings
from deliberate.engine.request import Request
from deliberate.engine.scheduler import Scheduler, SchedulerSettings
from deliberate.engine.spec import DecodingSpec
from deliberate.lifecycle.version import Source
from deliberate.policies.remaining_time import PredictedRemaining
from deliberate.serving.chains import Chains
from deliberate.serving.images import Eyes
from deliberate.serving.metrics import Metrics
from deliberate.serving.pace import Pace
from deliberate.serving.protocol import ChatRequest, CompletionRequest
from deliberate.serving.requests import RequestBuilder
from deliberate.serving.service import EngineService
from deliberate.serving.settings import ServerSettings
from deliberate.trace import GenerationTrace
from deliberate.utils.hashing import json_sha256

# Seconds for which `ModelIdentity.recent` need not hash or compare all weights anew.
_RECENT = 0.05
# Told of a request that ended by itself, its trace (None where it failed), and its seconds.
Ended = Callable[[Request, GenerationTrace | None, float], None]


@dataclass(frozen=True)
class Loaded:
    """A model that was loaded for versions of it.

    Attributes:
        model: as loaded; versions of it with another policy share its weights.
        tokenizer: of it.
        key: what was loaded, and how.
        calibration: that lay beside the model.
        eyes: of a model that sees.
    """

    model: AdaptiveModel
    tokenizer: Any
    key: tuple[str, str | None]
    calibration: Calibration | None
    eyes: Eyes | None = None


class ServedVersion:
    """One model with one engine, which requests are pinned to from their arrival to their end.

    Args:
        model: in eval mode.
        tokenizer: of the model; no other version uses it, or the builder below is that version's.
        model_name: what clients call the model.
        settings: limits.
        metrics: told of every step.
        number: of the version in the registry; None without one.
        thresholds: of requests with fidelity ``threshold`` that name none.
        builder: of another version with the same model and tokenizer.
        eyes: of a model that sees.

    Attributes:
        service: decodes.
        builder: reads bodies.
        chains: runs requests with ``reasoning`` or ``votes``.
        pace: how fast it decodes.
        identity: called for a text that changes with whatever changes its answers.
        in_flight: requests that are pinned to it.
        on_end: called in the engine's thread as `EngineService` calls it, where set.
        loaded, source: what it was made from, where `deliberate.serving.loading` made it.
        past_help: its engine does not decode, and a new one would not either.
    """

    def __init__(
        self,
        model: AdaptiveModel,
        tokenizer: Any,
        model_name: str,
        settings: ServerSettings,
        metrics: Metrics,
        *,
        number: int | None = None,
        thresholds: tuple[float, ...] | None = None,
        builder: RequestBuilder | None = None,
        eyes: Eyes | None = None,
    ) -> None:
        self.model = model
        self.number = number
        self.past_help = False
        self._parts = tokenizer, model_name, settings, metrics
        self.thresholds = None if thresholds is None else list(thresholds)
        self.pace = Pace(kept_cost(model))
        self.identity = ModelIdentity(model)
        self.in_flight = 0
        self.on_end: Ended | None = None
        self.loaded: Loaded | None = None
        self.source: Source | None = None
        self._drained: Callable[[], None] | None = None
        self.service = self._serve(
            _engine(model, settings, self.pace),
            max_unfinished=settings.max_running + settings.max_waiting,
            on_step=self._note_step,
            on_end=self._note_end,
            step_limit=settings.step_seconds,
        )
        self.builder = builder or RequestBuilder(
            tokenizer,
            model_name,
            model.generation_config,
            model.backbone.learned_positions,
            model.backbone.vocab_size,
            settings,
            draw_seed=lambda: secrets.randbelow(1 << 31),
            measured=lambda: model.guarantees.known_cost(model) is not None,
            config=model.base.config,
            eyes=eyes,
        )
        self.chains = Chains(model, self.builder)
        self._metrics = metrics
        self._prefilled = 0

    def _serve(self, engine: Engine, **how: Any) -> EngineService:
        """What decodes; `how` is `EngineService`'s."""
        return EngineService(engine, **how)

    def again(self) -> ServedVersion:
        """The same version with a new engine, which is not started; the model is shared."""
        made = ServedVersion(
            self.model,
            *self._parts,
            number=self.number,
            thresholds=None if self.thresholds is None else tuple(self.thresholds),
            builder=self.builder,
        )
        made.loaded, made.source = self.loaded, self.source
        return made

    def _note_step(self, outputs: list[StepOutput], seconds: float) -> None:
        self._metrics.note_step(outputs, seconds)
        stats, tokens = self.service.stats, sum(len(output.tokens) for output in outputs)
        ended = sum(output.finished is not None for output in outputs)
        fresh = stats.prefilled - self._prefilled
        self.pace.note_step(stats.running + ended, tokens, fresh, seconds)
        self._prefilled = stats.prefilled

    def _note_end(self, request: Request, trace: GenerationTrace | None, seconds: float) -> None:
        call = self.on_end
        if call is not None:
            call(request, trace, seconds)

    @property
    def drifted(self) -> bool:
        """Whether a certificate of its model no longer describes the traffic."""
        return any(state.alarm for state in self.model.guarantees.drift_states())

    def with_defaults(
        self, body: ChatRequest | CompletionRequest
    ) -> ChatRequest | CompletionRequest:
        """The body with the fidelity and the thresholds of this version where it names none."""
        given: dict[str, Any] = {}
        if body.fidelity is None:
            budgeted = body.latency_budget is not None
            given["fidelity"] = "budget" if budgeted else str(self.model.fidelity)
        fidelity = given.get("fidelity", body.fidelity)
        if fidelity == "threshold" and body.thresholds is None and self.thresholds is not None:
            given["thresholds"] = self.thresholds
        return body.model_copy(update=given) if given else body

    async def warm_up(self) -> None:
        """Decodes one token, so that the first client does not pay for what is built on first use.

        Raises:
            DeliberateError: it cannot.
        """
        dense = DecodingSpec(fidelity=Fidelity.DENSE)
        parts = self.service.open(Request([0], 1, spec=dense, end_tokens=()))
        try:
            while (await parts.next()).finished is None:
                pass
        finally:
            parts.close()

    # -- requests that are pinned to it ----------------------------------------------------------

    def enter(self) -> None:
        """A request is pinned to it; only in the server's event loop, as `release`."""
        self.in_flight += 1

    def release(self) -> None:
        """A request has ended."""
        self.in_flight -= 1
        self._check_drained()

    def when_drained(self, call: Callable[[], None]) -> None:
        """Calls once nothing is pinned to it any more: at once, or at the last request's end."""
        self._drained = call
        self._check_drained()

    def _check_drained(self) -> None:
        if self.in_flight == 0 and self._drained is not None:
            call, self._drained = self._drained, None
            call()


class ModelIdentity:
    """A text that changes with whatever of a model changes its answers.

    Args:
        model: that answers.
    """

    def __init__(self, model: AdaptiveModel) -> None:
        self._model = model
        self._seen: Calibration | None = None
        self._policy: str | None = None
        self._text: str | None = None
        self._tensors: list[torch.Tensor] = []
        self._marks: tuple[Any, ...] = ()
        self._until = -math.inf

    def recent(self) -> str:
        """As the model was at most 50 ms ago; as it is now, where its tensors were changed by torch
        or its exits or calibration replaced. Some microseconds: for looking up, not for keeping."""
        now = time.monotonic()
        if self._text is None or now >= self._until or self._marks != self._marked():
            self._text = self()
            self._tensors = [*self._model.parameters(), *self._model.buffers()]
            self._marks, self._until = self._marked(), time.monotonic() + _RECENT
        return self._text

    def _marked(self) -> tuple[Any, ...]:
        model = self._model
        return (
            model.exit_config,
            id(model.calibration),
            *(None if one.is_inference() else one._version for one in self._tensors),
        )

    def __call__(self) -> str:
        """As the model is now; about half a millisecond."""
        model = self._model
        executor = model.backbone_for(1)
        return json_sha256(
            {
                "release": __version__,
                "weights": model.fingerprints(),
                "exits": model.exit_config.to_dict(),
                "policy": self._policy_sha256(model.calibration),
                "executor": [type(executor).__name__, str(getattr(executor, "plan", ""))],
                "dtype": str(next(model.base.parameters()).dtype),
            }
        )

    def _policy_sha256(self, calibration: Calibration | None) -> str | None:
        # A calibration never changes, and its hash takes longer than all the rest.
        if calibration is not self._seen:
            self._policy = None if calibration is None else str(calibration.to_dict()["sha256"])
            self._seen = calibration
        return self._policy


def kept_cost(model: AdaptiveModel) -> CostModel | None:
    """The cost model that was measured for a model on this machine, or None."""
    backbone = model.backbone_for(1)
    return recall(fingerprint(backbone, model.exit_config, model.gate))


def _engine(model: AdaptiveModel, settings: ServerSettings, pace: Pace) -> Engine:
    size, running = settings.block_tokens, settings.max_running
    limits = SchedulerSettings(max_running=running)
    if size is not None:
        limits = dataclasses.replace(limits, block_tokens=size)
    scheduler = Scheduler(limits)
    if settings.scheduler == "feedback":
        remaining = PredictedRemaining(pace.prompt_seconds, pace.token_seconds)
        scheduler = FeedbackScheduler(limits, FeedbackSettings(), remaining)
    if size is None:
        return model.engine(max_running=running, scheduler=scheduler)
    most = settings.max_prompt_tokens + settings.max_new_tokens
    cache = model.backbone_for(running).new_block_cache(
        running * (math.ceil(most / size) + 1), block_size=size, max_rows=running
    )
    return model.engine(max_running=running, cache=cache, scheduler=scheduler)
