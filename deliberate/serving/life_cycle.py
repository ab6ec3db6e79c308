"""What happens to versions while a server runs: proposed, promoted, rolled back, each recorded.

The registry is written before what it says is done: a server that is killed in between starts again
with what was recorded. Loading a version and preparing its engine come before both, so that a
version that cannot decode changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from deliberate.lifecycle.registry import VersionRegistry
from deliberate.lifecycle.version import Kind, Source, State, Version
from deliberate.serving.loading import VersionLoader, derived
from deliberate.serving.served_version import ServedVersion
from deliberate.serving.versions import ServedVersions
from deliberate.utils.errors import DeliberateError

FIRST = "the first version of this registry"


class LifeCycle:
    """Changes versions, one change at a time; all methods belong to the server's event loop.

    Args:
        registry: what is recorded.
        versions: what decodes; its live version is the registry's.
        loader: from the one to the other.
    """

    def __init__(
        self, registry: VersionRegistry, versions: ServedVersions, loader: VersionLoader
    ) -> None:
        self.registry = registry
        self.versions = versions
        self._loader = loader
        self._turn = asyncio.Lock()

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
            made = await self._prepared(version)
            await self._recorded(
                made,
                lambda: self.registry.move(
                    number, State.LIVE, reason=reason, who=who, figures=figures
                ),
            )
            self.versions.swap(made)
            return await asyncio.to_thread(self.registry.get, number)

    async def roll_back(
        self, *, reason: str, who: str, figures: Mapping[str, Any] | None = None
    ) -> Version:
        """The live version failed: the one before it is live again. Returns that one.

        Raises:
            DeliberateError: there is none before it, or it cannot be loaded any more.
        """
        async with self._turn:
            before = await asyncio.to_thread(self.registry.previous)
            if before is None:
                raise DeliberateError("there is no earlier version to roll back to")
            made = await self._prepared(before)
            await self._recorded(
                made,
                lambda: self.registry.roll_back_live(reason=reason, who=who, figures=figures),
            )
            self.versions.swap(made)
            return await asyncio.to_thread(self.registry.get, before.id)

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
        decoding = [
            {
                "version": one.number,
                "role": "live" if one is self.versions.live else "retiring",
                "in_flight": one.in_flight,
            }
            for one in self.versions.all
        ]
        return {
            "versions": [one.to_dict() for one in versions],
            "events": [event.to_dict() for event in events],
            "decoding": decoding,
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
