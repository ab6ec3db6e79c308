"""Which replica takes a request: a weighted score of speed, free memory, latency and prefix.

Replicas may be unequal: other machines, other loads. Each reports how fast it decodes and how much
of its KV cache is free; the latency is what this request is predicted to take there, with the
requests that were sent since. Everything here is arithmetic on what is given; no clock is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from deliberate.utils.errors import DeliberateError

# Seconds of a token where a replica has not decoded yet: it counts as fast as the fastest known.
_UNKNOWN = 0.0
# Time of a token at full load over that of a request alone, where it is unknown: requests that come
# at once are then spread before any report tells of them.
_GROWTH = 2.0


@dataclass(frozen=True)
class ReplicaState:
    """What is known of one replica.

    Attributes:
        name: of the replica.
        token_seconds: between two tokens of a request that is alone; 0 while unknown.
        full_token_seconds: the same with every place taken; 0 while unknown.
        prompt_seconds: for each token of a prompt; 0 while unknown.
        answer_seconds: that its answers took in the mean, waiting included; 0 while unknown.
        free_memory: free share of its KV cache, from 0 to 1.
        slots: requests that it decodes at a time.
        unfinished: requests that wait or run there.
        shares_prefixes: a prompt's beginning that it has run already costs it nothing again.

    Raises:
        DeliberateError: a value that is not allowed; the message names it.
    """

    name: str
    token_seconds: float = _UNKNOWN
    full_token_seconds: float = _UNKNOWN
    prompt_seconds: float = _UNKNOWN
    answer_seconds: float = _UNKNOWN
    free_memory: float = 1.0
    slots: int = 1
    unfinished: int = 0
    shares_prefixes: bool = False

    def __post_init__(self) -> None:
        for one in ("token_seconds", "full_token_seconds", "prompt_seconds", "answer_seconds"):
            if not 0.0 <= getattr(self, one) < float("inf"):
                raise DeliberateError(f"{one} {getattr(self, one)} must be 0 s or more")
        if not 0.0 <= self.free_memory <= 1.0:
            raise DeliberateError(f"free_memory {self.free_memory} is outside [0, 1]")
        if self.slots < 1 or self.unfinished < 0:
            raise DeliberateError(
                f"slots {self.slots} must be at least 1 and unfinished {self.unfinished} 0 or more"
            )

    @classmethod
    def read(cls, name: str, reported: Mapping[str, Any], unfinished: int) -> ReplicaState:
        """From what a replica reported (numbers by the names above; others are left out)."""
        known = {one.name for one in fields(cls)} - {"name", "unfinished"}
        given = {key: value for key, value in reported.items() if key in known}
        return cls(name, unfinished=unfinished, **given)


@dataclass(frozen=True)
class RequestSize:
    """What a request will ask of a replica.

    Attributes:
        prompt: tokens of it.
        answer: tokens that are expected.
    """

    prompt: int = 1
    answer: int = 1


@dataclass(frozen=True)
class ScoreWeights:
    """How much each part of the score counts; every part lies in [0, 1].

    Attributes:
        latency: the least predicted time over this one's.
        speed: tokens a second over the fastest one's.
        memory: free share of the KV cache.
        prefix: share of the prompt's beginning that the replica has seen.

    Raises:
        DeliberateError: a negative weight, or others that together outweigh the latency: a fast
            replica could then be sent requests however long its queue.
    """

    latency: float = 0.6
    speed: float = 0.1
    memory: float = 0.1
    prefix: float = 0.2

    def __post_init__(self) -> None:
        for one in fields(self):
            if not getattr(self, one.name) >= 0:
                raise DeliberateError(f"weight {one.name}={getattr(self, one.name)} is below 0")
        if not self.latency > self.others:
            raise DeliberateError(
                f"weight latency={self.latency} must be more than the others together "
                f"({self.others:g})"
            )

    @property
    def others(self) -> float:
        """What the other parts can add at most."""
        return self.speed + self.memory + self.prefix

    @property
    def most_times_slower(self) -> float:
        """A request never goes where it is predicted to take more than so many times the least."""
        return self.latency / (self.latency - self.others)


def predicted_seconds(state: ReplicaState, size: RequestSize, matched: float = 0.0) -> float:
    """From now to the end of an answer there.

    Args:
        matched: share of the prompt's beginning that the replica has seen, from 0 to 1.
    """
    saved = matched if state.shares_prefixes else 0.0
    prompt = state.prompt_seconds * size.prompt * (1.0 - saved)
    ahead = max(0, state.unfinished + 1 - state.slots)
    whole = state.answer_seconds or state.full_token_seconds * size.answer
    wait = ahead / state.slots * whole
    return wait + prompt + loaded_token_seconds(state) * size.answer


def loaded_token_seconds(state: ReplicaState) -> float:
    """Between two tokens of one more request, from the time alone to that of a full replica."""
    share = min(state.unfinished, state.slots - 1) / max(1, state.slots - 1)
    return state.token_seconds + share * (state.full_token_seconds - state.token_seconds)


def scores(
    states: Sequence[ReplicaState],
    size: RequestSize,
    matched: Mapping[str, float] | None = None,
    weights: ScoreWeights | None = None,
) -> dict[str, float]:
    """The score of each replica by name; the highest takes the request.

    Args:
        matched: by name, the share of the prompt's beginning that a replica has seen.
    """
    weights = weights or ScoreWeights()
    seen = matched or {}
    known = _completed(states)
    seconds = [predicted_seconds(one, size, seen.get(one.name, 0.0)) for one in known]
    least = min(seconds, default=0.0)
    fastest = min((one.token_seconds for one in known), default=0.0)
    made = {}
    for one, predicted in zip(known, seconds, strict=True):
        latency = least / predicted if predicted > 0 else 1.0
        speed = fastest / one.token_seconds if one.token_seconds > 0 else 1.0
        made[one.name] = (
            weights.latency * latency
            + weights.speed * speed
            + weights.memory * one.free_memory
            + weights.prefix * seen.get(one.name, 0.0)
        )
    return made


def ranked(
    states: Sequence[ReplicaState],
    size: RequestSize,
    matched: Mapping[str, float] | None = None,
    weights: ScoreWeights | None = None,
) -> list[str]:
    """Names from the best on; among equal scores the one with fewer requests comes first."""
    made = scores(states, size, matched, weights)
    loads = {one.name: one.unfinished / one.slots for one in states}
    return sorted(made, key=lambda name: (-made[name], loads[name], name))


def _completed(states: Sequence[ReplicaState]) -> list[ReplicaState]:
    """States whose unknown times are the best known ones, so that a new replica gets requests.

    Where nothing is known of any, a token counts as one second: the order is then by load.
    """

    def best(name: str) -> float:
        return min((v for one in states if (v := getattr(one, name)) > 0), default=0.0)

    token = best("token_seconds") or 1.0
    prompt, answer = best("prompt_seconds"), best("answer_seconds")
    made = []
    for one in states:
        alone = one.token_seconds or token
        made.append(
            replace(
                one,
                token_seconds=alone,
                full_token_seconds=max(alone, one.full_token_seconds or _GROWTH * alone),
                prompt_seconds=one.prompt_seconds or prompt,
                answer_seconds=one.answer_seconds or answer,
            )
        )
    return made
