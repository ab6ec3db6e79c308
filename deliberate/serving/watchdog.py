"""Replaces an engine that has died or hangs in a step by a new one of the same version.

The requests of the old engine end with status 503, since its step holds whatever it holds. The new
engine has a thread, a cache and statistics of its own and shares the model. After several
replacements in a short time the version is past help: its life cycle rolls it back where there is
an earlier one, and else `/health` goes on saying what is wrong.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from deliberate.lifecycle.registry import VersionRegistry
from deliberate.serving.served_version import ServedVersion
from deliberate.serving.versions import ServedVersions
from deliberate.utils.errors import DeliberateError

logger = logging.getLogger(__name__)
# Replacements of one version within so many seconds, after which it is past help.
_MOST, _WINDOW = 3, 600.0
# Restarts that `/health` names.
_KEPT = 10


@dataclass(frozen=True)
class Restart:
    """An engine was replaced.

    Attributes:
        at: second since 1970.
        version: its number; None without a registry.
        reason: what was wrong.
    """

    at: float
    version: int | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"at": round(self.at, 3), "version": self.version, "reason": self.reason}


class Watchdog:
    """Looks after the engines of all versions; it belongs to the server's event loop.

    Args:
        versions: that decode.
        registry: in which a restart is recorded as an event of the version; None for none.
        note: called at each restart.
        every: seconds between two looks.
        clock: seconds, monotonic.

    Attributes:
        restarts: the newest ones.
    """

    def __init__(
        self,
        versions: ServedVersions,
        registry: VersionRegistry | None = None,
        *,
        note: Callable[[], None] = lambda: None,
        every: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.restarts: deque[Restart] = deque(maxlen=_KEPT)
        self._versions = versions
        self._registry = registry
        self._note = note
        self._every = every
        self._clock = clock
        self._recent: dict[int | None, deque[float]] = {}

    async def watch(self) -> None:
        """Looks for ever."""
        while True:
            await asyncio.sleep(self._every)
            for version in self._versions.all:
                trouble = version.service.trouble
                # A version that has answered its last request is stopped on purpose.
                if trouble is None or version.past_help or version.service.stopped:
                    continue
                try:
                    await self._help(version, trouble)
                except Exception:  # of whatever kind: the other engines must be looked after
                    logger.exception("the engine of version %s was not replaced", version.number)

    async def _help(self, version: ServedVersion, trouble: str) -> None:
        hung = version.service.failure is None
        version.service.abandon(trouble)
        role = self._versions.role(version)
        logger.error("the engine of version %s (%s): %s", version.number, role, trouble)
        if role in ("canary", "retiring"):
            version.past_help = True  # a canary is rolled back, a retiring version has ended
            return
        if hung and not isinstance(version.model.turn(), nullcontext):
            version.past_help = True
            logger.error("its executor has one set of buffers, which the step holds: restart")
            return
        if self._too_often(version.number):
            version.past_help = True
            logger.error("%d engines of version %s went wrong", _MOST, version.number)
            return
        made = await asyncio.to_thread(version.again)
        try:
            await self._versions.prepare(made)
        except DeliberateError as error:
            version.past_help = True
            logger.error("a new engine of version %s cannot decode: %s", version.number, error)
            return
        if not self._versions.replace(version, made):  # something else took its place meanwhile
            await asyncio.to_thread(made.service.stop)
            return
        self.restarts.append(Restart(time.time(), version.number, trouble))
        self._note()
        logger.error("version %s has a new engine", version.number)
        number = version.number
        if self._registry is not None and number is not None:
            registry, reason = self._registry, f"a new engine: {trouble}"
            await asyncio.to_thread(
                lambda: registry.note(number, reason=reason, who="watchdog", figures={})
            )

    def _too_often(self, number: int | None) -> bool:
        """Whether a version had its share of engines; counts the one that is asked for."""
        recent = self._recent.setdefault(number, deque())
        now = self._clock()
        while recent and now - recent[0] > _WINDOW:
            recent.popleft()
        if len(recent) >= _MOST:
            return True
        recent.append(now)
        return False
