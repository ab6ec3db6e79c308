"""A recording of chains that goes on where it was broken off."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from deliberate.reasoning.recorded_chains import (
    ChainCosts,
    ChainSet,
    RecordedChain,
    RecordingHeader,
)
from deliberate.utils.hashing import json_sha256

CHAINS_FILE = "chains.jsonl"
# Seconds of recording after which it is saved.
EVERY = 20.0


class Recording:
    """Chains so far, in the order in which they are recorded; a context that saves them at its end.

    Args:
        folder: where the part is kept, under a name that says what it is of; None: nowhere.
        header: of the file, without costs.
        settings: what the chains depend on besides.
        clock: seconds, monotonic.

    Attributes:
        header: with costs once they are measured.
        chains: those that a recording of the same settings had made first.
    """

    def __init__(
        self,
        folder: Path | None,
        header: RecordingHeader,
        settings: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        named = json_sha256([dataclasses.asdict(header), dict(settings)])[:12]
        self._path = None if folder is None else folder / f"recording-{named}.jsonl"
        self.header = header
        self.chains: list[RecordedChain] = []
        self._clock, self._saved = clock, clock()
        if self._path is not None and self._path.is_file():
            found = ChainSet.load(self._path)
            self.header, self.chains = found.header, list(found.chains)

    def measured(self, costs: ChainCosts | None) -> None:
        """What tokens and probes cost."""
        self.header = dataclasses.replace(self.header, costs=costs)

    def add(self, chains: Sequence[RecordedChain]) -> None:
        """More chains; saved now and then."""
        self.chains += chains
        if self._clock() - self._saved >= EVERY:
            self._save()

    def complete(self) -> ChainSet:
        """All chains, written to `CHAINS_FILE` of the folder in place of the part."""
        made = ChainSet(self.header, tuple(self.chains))
        if self._path is not None:
            made.save(self._path.parent / CHAINS_FILE)
            self._path.unlink(missing_ok=True)
        return made

    def _save(self) -> None:
        self._saved = self._clock()
        if self._path is not None and self.chains:
            ChainSet(self.header, tuple(self.chains)).save(self._path)

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._save()
