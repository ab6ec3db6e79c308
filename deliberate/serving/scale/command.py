"""`deliberate serve MODEL --replicas N`: replicas on Ray, and the front in this process."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from deliberate.serving.http_server import run_http
from deliberate.serving.ray_app import RayReplicas, engines, sizes_of
from deliberate.serving.scale.fleet_settings import FleetSettings, check_replicable
from deliberate.serving.scale.front import Front
from deliberate.serving.scale.replica import ReplicaOptions
from deliberate.serving.tracing import provider_for, traced
from deliberate.utils.errors import DeliberateError

# Answers are small; the least that Ray takes.
_STORE_BYTES = 80 << 20


def serve_replicas(
    options: ReplicaOptions, fleet: FleetSettings, *, otlp: str | None = None
) -> None:
    """Starts replicas and serves them until SIGTERM or Ctrl-C, which let running requests finish.

    Args:
        otlp: address of a collector of traces of the front; None sends none.

    Raises:
        DeliberateError: a model that cannot be loaded, or replicas that do not start.
    """
    import ray
    from ray import serve

    check_replicable(options.settings)
    traces = None if otlp is None else provider_for(otlp, options.served_name)
    sizes = sizes_of(options, fleet)
    start_ray(fleet)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(proxy_location="Disabled")
        try:
            handle = serve.run(engines(options, fleet, sizes), name="deliberate", route_prefix=None)
        except RuntimeError as error:
            raise DeliberateError(f"the replicas did not start: {error}") from None
        front = Front(RayReplicas(handle), options.settings, sizes.retry_after)
        app = traced(front.app(), traces)
        asyncio.run(run_http(app, front, options.settings, options.served_name))
    finally:
        if traces is not None:
            traces.shutdown()
        serve.shutdown()
        ray.shutdown()


def start_ray(fleet: FleetSettings) -> None:
    """Joins the cluster at the given address, or starts one on this machine, without a dashboard.

    Args:
        fleet: its address, and what its replicas take (Ray gives a process as many OpenMP threads
            as CPUs).

    Raises:
        DeliberateError: Ray's processes did not start in time.
    """
    # By default Ray's workers give way to every other process, which an engine must not.
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    common: dict[str, Any] = {
        "logging_level": logging.WARNING,
        "log_to_driver": False,
        "namespace": "deliberate",
    }
    if fleet.address is not None:
        ray.init(address=fleet.address, **common)
        return
    most = fleet.max_replicas or fleet.replicas
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=max(os.cpu_count() or 1, round(most * fleet.cpus)),
            object_store_memory=_STORE_BYTES,
            **common,
        )
    except Exception as error:  # Ray raises its own, and a plain Exception where a process is late
        reason = " ".join(str(error).split())[:200]
        raise DeliberateError(
            f"Ray did not start on this machine: {reason}; its processes have some 30 s to start: "
            "try again when the machine is less busy, or join a cluster (--ray-address)"
        ) from None
