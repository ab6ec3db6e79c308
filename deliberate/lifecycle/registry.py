"""The registry of versions: a SQLite file in which nothing that was acknowledged is ever lost.

Every step in the life of a version is one transaction: the new state, and a line that says why, who
decided it, when and on which figures. SQLite writes ahead to a log and waits for the disk at each
commit (``journal_mode=WAL``, ``synchronous=FULL``): what a method has returned from survives
SIGKILL and a power cut, and what was cut off in the middle never happened. Indexes allow one live
version and one canary at a time, whichever processes write.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deliberate.lifecycle.version import Event, Kind, Source, State, Version
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import parse_json

REGISTRY_NAME = "versions.sqlite"
SCHEMA_VERSION = 1
# Seconds that a writer is given to finish where another one waits.
_PATIENCE = 10.0
_SCHEMA = """
CREATE TABLE versions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    source TEXT NOT NULL,
    parent INTEGER REFERENCES versions (id),
    state TEXT NOT NULL,
    created TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX one_live ON versions (state) WHERE state = 'live';
CREATE UNIQUE INDEX one_canary ON versions (state) WHERE state = 'canary';
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    version INTEGER NOT NULL REFERENCES versions (id),
    state TEXT NOT NULL,
    reason TEXT NOT NULL,
    who TEXT NOT NULL,
    time TEXT NOT NULL,
    figures TEXT NOT NULL
) STRICT;
CREATE TABLE evidence (
    version INTEGER PRIMARY KEY REFERENCES versions (id),
    snapshot TEXT NOT NULL
) STRICT;
"""


class VersionRegistry:
    """Versions, their states and histories, in one folder. Threads and processes may share it.

    Args:
        folder: made where it is missing.
        clock: the present time, for what is recorded.

    Attributes:
        folder: as given; calibrations that were proposed are kept there, too.

    Raises:
        DeliberateError: a file that is damaged, foreign, or of a later release.
    """

    def __init__(
        self, folder: str | Path, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self.folder = Path(folder)
        self._clock = clock
        self._lock = threading.RLock()
        path = self.folder / REGISTRY_NAME
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open(path)
        except (OSError, sqlite3.Error) as error:
            raise DeliberateError(
                f"{path} cannot be used as a registry of versions: {error}"
            ) from None

    def _open(self, path: Path) -> None:
        # Transactions are begun and ended by hand; a lock of ours lets threads take turns.
        self._connection = sqlite3.connect(
            path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
        )
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA foreign_keys = ON")
        with self._transaction():
            (found,) = self._connection.execute("PRAGMA user_version").fetchone()
            if found > SCHEMA_VERSION:
                raise DeliberateError(
                    f"{path} has schema {found}; this release knows {SCHEMA_VERSION}: use a later "
                    "one"
                )
            if found == 0:
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def close(self) -> None:
        """Closes the file; nothing can be read or written afterwards."""
        with self._lock:
            self._connection.close()

    # -- writing -------------------------------------------------------------------------------

    def propose(
        self,
        kind: Kind | str,
        source: Source,
        *,
        reason: str,
        who: str,
        parent: int | None = None,
        figures: Mapping[str, Any] | None = None,
    ) -> Version:
        """Records a new version.

        Raises:
            DeliberateError: an unknown kind, or no such parent.
        """
        kind = _kind(kind)
        with self._transaction():
            if parent is not None:
                self.get(parent)
            done = self._connection.execute(
                "INSERT INTO versions (kind, source, parent, state, created) "
                "VALUES (?, ?, ?, ?, ?)",
                (str(kind), _json(source.to_dict()), parent, str(State.PROPOSED), self._now()),
            )
            assert done.lastrowid is not None
            self._note(done.lastrowid, State.PROPOSED, reason, who, figures)
            return self.get(done.lastrowid)

    def move(
        self,
        version: int,
        state: State | str,
        *,
        reason: str,
        who: str,
        figures: Mapping[str, Any] | None = None,
    ) -> Version:
        """Brings a version to another state; the live version retires where another goes live.

        Raises:
            DeliberateError: no such version, a state that cannot follow, or a second canary.
        """
        wanted = _state(state)
        with self._transaction():
            self.get(version).check_next(wanted)
            if wanted is State.CANARY and (other := self.canary()) is not None:
                raise DeliberateError(
                    f"version {other.id} is the canary already: promote it or roll it back first"
                )
            if wanted is State.LIVE and (before := self.live()) is not None:
                self._set(before.id, State.RETIRED, f"version {version} went live", who, None)
            self._set(version, wanted, reason, who, figures)
            return self.get(version)

    def roll_back_live(
        self, *, reason: str, who: str, figures: Mapping[str, Any] | None = None
    ) -> Version:
        """The live version failed: the version before it goes live again, in one transaction.

        Returns:
            The version that is live now.

        Raises:
            DeliberateError: none is live, or none was live before it.
        """
        with self._transaction():
            failed, before = self.live(), self.previous()
            if failed is None or before is None:
                raise DeliberateError("there is no earlier version to roll back to")
            self._set(failed.id, State.ROLLED_BACK, reason, who, figures)
            why = f"version {failed.id} was rolled back: {reason}"
            self._set(before.id, State.LIVE, why, who, None)
            return self.get(before.id)

    def keep_evidence(self, version: int, snapshot: Mapping[str, Any]) -> None:
        """Replaces what is kept of a comparison in progress, JSON-ready."""
        with self._transaction():
            self.get(version)
            self._connection.execute(
                "INSERT INTO evidence VALUES (?, ?) "
                "ON CONFLICT (version) DO UPDATE SET snapshot = excluded.snapshot",
                (version, _json(snapshot)),
            )

    def note(
        self, version: int, *, reason: str, who: str, figures: Mapping[str, Any] | None = None
    ) -> None:
        """Records something that happened to a version and left its state as it is.

        Raises:
            DeliberateError: no such version.
        """
        with self._transaction():
            self._note(version, self.get(version).state, reason, who, figures)

    def _set(
        self, version: int, state: State, reason: str, who: str, figures: Mapping[str, Any] | None
    ) -> None:
        self._connection.execute(
            "UPDATE versions SET state = ? WHERE id = ?", (str(state), version)
        )
        self._note(version, state, reason, who, figures)

    def _note(
        self, version: int, state: State, reason: str, who: str, figures: Mapping[str, Any] | None
    ) -> None:
        self._connection.execute(
            "INSERT INTO events (version, state, reason, who, time, figures) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (version, str(state), reason, who, self._now(), _json(figures or {})),
        )

    # -- reading -------------------------------------------------------------------------------

    def get(self, version: int) -> Version:
        """One version.

        Raises:
            DeliberateError: there is no such version.
        """
        found = self._select("WHERE id = ?", (version,))
        if not found:
            raise DeliberateError(f"there is no version {version} in {self.folder}")
        return found[0]

    def live(self) -> Version | None:
        """The live version, if there is one."""
        return next(iter(self._select("WHERE state = 'live'")), None)

    def canary(self) -> Version | None:
        """The canary, if there is one."""
        return next(iter(self._select("WHERE state = 'canary'")), None)

    def previous(self) -> Version | None:
        """The version that was live before the present one: the one that retired last."""
        found = self._select(
            "JOIN (SELECT version, MAX(number) AS last FROM events WHERE state = 'retired' "
            "GROUP BY version) ON version = id WHERE state = 'retired' ORDER BY last DESC LIMIT 1"
        )
        return next(iter(found), None)

    def versions(self, limit: int = 100) -> list[Version]:
        """The newest versions, newest first."""
        return self._select("ORDER BY id DESC LIMIT ?", (limit,))

    def history(self, version: int | None = None, limit: int = 1000) -> list[Event]:
        """What happened to a version, or to all, oldest first; the last `limit` of it."""
        where = "" if version is None else "WHERE version = ?"
        values: tuple[int, ...] = (limit,) if version is None else (version, limit)
        with self._lock:
            rows = self._connection.execute(
                f"SELECT version, state, reason, who, time, figures FROM events {where} "
                "ORDER BY number DESC LIMIT ?",
                values,
            ).fetchall()
        return [
            Event(number, State(state), reason, who, time, _parsed(figures))
            for number, state, reason, who, time, figures in reversed(rows)
        ]

    def evidence(self, version: int) -> dict[str, Any] | None:
        """What `keep_evidence` kept last."""
        with self._lock:
            found = self._connection.execute(
                "SELECT snapshot FROM evidence WHERE version = ?", (version,)
            ).fetchone()
        return None if found is None else _parsed(found[0])

    def _select(self, rest: str, values: tuple[Any, ...] = ()) -> list[Version]:
        with self._lock:
            rows = self._connection.execute(
                f"SELECT id, kind, source, parent, versions.state, created FROM versions {rest}",
                values,
            ).fetchall()
        return [
            Version(id_, Kind(kind), Source.from_dict(_parsed(source)), parent, State(state), at)
            for id_, kind, source, parent, state, at in rows
        ]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of the block, or nothing of it; other processes write before it or after it."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise

    def _now(self) -> str:
        return self._clock().isoformat(timespec="milliseconds")


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), allow_nan=False)


def _state(value: State | str) -> State:
    if value not in list(State):
        raise DeliberateError(f"state {value!r} is not one of {', '.join(State)}")
    return State(value)


def _kind(value: Kind | str) -> Kind:
    if value not in list(Kind):
        raise DeliberateError(f"kind {value!r} is not one of {', '.join(Kind)}")
    return Kind(value)


def _parsed(text: str) -> Any:
    return parse_json(text, "the registry of versions", finite=False)
