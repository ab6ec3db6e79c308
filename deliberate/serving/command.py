"""`deliberate serve MODEL`."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import signal
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from deliberate import __version__
from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibration import Calibration
from deliberate.cost.cache import fingerprint, recall
from deliberate.cost.model import CostModel
from deliberate.engine.admitted import StepOutput
from deliberate.engine.engine import Engine
from deliberate.engine.scheduler import Scheduler, SchedulerSettings
from deliberate.serving.answer_cache import AnswerCache
from deliberate.serving.app import Server, create_app
from deliberate.serving.metrics import Metrics
from deliberate.serving.pace import Pace
from deliberate.serving.requests import RequestBuilder
from deliberate.serving.service import EngineService
from deliberate.serving.settings import ServerSettings
from deliberate.utils.hashing import json_sha256

logger = logging.getLogger(__name__)


def build_server(
    model: AdaptiveModel, tokenizer: object, model_name: str, settings: ServerSettings
) -> Server:
    """A server over an engine of `model`; its service is not started yet."""
    metrics = Metrics(model_name, model.backbone.num_layers)
    pace = Pace(kept_cost(model))
    prefilled = 0

    def note_step(outputs: list[StepOutput], seconds: float) -> None:
        nonlocal prefilled
        metrics.note_step(outputs, seconds)
        stats, tokens = service.stats, sum(len(output.tokens) for output in outputs)
        ended = sum(output.finished is not None for output in outputs)
        pace.note_step(stats.running + ended, tokens, stats.prefilled - prefilled, seconds)
        prefilled = stats.prefilled

    service = EngineService(
        _engine(model, settings),
        max_unfinished=settings.max_running + settings.max_waiting,
        on_step=note_step,
    )
    builder = RequestBuilder(
        tokenizer,
        model_name,
        model.generation_config,
        model.backbone.learned_positions,
        model.backbone.vocab_size,
        settings,
        draw_seed=lambda: secrets.randbelow(1 << 31),
        measured=lambda: model.guarantees.known_cost(model) is not None,
    )
    return Server(
        service,
        builder,
        metrics,
        settings,
        model_name,
        str(model.fidelity),
        int(time.time()),
        pace,
        _answer_cache(model, settings),
    )


def _answer_cache(model: AdaptiveModel, settings: ServerSettings) -> AnswerCache | None:
    if not settings.cache_entries:
        return None
    return AnswerCache(
        ModelIdentity(model),
        entries=settings.cache_entries,
        seconds=settings.cache_seconds,
        redis_url=settings.redis_url,
    )


class ModelIdentity:
    """A text that changes with whatever of a model changes its answers.

    Args:
        model: that answers.
    """

    def __init__(self, model: AdaptiveModel) -> None:
        self._model = model
        self._seen: Calibration | None = None
        self._policy: str | None = None

    def __call__(self) -> str:
        """As the model is now; about half a millisecond."""
        model = self._model
        executor = model.executor_for(1)[0]
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
    backbone, _ = model.executor_for(1)
    return recall(fingerprint(backbone, model.exit_config, model.gate))


def _engine(model: AdaptiveModel, settings: ServerSettings) -> Engine:
    size, running = settings.block_tokens, settings.max_running
    if size is None:
        return model.engine(max_running=running)
    most = settings.max_prompt_tokens + settings.max_new_tokens
    cache = model.executor_for(running)[0].new_block_cache(
        running * (math.ceil(most / size) + 1), block_size=size, max_rows=running
    )
    scheduler = Scheduler(SchedulerSettings(max_running=running, block_tokens=size))
    return model.engine(max_running=running, cache=cache, scheduler=scheduler)


def serve(
    name: str,
    settings: ServerSettings,
    *,
    served_name: str | None = None,
    executor: str = "auto",
    weights: str | None = None,
    fidelity: str | None = None,
) -> None:
    """Loads a model and serves it until SIGTERM or Ctrl-C, which let running requests finish.

    Raises:
        DeliberateError: a model that cannot be loaded, or a setting that is not allowed.
    """
    model = AdaptiveModel.from_pretrained(name, executor=executor, weights=weights).eval()
    if fidelity is not None:
        model.fidelity = fidelity
    tokenizer = checkpoint.load_tokenizer(name)
    server = build_server(model, tokenizer, served_name or name, settings)
    server.service.start()
    try:
        asyncio.run(_run(server, settings))
    finally:
        server.service.stop()


async def _run(server: Server, settings: ServerSettings) -> None:
    """Runs uvicorn, and drains before it goes down."""
    config = uvicorn.Config(
        create_app(server),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        log_config=None,  # its lines go where the other lines go
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )
    http = _Http(config)
    signalled = asyncio.Event()
    http.on_exit = signalled.set
    if settings.public:
        logger.warning("listening on %s: every machine that reaches it can use it", settings.host)
    task = asyncio.create_task(http.serve())
    while not http.started and not task.done():
        await asyncio.sleep(0.01)
    if http.started:
        port = http.servers[0].sockets[0].getsockname()[1]
        print(f"serving {server.model_name} on http://{settings.host}:{port}", flush=True)
    drain = asyncio.create_task(_drain(server, http, signalled, settings.drain_seconds))
    await task
    drain.cancel()


async def _drain(server: Server, http: _Http, signalled: asyncio.Event, seconds: float) -> None:
    """After a signal: lets running requests finish, for so long at most, then ends the server."""
    await signalled.wait()
    server.draining = True
    end = time.monotonic() + seconds
    while server.service.unfinished and time.monotonic() < end:
        await asyncio.sleep(0.02)
    http.should_exit = True


class _Http(uvicorn.Server):
    """uvicorn that calls `on_exit` at a signal and goes on, so that health can say "draining"."""

    on_exit: Callable[[], None]
    _signalled = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second signal ends it at once."""
        if sig in (signal.SIGTERM, signal.SIGINT) and not self._signalled:
            self._signalled = True
            self.on_exit()
            return
        self.force_exit = self.should_exit = True
