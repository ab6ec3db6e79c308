"""The score of `replica_score` as a request router of Ray Serve."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from cachetools import TTLCache
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deliberate.serving.scale.messages import Call
from deliberate.serving.scale.prefix_affinity import PrefixDirectory
from deliberate.serving.scale.replica_score import ReplicaState, ScoreWeights, ranked

# Requests that were chosen a replica and are not known to have ended; those that were given up
# before they were sent are never reported as ended.
_MOST_SENT, _SENT_SECONDS = 100_000, 600.0


@dataclass
class _Reported:
    """What a replica reported last, and how many requests of this router it had then."""

    stats: dict[str, Any]
    own: int


class ScoreRouter(RequestRouter):
    """Sends each request to the replica with the best score.

    Replicas report their state a few times a second; requests that were sent since are counted
    here. Arguments of `initialize_state` are those of `ScoreWeights`.
    """

    def initialize_state(self, **given: Any) -> None:
        """Called by Ray Serve before the first request."""
        self._weights = ScoreWeights(**given)
        self._prefixes = PrefixDirectory()
        self._sent: TTLCache[str, str] = TTLCache(_MOST_SENT, _SENT_SECONDS, time.monotonic)
        self._reported: dict[str, _Reported] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Every replica is a rank of its own, the best first."""
        call = None if pending_request is None else _call(pending_request)
        by_name = {one.replica_id.unique_id: one for one in candidate_replicas}
        if call is None or pending_request is None:
            return [candidate_replicas]
        states = [self._state(name, one) for name, one in by_name.items()]
        matched = self._prefixes.matched(call.keys, by_name)
        names = ranked(states, call.size, matched, self._weights)
        if names:  # others that come at the same moment count it already
            self._sent[pending_request.metadata.internal_request_id] = names[0]
        return [[by_name[name]] for name in names]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """A replica took the request."""
        name, call = replica_id.unique_id, _call(pending_request)
        self._sent[pending_request.metadata.internal_request_id] = name
        if call is not None:
            self._prefixes.note(call.keys, name)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It has ended, however."""
        self._sent.pop(internal_request_id, None)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Another takes its place with an empty cache and a name of its own."""
        super().on_replica_actor_died(replica_id)
        self._prefixes.forget(replica_id.unique_id)
        self._reported.pop(replica_id.unique_id, None)

    def _state(self, name: str, replica: RunningReplica) -> ReplicaState:
        own = sum(one == name for one in self._sent.values())
        stats = replica.routing_stats
        last = self._reported.get(name)
        if last is None or last.stats is not stats:
            last = self._reported[name] = _Reported(stats, own)
        # Requests of other fronts are in its report only.
        others = max(0, int(stats.get("unfinished", 0)) - last.own)
        return ReplicaState.read(name, stats, own + others)


def _call(pending: PendingRequest) -> Call | None:
    first = pending.args[0] if pending.args else None
    return first if isinstance(first, Call) else None
