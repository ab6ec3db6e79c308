"""`deliberate serve MODEL`."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.lifecycle.registry import VersionRegistry
from deliberate.lifecycle.traffic import TrafficLog
from deliberate.lifecycle.version import Source
from deliberate.serving.answer_cache import AnswerCache
from deliberate.serving.app import Server, create_app
from deliberate.serving.life_cycle import LifeCycle, first_version
from deliberate.serving.loading import VersionLoader
from deliberate.serving.metrics import Metrics
from deliberate.serving.served_version import ServedVersion
from deliberate.serving.settings import ServerSettings
from deliberate.serving.traffic import keeper
from deliberate.serving.versions import ServedVersions
from deliberate.utils.errors import DeliberateError

logger = logging.getLogger(__name__)


def build_server(
    model: AdaptiveModel, tokenizer: object, model_name: str, settings: ServerSettings
) -> Server:
    """A server over an engine of `model`, the only version; its service is not started yet."""
    metrics = Metrics(model_name, model.backbone.num_layers)
    version = ServedVersion(model, tokenizer, model_name, settings, metrics)
    versions = ServedVersions(version)
    cache = _answer_cache(settings)
    return Server(versions, metrics, settings, model_name, int(time.time()), cache)


def build_versioned_server(
    given: Source, model_name: str, settings: ServerSettings, *, executor: str = "auto"
) -> Server:
    """A server of the live version of a registry; `given` is live where there is none yet.

    Raises:
        DeliberateError: no registry in the settings, one of another model, or a version that cannot
            be loaded.
    """
    if settings.registry is None:
        raise DeliberateError("a server of versions needs registry: give a folder")
    registry = VersionRegistry(settings.registry)
    live = first_version(registry, given)
    loader = VersionLoader(
        model_name, settings, executor=executor, weights=given.weights, fidelity=given.fidelity
    )
    version = loader.load(live.source, live.id)
    versions = ServedVersions(version)
    if settings.keep_traffic:
        versions.on_live_end = keeper(TrafficLog(settings.registry, settings.keep_traffic))
    return Server(
        versions,
        loader.metrics,
        settings,
        model_name,
        int(time.time()),
        _answer_cache(settings),
        LifeCycle(registry, versions, loader),
    )


def _answer_cache(settings: ServerSettings) -> AnswerCache | None:
    if not settings.cache_entries:
        return None
    return AnswerCache(
        entries=settings.cache_entries,
        seconds=settings.cache_seconds,
        redis_url=settings.redis_url,
    )


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
    if settings.registry is not None:
        given = Source(name, fidelity=fidelity, weights=weights)
        server = build_versioned_server(given, served_name or name, settings, executor=executor)
    else:
        model = AdaptiveModel.from_pretrained(name, executor=executor, weights=weights).eval()
        if fidelity is not None:
            model.fidelity = fidelity
        tokenizer = checkpoint.load_tokenizer(name)
        server = build_server(model, tokenizer, served_name or name, settings)
    server.versions.start()
    try:
        asyncio.run(_run(server, settings))
    finally:
        server.versions.stop()


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
    while server.versions.unfinished and time.monotonic() < end:
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
