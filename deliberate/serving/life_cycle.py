"""What happens to versions while a server runs: proposed, promoted, rolled back, each recorded.

The registry is written before what it says is done: a server that is killed in between starts again
with what was recorded. Loading a version and preparing its engine come before both, so that a
version that cannot decode changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from typing import Any

from deliberate.lifecycle.ab_test import ABSettings, ABTest, Decision, Verdict
from deliberate.lifecycle.registry import VersionRegistry
from deliberate.lifecycle.version import Kind, Source, State, Version
from deliberate.serving.canary import Canary
from deliberate.serving.loading import VersionLoader, derived
from deliberate.serving.probation import Probation
from deliberate.serving.served_version import ServedVersion
from deliberate.serving.versions import ServedVersions
from deliberate.utils.errors import DeliberateError

logger = logging.getLogger(__name__)
FIRST = "the first version of this registry"


class LifeCycle:
    """Changes versions, one change at a time; all methods belong to the server's event loop.

    Args:
        registry: what is recorded.
        versions: what decodes; its live version is the registry's.
        loader: from the one to the other.
        limits: of comparisons.
        watch_seconds: between two looks at engines and certificates.
    """

    def __init__(
        self,
        registry: VersionRegistry,
        versions: ServedVersions,
        loader: VersionLoader,
        *,
        limits: ABSettings | None = None,
        watch_seconds: float = 0.5,
    ) -> None:
        self.registry = registry
        self.versions = versions
        self._loader = loader
        self._limits = limits or ABSettings()
        self._watch_seconds = watch_seconds
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._writing: asyncio.Task[Any] | None = None
        self._changed = False
        self._probation: Probation | None = None

    async def propose(self, changes: Mapping[str, Any], *, reason: str, who: str) -> Version:
        """Records a version that differs from the live one by these fields of `Source`.

        Raises:
            DeliberateError: an unknown field, a file that is not there, or no difference.
        """
        return await asyncio.to_thread(self._propose, dict(changes), reason, who)

    def _propose(self, changes: dict[str, Any], reason: str, who: str) -> Version:
        live = self._live()
        source, kind = derived(live.source, changes)
        return self.registry.propose(kind, source, reason=reason, who=who, parent=live.id)

    async def promote(
        self, number: int, *, reason: str, who: str, figures: Mapping[str, Any] | None = None
    ) -> Version:
        """New requests take this version; those in flight end on theirs.

        Raises:
            DeliberateError: no such version, one that may not go live, or that cannot decode.
        """
        async with self._turn:
            version = await asyncio.to_thread(self.registry.get, number)
            version.check_next(State.LIVE)
            canary = self.versions.canary
            if canary is not None and canary.candidate.number == number:
                await asyncio.to_thread(
                    lambda: self.registry.move(
                        number, State.LIVE, reason=reason, who=who, figures=figures
                    )
                )
                self.versions.end_canary(promote=True)
                return await asyncio.to_thread(self.registry.get, number)
            self._without_canary("promote another version")
            made = await self._prepared(version)
            await self._recorded(
                made,
                lambda: self.registry.move(
                    number, State.LIVE, reason=reason, who=who, figures=figures
                ),
            )
            before = self.versions.live
            self.versions.swap(made)
            self._probation = Probation(made.pace, before.pace)
            return await asyncio.to_thread(self.registry.get, number)

    async def roll_back(
        self, *, reason: str, who: str, figures: Mapping[str, Any] | None = None
    ) -> Version:
        """The canary failed, or where there is none the live version: the one before is live again.

        Returns:
            The version that is live now.

        Raises:
            DeliberateError: there is none before it, or it cannot be loaded any more.
        """
        async with self._turn:
            canary = self.versions.canary
            if canary is not None and canary.candidate.number is not None:
                number = canary.candidate.number
                await asyncio.to_thread(
                    lambda: self.registry.move(
                        number, State.ROLLED_BACK, reason=reason, who=who, figures=figures
                    )
                )
                self.versions.end_canary(promote=False)
                return await asyncio.to_thread(self._live)
            before = await asyncio.to_thread(self.registry.previous)
            if before is None:
                raise DeliberateError("there is no earlier version to roll back to")
            self._probation = None
            made = await self._prepared(before)
            await self._recorded(
                made,
                lambda: self.registry.roll_back_live(reason=reason, who=who, figures=figures),
            )
            self.versions.swap(made)
            return await asyncio.to_thread(self.registry.get, before.id)

    # -- canaries --------------------------------------------------------------------------------

    async def start_canary(self, number: int, share: float, *, reason: str, who: str) -> Version:
        """Gives this version a share of the traffic until the comparison has a verdict.

        Raises:
            DeliberateError: a share outside (0, 0.5], another canary, or a version that may not
                become one or cannot decode.
        """
        if not 0.0 < share <= 0.5:
            raise DeliberateError(
                f"share {share} must be above 0 and 0.5 at most: the control gets as much"
            )
        async with self._turn:
            self._without_canary("start another one")
            version = await asyncio.to_thread(self.registry.get, number)
            version.check_next(State.CANARY)
            arms = await self._arms(version)
            try:
                await asyncio.to_thread(
                    lambda: self.registry.move(
                        number, State.CANARY, reason=reason, who=who, figures={"share": share}
                    )
                )
            except BaseException:
                for arm in arms:
                    await asyncio.to_thread(arm.service.stop)
                raise
            self._begin(arms, share, ABTest(self._limits))
            return await asyncio.to_thread(self.registry.get, number)

    async def resume(self) -> None:
        """Goes on with the canary that the registry has, as of its last evidence."""
        async with self._turn:
            version = await asyncio.to_thread(self.registry.canary)
            if version is None or self.versions.canary is not None:
                return
            test = ABTest(self._limits)
            try:
                history = await asyncio.to_thread(self.registry.history, version.id)
                share = float(history[-1].figures["share"])
                evidence = await asyncio.to_thread(self.registry.evidence, version.id)
                if evidence is not None:
                    test.restore(evidence)
                arms = await self._arms(version)
            except Exception as error:  # of whatever kind: the server must go on without it
                text = f"it cannot be loaded again: {error}"
                logger.warning("version %d is rolled back: %s", version.id, text)
                await asyncio.to_thread(
                    lambda: self.registry.move(
                        version.id, State.ROLLED_BACK, reason=text, who="serve"
                    )
                )
                return
            self._begin(arms, share, test)
            if (verdict := test.verdict()).decision is not Decision.CONTINUE:
                assert self.versions.canary is not None
                self.versions.canary.decide(verdict)

    async def watch(self) -> None:
        """Rolls back a version whose engine is past help, that is slow or expired; for ever."""
        while True:
            await asyncio.sleep(self._watch_seconds)
            for version in self.versions.all[: 1 if self.versions.canary is None else 2]:
                # The watchdog gives a live version new engines first, and none to a canary.
                live = version is self.versions.live
                failure = version.service.failure if version.past_help or not live else None
                if failure is None and version.drifted:
                    failure = "its certificate has expired: the traffic is not what it was made for"
                if failure is None and live and self._probation is not None:
                    failure = self._probation.look()
                if failure is None:
                    continue
                try:
                    if version is self.versions.live and self.versions.canary is not None:
                        await self.roll_back(reason=f"live: {failure}", who="watch")
                    await self.roll_back(reason=failure, who="watch")
                except DeliberateError as error:
                    logger.error("version %s: %s; %s", version.number, failure, error)

    def _begin(self, arms: list[ServedVersion], share: float, test: ABTest) -> None:
        candidate, control = arms
        self.versions.canary = Canary(
            candidate, control, share, test, self._decided, self._evidence_changed
        )

    def _decided(self, verdict: Verdict) -> None:
        canary = self.versions.canary
        assert canary is not None and canary.candidate.number is not None
        how: dict[str, Any] = {
            "reason": verdict.reason,
            "who": "A/B test",
            "figures": canary.test.figures(),
        }
        promote = verdict.decision is Decision.PROMOTE
        self._keep(self._end_canary(canary, promote, how))

    async def _end_canary(self, canary: Canary, promote: bool, how: Mapping[str, Any]) -> None:
        """Promotes or rolls back a canary, where nobody has ended it meanwhile."""
        state = State.LIVE if promote else State.ROLLED_BACK
        async with self._turn:
            if self.versions.canary is canary:
                number = canary.candidate.number or 0
                await asyncio.to_thread(lambda: self.registry.move(number, state, **how))
                self.versions.end_canary(promote=promote)

    def _evidence_changed(self) -> None:
        self._changed = True
        if self._writing is None or self._writing.done():
            self._writing = self._keep(self._write_evidence())

    async def _write_evidence(self) -> None:
        while self._changed and (canary := self.versions.canary) is not None:
            self._changed = False
            number, snapshot = canary.candidate.number, canary.test.snapshot()
            assert number is not None
            await asyncio.to_thread(self.registry.keep_evidence, number, snapshot)

    def _keep(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _arms(self, version: Version) -> list[ServedVersion]:
        """Candidate and control, prepared."""
        live = await asyncio.to_thread(self._live)
        made: list[ServedVersion] = []
        try:
            for one in (version, live):
                made.append(await self._prepared(one))
        except BaseException:
            for arm in made:
                await asyncio.to_thread(arm.service.stop)
            raise
        return made

    def _without_canary(self, what: str) -> None:
        canary = self.versions.canary
        if canary is not None:
            raise DeliberateError(
                f"version {canary.candidate.number} is the canary: promote it or roll it back "
                f"before you {what}"
            )

    async def _prepared(self, version: Version) -> ServedVersion:
        running = self.versions.all
        made = await asyncio.to_thread(self._loader.load, version.source, version.id, running)
        await self.versions.prepare(made)
        return made

    @staticmethod
    async def _recorded(made: ServedVersion, record: Any) -> None:
        try:
            await asyncio.to_thread(record)
        except BaseException:
            await asyncio.to_thread(made.service.stop)
            raise

    def _live(self) -> Version:
        live = self.registry.live()
        if live is None:
            raise DeliberateError(f"no version is live in {self.registry.folder}")
        return live

    async def describe(self) -> dict[str, Any]:
        """Versions, what happened to them, and what decodes at present; JSON-ready."""
        versions = await asyncio.to_thread(self.registry.versions)
        events = await asyncio.to_thread(self.registry.history, None, 200)
        canary = self.versions.canary
        decoding = [
            {
                "version": one.number,
                "role": self.versions.role(one),
                "in_flight": one.in_flight,
                "drifted": one.drifted,
            }
            for one in self.versions.all
        ]
        return {
            "versions": [one.to_dict() for one in versions],
            "events": [event.to_dict() for event in events],
            "decoding": decoding,
            "canary": None if canary is None else {"share": canary.share, **canary.test.figures()},
        }


def first_version(registry: VersionRegistry, given: Source) -> Version:
    """The version that a server begins with: the registry's live one, else the given one.

    Raises:
        DeliberateError: the registry belongs to another model.
    """
    live = registry.live()
    if live is None:
        made = registry.propose(Kind.WEIGHTS, given, reason=FIRST, who="serve")
        return registry.move(made.id, State.LIVE, reason=FIRST, who="serve")
    root = registry.get(1).source
    if root.model != given.model:
        raise DeliberateError(
            f"the registry {registry.folder} began with model {root.model!r}, not {given.model!r}: "
            "serve that one, swap to the other while it runs, or give another folder"
        )
    return live
