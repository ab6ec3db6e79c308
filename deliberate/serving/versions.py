"""The versions that decode at present: new requests take the live one, old ones end on theirs."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from deliberate.serving.canary import Canary
from deliberate.serving.metrics import VersionState
from deliberate.serving.served_version import Ended, ServedVersion

logger = logging.getLogger(__name__)


class ServedVersions:
    """One live version, perhaps a canary's two arms, and those that finish their last requests.

    All methods are called in the server's event loop, but for `start` and `stop`.

    Args:
        live: the first version; its service is started by `start`.
        draw: a number from [0, 1) for each request while there is a canary.

    Attributes:
        live: takes new requests.
        canary: takes a share of them, where there is one.
        on_live_end: as `ServedVersion.on_end`, of whichever version is live.
    """

    def __init__(self, live: ServedVersion, draw: Callable[[], float] = random.random) -> None:
        self.live = live
        self.on_live_end: Ended | None = None
        self.canary: Canary | None = None
        self._draw = draw
        self._retiring: list[ServedVersion] = []
        self._stopping: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Starts the live version's engine."""
        self.live.on_end = self.on_live_end
        self.live.service.start()

    def stop(self) -> None:
        """Ends every engine; requests that have not finished are given up."""
        for version in self.all:
            version.service.stop()

    @property
    def all(self) -> list[ServedVersion]:
        """Every version that has an engine."""
        arms = () if self.canary is None else (self.canary.candidate, self.canary.control)
        return [self.live, *arms, *self._retiring]

    def role(self, version: ServedVersion) -> str:
        """What a version does: live, canary, control or retiring."""
        if version is self.live:
            return "live"
        if self.canary is not None and version is self.canary.candidate:
            return "canary"
        return "control" if self.canary and version is self.canary.control else "retiring"

    @property
    def states(self) -> list[VersionState]:
        """What each version with an engine does."""
        return [
            VersionState(
                "-" if one.number is None else str(one.number),
                self.role(one),
                one.service.unfinished,
                one.drifted,
            )
            for one in self.all
        ]

    @property
    def unfinished(self) -> int:
        """Requests that wait or run, of any version."""
        return sum(version.service.unfinished for version in self.all)

    def enter(self) -> ServedVersion:
        """The version of a new request, which is pinned to it until it calls `release`."""
        picked = None if self.canary is None else self.canary.pick(self._draw())
        version = picked or self.live
        version.enter()
        return version

    @staticmethod
    async def prepare(version: ServedVersion) -> None:
        """Starts a version's engine and has it decode a token, before anybody depends on it.

        Raises:
            DeliberateError: it cannot; its engine is stopped again.
        """
        version.service.start()
        try:
            await version.warm_up()
        except BaseException:
            await asyncio.to_thread(version.service.stop)
            raise

    def swap(self, version: ServedVersion) -> None:
        """New requests take this version, which is prepared; the live one ends with its last."""
        before, self.live = self.live, version
        before.on_end, version.on_end = None, self.on_live_end
        self.retire(before)

    def replace(self, before: ServedVersion, made: ServedVersion) -> bool:
        """A new engine of the same version takes the place of one that is live or the control.

        Returns:
            False where the one before has no such place any more.
        """
        if before is self.live:
            self.swap(made)
        elif self.canary is not None and before is self.canary.control:
            self.canary.replace_control(made)
            self.retire(before)
        else:
            return False
        return True

    def end_canary(self, *, promote: bool) -> None:
        """No new request takes the arms; with `promote` the candidate is live from now on."""
        canary, self.canary = self.canary, None
        if canary is None:
            return
        canary.close()
        self.retire(canary.control)
        if promote:
            self.swap(canary.candidate)
        else:
            self.retire(canary.candidate)

    def retire(self, version: ServedVersion) -> None:
        """No new request takes this version; its engine and memory go with its last one."""
        self._retiring.append(version)

        def drained() -> None:
            task = asyncio.get_running_loop().create_task(self._end(version))
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)

        version.when_drained(drained)

    async def _end(self, version: ServedVersion) -> None:
        # The thread ends after its step, for which the loop must not wait.
        await asyncio.to_thread(version.service.stop)
        self._retiring.remove(version)
        version.service.release()
        logger.info("version %s has answered its last request", version.number)
