"""A server over replicas on Ray Serve: for `deliberate serve --replicas`, and for a cluster.

In a cluster's own configuration file:

    applications:
      - name: deliberate
        import_path: deliberate.serving.ray_app:build
        args: {model: tiny, replicas: 2, max_replicas: 8, settings: {max_running: 16}}

Each replica is a process with one engine. A front (in a cluster a deployment, with ``--replicas``
the command itself) hands requests to them by `scale.ray_router.ScoreRouter`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.installation import install_extra
from deliberate.serving.command import build_server
from deliberate.serving.images import Eyes
from deliberate.serving.scale.fleet_settings import FleetSettings, check_replicable
from deliberate.serving.scale.front import Front
from deliberate.serving.scale.messages import Call, Overloaded, ReplicaLost, Reply
from deliberate.serving.scale.replica import EngineReplica, ReplicaOptions
from deliberate.serving.scale.replica_sizes import ReplicaSizes, replica_sizes
from deliberate.serving.served_version import kept_cost
from deliberate.serving.settings import ServerSettings
from deliberate.utils.errors import DeliberateError

# Nothing is reported to anybody unless the cluster's owner says so.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
try:
    from ray import serve
    from ray.exceptions import RayActorError, TaskCancelledError, WorkerCrashedError
    from ray.serve.exceptions import BackPressureError, RequestCancelledError
    from ray.serve.handle import DeploymentHandle
except ImportError as error:
    raise DeliberateError(f"replicas need {error.name}: {install_extra('ray')}") from None

_STATS_SECONDS = 0.5
_HEALTH_SECONDS = 5.0
ROUTER = "deliberate.serving.scale.ray_router:ScoreRouter"
POLICY = "deliberate.serving.scale.autoscaling:PredictedWaitPolicy"


class EngineDeployment:
    """One replica: an engine in a process of its own.

    Args:
        options: what it serves.
    """

    def __init__(self, options: ReplicaOptions) -> None:
        if options.threads is not None:
            import torch

            torch.set_num_threads(options.threads)
        model = _load(options)
        tokenizer = checkpoint.load_tokenizer(options.model)
        eyes = Eyes.of(model, options.model, options.settings)
        server = build_server(model, tokenizer, options.served_name, options.settings, eyes)
        self._replica = EngineReplica(server)
        self._name = serve.get_replica_context().replica_id.unique_id

    async def answer(self, call: Call) -> AsyncIterator[Reply]:
        """The answer in parts."""
        async for reply in self._replica.answer(call):
            yield reply

    async def whole(self, call: Call) -> Reply:
        """The answer in one message, which costs both sides less than a stream of one part."""
        parts = [reply async for reply in self._replica.answer(call)]
        if not parts:
            raise ReplicaLost
        return Reply(parts[0].status, parts[0].headers, b"".join(one.body for one in parts))

    def health(self) -> tuple[str, dict[str, Any]]:
        """Its name, and what it says of itself."""
        return self._name, self._replica.health() | {"pid": os.getpid()}

    def metrics(self) -> tuple[str, str]:
        """Its name, and its metrics."""
        return self._name, self._replica.metrics()

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        self._replica.check()

    def record_routing_stats(self) -> dict[str, Any]:
        """Called by Ray Serve for the router."""
        return self._replica.routing_state()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve for the autoscaling policy."""
        return self._replica.load()


class FrontDeployment:
    """The HTTP front as a deployment, where a cluster serves it.

    Args:
        engines: the replicas.
        settings: limits of the front.
        retry_after: seconds that a refused client is told to wait.
    """

    def __init__(
        self, engines: DeploymentHandle, settings: ServerSettings, retry_after: int
    ) -> None:
        self._front = Front(RayReplicas(engines), settings, retry_after)

    async def __call__(self, request: Any) -> Any:
        """One HTTP request, as Ray's proxy hands it on."""
        return await self._front.respond(request)


class RayReplicas:
    """Replicas behind a handle of Ray Serve (`scale.messages.Replicas`)."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._answer = handle.options(stream=True, method_name="answer")
        self._whole = handle.options(method_name="whole")

    async def open(self, call: Call) -> AsyncIterator[Reply]:
        """See `scale.messages.Replicas.open`."""
        parts: Any = (self._answer if call.streams else self._whole).remote(call)
        ended = False
        try:
            if call.streams:
                async for reply in parts:
                    yield reply
            else:
                yield await parts
            ended = True
        except BackPressureError as error:
            ended = True
            raise Overloaded(str(error)) from None
        except (RayActorError, WorkerCrashedError, TaskCancelledError, RequestCancelledError):
            ended = True
            raise ReplicaLost from None
        finally:
            if not ended:
                parts.cancel()

    async def metrics(self) -> dict[str, str]:
        """Of every replica that answers."""
        return dict(await self._all("metrics"))

    async def health(self) -> dict[str, dict[str, Any]]:
        """Of every replica that answers."""
        return dict(await self._all("health"))

    async def _all(self, method: str) -> list[tuple[str, Any]]:
        asked = self._handle.broadcast(method)
        try:
            found = await asked.results_async(timeout_s=_HEALTH_SECONDS, return_exceptions=True)
        except TimeoutError:
            return []
        return [one for one in found if not isinstance(one, BaseException)]


def sizes_of(options: ReplicaOptions, fleet: FleetSettings) -> ReplicaSizes:
    """Sizes of a replica from this machine's cost model of the model, where one was measured.

    Raises:
        DeliberateError: the model cannot be loaded.
    """
    settings = options.settings
    return replica_sizes(
        kept_cost(_load(options)),
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        replicas=fleet.replicas,
    )


def engines(options: ReplicaOptions, fleet: FleetSettings, sizes: ReplicaSizes) -> Any:
    """The application of the replicas alone, to be called by a handle."""
    scaling: dict[str, Any] = {"num_replicas": fleet.replicas}
    if fleet.max_replicas is not None:
        scaling = {
            "autoscaling_config": {
                "min_replicas": fleet.replicas,
                "max_replicas": fleet.max_replicas,
                "metrics_interval_s": 1.0,
                "look_back_period_s": 5.0,
                "upscale_delay_s": 2.0,
                "downscale_delay_s": 60.0,
                "policy": {
                    "policy_function": POLICY,
                    "policy_kwargs": {"target_wait": fleet.target_wait},
                },
            }
        }
    deployment: Any = serve.deployment(EngineDeployment)
    sized = deployment.options(
        name="engines",
        max_ongoing_requests=sizes.ongoing,
        max_queued_requests=sizes.queued or -1,
        graceful_shutdown_timeout_s=options.settings.drain_seconds,
        health_check_period_s=1.0,
        health_check_timeout_s=30.0,
        ray_actor_options={"num_cpus": fleet.cpus, "num_gpus": fleet.gpus},
        request_router_config={
            "request_router_class": ROUTER,
            "request_routing_stats_period_s": _STATS_SECONDS,
        },
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        **scaling,
    )
    return sized.bind(options)


def build(args: Mapping[str, Any]) -> Any:
    """The whole application for a cluster's configuration file.

    Args:
        args: fields of `ReplicaOptions` (`settings`: those of `ServerSettings`) and of
            `FleetSettings`.

    Raises:
        DeliberateError: an unknown field, or a value that is not allowed.
    """
    options, fleet = read_arguments(args)
    sizes = sizes_of(options, fleet)
    deployment: Any = serve.deployment(FrontDeployment)
    front = deployment.options(
        name="front",
        num_replicas=fleet.fronts,
        max_ongoing_requests=sizes.queued + fleet.replicas * sizes.ongoing + 1,
        ray_actor_options={"num_cpus": 0},
    )
    handle = engines(options, fleet, sizes)
    return front.bind(handle, options.settings, sizes.retry_after)


def read_arguments(args: Mapping[str, Any]) -> tuple[ReplicaOptions, FleetSettings]:
    """Options and settings from the arguments of a configuration file.

    Raises:
        DeliberateError: an unknown field, none for the model, or a value that is not allowed.
    """
    given = dict(args)
    own = {one.name for one in dataclasses.fields(ReplicaOptions)}
    fleet = {one.name for one in dataclasses.fields(FleetSettings)} - {"address"}
    unknown = sorted(given.keys() - own - fleet)
    if unknown or "model" not in given:
        what = f"{unknown[0]} is unknown" if unknown else "model is missing"
        raise DeliberateError(f"args: {what}; allowed are {', '.join(sorted(own | fleet))}")
    settings = dict(given.pop("settings", None) or {})
    limits = {one.name for one in dataclasses.fields(ServerSettings)}
    unknown = sorted(settings.keys() - limits)
    if unknown:
        raise DeliberateError(
            f"args: settings.{unknown[0]} is unknown; allowed are {', '.join(sorted(limits))}"
        )
    for name in ("api_keys", "reasoning_tags"):
        if settings.get(name) is not None:
            settings[name] = tuple(settings[name])
    made = ServerSettings(**settings)
    check_replicable(made)
    given.setdefault("served_name", given["model"])
    options = {name: value for name, value in given.items() if name in own}
    return (
        ReplicaOptions(**options, settings=made),
        FleetSettings(**{name: value for name, value in given.items() if name in fleet}),
    )


def _load(options: ReplicaOptions) -> AdaptiveModel:
    model = AdaptiveModel.from_pretrained(
        options.model, executor=options.executor, weights=options.weights
    ).eval()
    if options.fidelity is not None:
        model.fidelity = options.fidelity
    return model
