"""Drafts of one sequence by a draft layer, with its own keys and values, and by looking them up.

The layer holds one entry for every verified token whose state is known: the state of a position and
the token after it. Entries of drafts are its own outputs; they are dropped before the next draft,
whether the drafts were accepted or not, and those of accepted tokens are written anew from the
model's states.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from deliberate.engine.draft_lengths import DraftLengths
from deliberate.engine.ngram_drafts import NgramDrafts


class DraftRunner(Protocol):
    """What runs a draft layer, see `deliberate.executors.draft_executor.DraftExecutor`."""

    def new_cache(self) -> Any:
        """Keys and values without entries, with `length` and `crop`."""

    def extend(self, cache: Any, states: Tensor, tokens: Sequence[int]) -> Tensor:
        """Appends entries; their outputs ``[n, d]``."""

    def read(self, output: Tensor) -> tuple[int, float]:
        """Token and confidence after an output ``[1, d]``."""


class LayerDrafts:
    """Proposes drafts for one sequence.

    Args:
        runner: runs the layer.
        lengths: the model's estimates of what drafts are worth; shared between generations.
        lookup: n-gram drafts, taken where the layer's first draft agrees; None for none.
        fixed: draft so many each time, whatever it is worth (for tests and measurements).
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        runner: DraftRunner,
        lengths: DraftLengths,
        *,
        lookup: NgramDrafts | None = None,
        fixed: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = runner
        self._lengths = lengths
        self._lookup = lookup
        self._fixed = fixed
        self._clock = clock
        self._cache = runner.new_cache()
        self._first = 0  # position of the first entry: later than 0 where a prefix was cached
        self._waiting: list[Tensor] = []  # states of positions after the last entry
        self._known = 0  # positions whose states were seen
        self._confidences: list[float] = []
        self._looked_up = 0
        self._seconds = 0.0  # of the latest drafts

    @property
    def entries(self) -> int:
        """Entries that the layer holds."""
        return int(self._cache.length)

    def saw(self, position: int, states: Tensor) -> None:
        """The model computed states ``[n, d]`` of positions `position`.. at full depth.

        Those of rejected drafts may be among them; the next call begins before them then.
        """
        if not self._known:
            self._first = position
        if position > self._known and self._known:
            self._start_anew(position)
        keep = position - self._first - self.entries
        if keep < 0:  # a position is run again: its entry follows the newer state
            self._cache.crop(position - self._first)
            self._waiting, keep = [], 0
        held = torch.cat(self._waiting)[:keep] if self._waiting else states[:0]
        self._waiting = [held, states] if len(held) else [states]
        self._known = position + len(states)

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """Drafts after these tokens.

        Args:
            ids: prompt and accepted tokens.
            most: further limit, e.g. of the output's length.
        """
        began = self._clock()
        drafts = self._drafts(ids, most)
        self._seconds = self._clock() - began
        return drafts

    @property
    def cheap_pass(self) -> bool:
        """False: passes in one call of the executor would leave out their states."""
        return False

    def note_single(self, seconds: float) -> None:
        """A pass over the newest token alone took so long."""
        self._lengths.note_single(seconds)
        self._lengths.note_time(seconds + self._seconds, 1)
        if self._lookup is not None:
            self._lookup.note_single(seconds)

    def note_drafts(self, count: int, accepted: int, seconds: float) -> None:
        """A pass over the newest token and `count` drafts took so long; so many were accepted."""
        self._lengths.note_time(seconds + self._seconds, accepted + 1)
        if self._lookup is not None and self._looked_up:
            self._lookup.note_drafts(count, accepted, seconds)
        else:
            self._lengths.note_pass(self._confidences[:count], accepted, seconds)

    def _drafts(self, ids: Sequence[int], most: int) -> list[int]:
        self._confidences, self._looked_up = [], 0
        found = [] if self._lookup is None else self._lookup.propose(ids, most)
        if most > 0 and (self._fixed is not None or self._lengths.begin()):
            output = self._catch_up(ids)
            if output is not None:
                return self._chain(output, most, found)
        self._looked_up = len(found)
        return found

    def _catch_up(self, ids: Sequence[int]) -> Tensor | None:
        """Writes the entries of all tokens whose states are known; the last output ``[1, d]``."""
        end = len(ids) - 1 - self._first  # entries that verified tokens and their states give
        if not self._waiting or end <= self.entries:
            return None
        states = torch.cat(self._waiting)[: end - self.entries]
        begin = self._first + self.entries + 1
        tokens = list(ids[begin : begin + len(states)])
        self._waiting = []
        return self._runner.extend(self._cache, states, tokens)[-1:]

    def _chain(self, output: Tensor, most: int, found: list[int]) -> list[int]:
        """Drafts one after another, as long as it pays.

        Where the first draft is also the first that was looked up, those are taken: they cost
        nothing, and that both agree makes them likely.
        """
        lengths, verified = self._lengths, self.entries
        limit = min(most, lengths.most if self._fixed is None else self._fixed)
        drafts: list[int] = []
        survives, began = 1.0, None
        while len(drafts) < limit:
            token, confidence = self._runner.read(output)
            if began is not None:  # the first one's entry was written with the verified ones
                lengths.note_draft(self._clock() - began)
            if not drafts and found and found[0] == token:
                self._looked_up = len(found)
                return found
            survives *= lengths.accepts(confidence)
            if self._fixed is None and drafts and not lengths.keeps(survives):
                break
            drafts.append(token)
            self._confidences.append(confidence)
            more = self._fixed is not None or lengths.drafts_another(len(drafts), survives)
            if len(drafts) == limit or not more:
                break
            began = self._clock()
            output = self._runner.extend(self._cache, output, [token])
        self._cache.crop(verified)
        return drafts

    def _start_anew(self, position: int) -> None:
        """States between were not seen: entries begin at this position."""
        self._cache.crop(0)
        self._waiting, self._first = [], position
