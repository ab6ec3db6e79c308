"""A sample of the traffic: greedy prompts and answers, from which policies are fitted."""

from __future__ import annotations

import json
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path

from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import parse_json

TRAFFIC_NAME = "traffic.sqlite"


@dataclass(frozen=True)
class Exchange:
    """One request and its answer, as token ids.

    Attributes:
        prompt, answer: token ids.
        limit: most tokens that the answer might have had.
        dense: the answer is that of full depth.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    limit: int
    dense: bool


class TrafficLog:
    """The newest exchanges, in a file that only its owner can read. Threads may share it.

    Args:
        folder: of the registry.
        most: exchanges that are kept; the oldest go first.

    Raises:
        DeliberateError: a file that is damaged or foreign, or fewer than one.
    """

    def __init__(self, folder: str | Path, most: int = 10_000) -> None:
        if most < 1:
            raise DeliberateError(f"{most} exchanges to keep: at least 1")
        path = Path(folder) / TRAFFIC_NAME
        self._most = most
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS exchanges (number INTEGER PRIMARY KEY AUTOINCREMENT, "
                "prompt TEXT NOT NULL, answer TEXT NOT NULL, most INTEGER NOT NULL, "
                "dense INTEGER NOT NULL) STRICT"
            )
        except (OSError, sqlite3.Error) as error:
            raise DeliberateError(f"{path} cannot be used for traffic: {error}") from None

    def note(self, exchange: Exchange) -> None:
        """Keeps an exchange."""
        row = (
            json.dumps(list(exchange.prompt)),
            json.dumps(list(exchange.answer)),
            exchange.limit,
            int(exchange.dense),
        )
        with self._lock:
            done = self._connection.execute(
                "INSERT INTO exchanges (prompt, answer, most, dense) VALUES (?, ?, ?, ?)", row
            )
            last = (done.lastrowid or 0) - self._most
            self._connection.execute("DELETE FROM exchanges WHERE number <= ?", (last,))

    def exchanges(self) -> list[Exchange]:
        """The newest exchange of every prompt, oldest first."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT prompt, answer, most, dense FROM exchanges "
                "WHERE number IN (SELECT MAX(number) FROM exchanges GROUP BY prompt) "
                "ORDER BY number"
            ).fetchall()
        return [
            Exchange(_ids(prompt), _ids(answer), most, bool(dense))
            for prompt, answer, most, dense in rows
        ]

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._connection.close()


def _ids(text: str) -> tuple[int, ...]:
    return tuple(parse_json(text, "the kept traffic"))
