"""How many replicas a server has, and what they may not be started with."""

from __future__ import annotations

from dataclasses import dataclass

from deliberate.serving.settings import ServerSettings
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class FleetSettings:
    """Replicas of one server.

    Attributes:
        replicas: at first, and at least.
        max_replicas: most that the load may call for; None: as many as at first, for good.
        target_wait: seconds that a request may be predicted to wait for a place before there are
            more replicas.
        cpus, gpus: that one replica takes of the cluster's.
        fronts: where a cluster serves, replicas of the HTTP front.
        address: of a running cluster; None starts one on this machine.

    Raises:
        DeliberateError: a value that is not allowed; the message names it.
    """

    replicas: int = 1
    max_replicas: int | None = None
    target_wait: float = 1.0
    cpus: float = 1.0
    gpus: float = 0.0
    fronts: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.fronts < 1:
            raise DeliberateError(
                f"replicas {self.replicas} and fronts {self.fronts} must be at least 1"
            )
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise DeliberateError(
                f"max_replicas {self.max_replicas} is below replicas {self.replicas}"
            )
        if not self.target_wait > 0:
            raise DeliberateError(f"target_wait {self.target_wait} must be more than 0 s")
        if self.cpus < 0 or self.gpus < 0:
            raise DeliberateError(f"cpus {self.cpus} and gpus {self.gpus} must be 0 or more")


def check_replicable(settings: ServerSettings) -> None:
    """Refuses settings that each replica would apply to itself alone.

    Raises:
        DeliberateError: the message names the first of them.
    """
    if settings.registry is not None:
        raise DeliberateError(
            "--replicas with --registry: each replica would change versions by itself; give one "
            "of the two"
        )
    if settings.quota.limited:
        raise DeliberateError(
            "--replicas with quotas: each replica would count for itself; set them in front of the "
            "server, or serve without --replicas"
        )
