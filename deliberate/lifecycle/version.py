"""One version of what is served, and the states that it may pass through."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from deliberate.utils.errors import DeliberateError


class State(StrEnum):
    """Where a version is in its life."""

    PROPOSED = "proposed"
    """Recorded; decodes nothing."""
    SHADOW = "shadow"
    """Passed the replay of recorded traffic; answers nobody yet."""
    CANARY = "canary"
    """Answers a share of the traffic and is compared with the live version."""
    LIVE = "live"
    """Answers the traffic."""
    RETIRED = "retired"
    """Was live until another version was promoted; a roll-back returns to it."""
    ROLLED_BACK = "rolled_back"
    """Failed; it must be proposed anew to be served again."""


NEXT: Mapping[State, frozenset[State]] = {
    State.PROPOSED: frozenset({State.SHADOW, State.CANARY, State.LIVE, State.ROLLED_BACK}),
    State.SHADOW: frozenset({State.CANARY, State.LIVE, State.ROLLED_BACK}),
    State.CANARY: frozenset({State.LIVE, State.ROLLED_BACK}),
    State.LIVE: frozenset({State.RETIRED, State.ROLLED_BACK}),
    State.RETIRED: frozenset({State.CANARY, State.LIVE, State.ROLLED_BACK}),
    State.ROLLED_BACK: frozenset(),
}
"""States that may follow each state."""


class Kind(StrEnum):
    """What of the served model a version changes."""

    POLICY = "policy"
    EXITS = "exits"
    ADAPTER = "adapter"
    WEIGHTS = "weights"


@dataclass(frozen=True)
class Source:
    """Where a version comes from; everything that is needed to load it again.

    Attributes:
        model: folder, bundled name, GGUF file or hub name; an adapter's folder too.
        calibration: file or folder with the policy and its certificates; None: the model's own.
        fidelity: of requests that name none; None: the model's own.
        thresholds: of requests with fidelity ``threshold`` that name none; None: the exits' own.
        weights: how weights are stored (``"int8"``, ...); None: as the server was started.

    Raises:
        DeliberateError: a value that is not allowed.
    """

    model: str
    calibration: str | None = None
    fidelity: str | None = None
    thresholds: tuple[float, ...] | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "calibration", "fidelity", "weights"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise DeliberateError(f"{name}={value!r} must be a text that is not empty")
        if self.thresholds is not None:
            try:
                made = tuple(math.inf if one is None else float(one) for one in self.thresholds)
            except (TypeError, ValueError):
                made = (math.nan,)
            if any(math.isnan(one) for one in made):
                raise DeliberateError(
                    f"thresholds={self.thresholds!r} must be numbers, one for each exit; null for "
                    "never"
                )
            object.__setattr__(self, "thresholds", made)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        made = {name: value for name, value in asdict(self).items() if value is not None}
        if self.thresholds is not None:
            made["thresholds"] = [None if math.isinf(one) else one for one in self.thresholds]
        return made

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Source:
        """Reads `to_dict`'s form.

        Raises:
            DeliberateError: a missing or unknown key, named.
        """
        known = {one.name for one in fields(cls)}
        unknown = sorted(set(raw) - known)
        if unknown:
            raise DeliberateError(f"a version has no {unknown[0]!r}; it has {', '.join(known)}")
        if "model" not in raw:
            raise DeliberateError("a version needs 'model': a folder or a name")
        return cls(**raw)


@dataclass(frozen=True)
class Version:
    """One version as the registry knows it.

    Attributes:
        id: number, from 1 on, in the order in which versions were proposed.
        kind: what it changes.
        source: how to load it.
        parent: number of the version that it was derived from.
        state: where it is in its life.
        created: ISO time at which it was proposed.
    """

    id: int
    kind: Kind
    source: Source
    parent: int | None
    state: State
    created: str

    def check_next(self, state: State) -> None:
        """Raises unless this state may follow the present one.

        Raises:
            DeliberateError: it may not; the message names those that may.
        """
        if self.state is State.LIVE:
            raise DeliberateError(
                f"version {self.id} is live: promote another one, or roll back to the one before"
            )
        if state not in NEXT[self.state]:
            allowed = ", ".join(sorted(NEXT[self.state])) or "nothing: propose it anew"
            raise DeliberateError(
                f"version {self.id} is {self.state} and cannot become {state}; what may follow is "
                f"{allowed}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "id": self.id,
            "kind": str(self.kind),
            "source": self.source.to_dict(),
            "parent": self.parent,
            "state": str(self.state),
            "created": self.created,
        }


@dataclass(frozen=True)
class Event:
    """One step in the life of a version.

    Attributes:
        version: its number.
        state: that it came to.
        reason: why, in words.
        who: who or what decided it.
        when: ISO time.
        figures: what was measured, JSON-ready.
    """

    version: int
    state: State
    reason: str
    who: str
    when: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"state": str(self.state), "figures": dict(self.figures)}
