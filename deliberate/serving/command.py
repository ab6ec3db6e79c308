"""`deliberate serve MODEL`."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from pathlib import Path

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.cascade import CascadeCalibration
from deliberate.lifecycle.registry import VersionRegistry
from deliberate.lifecycle.traffic import TrafficLog
from deliberate.lifecycle.version import Source
from deliberate.serving.answer_cache import AnswerCache
from deliberate.serving.app import Server, create_app
from deliberate.serving.cascade import CascadeVersion, check_cascade
from deliberate.serving.http_server import run_http
from deliberate.serving.images import Eyes
from deliberate.serving.life_cycle import LifeCycle, first_version
from deliberate.serving.loading import VersionLoader
from deliberate.serving.metrics import Metrics
from deliberate.serving.served_version import ServedVersion
from deliberate.serving.settings import ServerSettings
from deliberate.serving.tracing import provider_for, traced
from deliberate.serving.traffic import keeper
from deliberate.serving.versions import ServedVersions
from deliberate.utils.errors import DeliberateError

# Seconds for which one thread keeps the interpreter while another waits for it.
_SWITCH = 0.0005


def build_server(
    model: AdaptiveModel,
    tokenizer: object,
    model_name: str,
    settings: ServerSettings,
    eyes: Eyes | None = None,
) -> Server:
    """A server over an engine of `model`, the only version; its service is not started yet.

    Args:
        eyes: of a model that sees, `Eyes.of`; None: it is served for texts alone.
    """
    metrics = Metrics(model_name, model.backbone.num_layers)
    version = ServedVersion(model, tokenizer, model_name, settings, metrics, eyes=eyes)
    versions = ServedVersions(version)
    cache = _answer_cache(settings)
    return Server(versions, metrics, settings, model_name, int(time.time()), cache)


def build_cascade_server(
    cascade: tuple[str, Path],
    model: AdaptiveModel,
    tokenizer: object,
    model_name: str,
    settings: ServerSettings,
    *,
    executor: str = "auto",
) -> Server:
    """A server of a cascade (`deliberate.serving.cascade`); its service is not started yet.

    Requests that name no limit of tokens get the calibration's.

    Args:
        cascade: name of the small model, and file of the calibration.

    Raises:
        DeliberateError: a file that cannot be read, models that were not calibrated together, or a
            setting that a cascade cannot obey.
    """
    name, path = cascade
    calibration = CascadeCalibration.load(path)
    settings = dataclasses.replace(settings, default_new_tokens=calibration.max_new_tokens)
    metrics = Metrics(model_name, model.backbone.num_layers)
    small = AdaptiveModel.from_pretrained(name, executor=executor).eval()
    version = CascadeVersion(small, calibration, model, tokenizer, model_name, settings, metrics)
    versions = ServedVersions(version)
    return Server(versions, metrics, settings, model_name, int(time.time()))


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
    otlp: str | None = None,
    cascade: tuple[str, Path] | None = None,
) -> None:
    """Loads a model and serves it until SIGTERM or Ctrl-C, which let running requests finish.

    Args:
        otlp: address of a collector of traces; None sends none.
        cascade: small model that answers first, and the calibration of both; None for none.

    Raises:
        DeliberateError: a model that cannot be loaded, or a setting that is not allowed.
    """
    if cascade is not None:
        check_cascade(settings)
    traces = None if otlp is None else provider_for(otlp, served_name or name)
    if settings.registry is not None:
        given = Source(name, fidelity=fidelity, weights=weights)
        server = build_versioned_server(given, served_name or name, settings, executor=executor)
    else:
        model = AdaptiveModel.from_pretrained(name, executor=executor, weights=weights).eval()
        if fidelity is not None:
            model.fidelity = fidelity
        tokenizer = checkpoint.load_tokenizer(name)
        if cascade is None:
            eyes = Eyes.of(model, name, settings)
            server = build_server(model, tokenizer, served_name or name, settings, eyes)
        else:
            server = build_cascade_server(
                cascade, model, tokenizer, served_name or name, settings, executor=executor
            )
    # By default a thread may hold the interpreter for 5 ms while another wants it: so long a token
    # that the engine has made could wait to be sent.
    sys.setswitchinterval(_SWITCH)
    server.versions.start()
    try:
        app = traced(create_app(server), traces)
        # Python's own event loop: uvloop keeps the interpreter's lock while a socket is written,
        # and so from the engine's thread whenever the client's process is run first.
        asyncio.run(run_http(app, server, settings, server.model_name))
    finally:
        server.versions.stop()
        if traces is not None:
            traces.shutdown()
