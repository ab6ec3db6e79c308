"""Prefetch: the segment above an exit is launched before the exit's result reaches the host.

Evaluating an exit ends with a copy to the host, and until it arrives the GPU is idle. So the
segment above the exit is launched behind the copy, for the rows that by the device's own count do
not exit. Where the token exits after all, nothing has to be undone: what was written to the cache
lies behind the lengths that the host keeps, and a later pass overwrites it.

`InFlight` records what was launched of one cache, and whether the pass that followed was the
predicted one; a cache has one of its own, so that generations cannot see each other's. `Prefetcher`
has what the executor learns from all of them: at which exits a launch pays.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from deliberate.utils.errors import DeliberateError

# Weight of the newest guess in the running share of right ones.
_NEWEST = 0.1
# The next of several steps is launched early where so many are accepted: a run of drafts ends with
# a discarded pass, which costs about ten times the copy of one result.
_OFTEN = 0.9
# An exit that is not worth it is tried again so often.
_TRY_EVERY = 32


@dataclass(frozen=True, slots=True)
class Launch:
    """A segment that was launched before it was asked for.

    Attributes:
        exit: index of the exit whose answer it did not wait for.
        first, last: its layers are first..last-1.
        rows: cache rows of the pass before it, all of them.
        starts: position of each.
        version: of the cache: rows are renumbered when it changes.
    """

    exit: int
    first: int
    last: int
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    version: int


@dataclass(frozen=True, slots=True)
class LastPass:
    """Rows and positions of a cache's last pass over one token of each row, and where it ended."""

    rows: tuple[int, ...]
    starts: tuple[int, ...]
    last: int


class Prefetcher:
    """What an executor learns of its guesses; it changes the time that decoding takes, no result.

    Args:
        enabled: False never launches anything early.
        least_taken: share of launches that must have been of use, in [0, 1]. A launch that is not
            costs the segment's attention inputs and a return at once of everything else.

    Attributes:
        launched, taken: how often.
    """

    def __init__(self, enabled: bool = False, least_taken: float = 0.5) -> None:
        if not 0.0 <= least_taken <= 1.0:
            raise DeliberateError(f"least_taken {least_taken} is outside [0, 1]")
        self.enabled = enabled
        self.launched = 0
        self.taken = 0
        self._least_taken = least_taken
        self._shares: dict[int, float] = {}
        self._skipped: dict[int, int] = {}
        self._accepted_shares: dict[int, float] = {}

    def worth(self, exit_index: int) -> bool:
        """Whether to launch behind this exit's question now."""
        if not self.enabled:
            return False
        if self._shares.get(exit_index, 1.0) >= self._least_taken:
            return True
        skipped = self._skipped.get(exit_index, 0) + 1
        self._skipped[exit_index] = skipped % _TRY_EVERY
        return skipped == _TRY_EVERY

    def record_accepted(self, exit_index: int, accepted: bool) -> None:
        """Counts whether a token chosen by an exit, several steps in one call, was accepted."""
        share = self._accepted_shares.get(exit_index, 0.0)
        self._accepted_shares[exit_index] = share + _NEWEST * (accepted - share)

    def often_accepted(self, exit_index: int) -> bool:
        """Whether a step is launched before it is known that the one before it is accepted."""
        return self.enabled and self._accepted_shares.get(exit_index, 0.0) >= _OFTEN

    def learn(self, exit_index: int, useful: bool) -> None:
        """Counts whether a launch was of use."""
        self.taken += useful
        share = self._shares.get(exit_index, 1.0)
        self._shares[exit_index] = share + _NEWEST * (useful - share)


class InFlight:
    """What was launched early of one cache.

    Args:
        learned: of the executor.

    Attributes:
        last_pass: the last one of one token a row, which a launch goes on from; None: another one
            was last.
    """

    def __init__(self, learned: Prefetcher) -> None:
        self.last_pass: LastPass | None = None
        self._learned = learned
        self._open: Launch | None = None
        self._going: frozenset[int] = frozenset()
        self._discarded: list[Launch] = []

    @property
    def open(self) -> Launch | None:
        """What was launched and neither taken nor given up yet."""
        return self._open

    def worth(self, exit_index: int) -> bool:
        """Whether to launch behind this exit's question now."""
        return self._open is None and self._learned.worth(exit_index)

    def begin(self, launch: Launch) -> None:
        """A segment has been launched."""
        self._learned.launched += 1
        self._open, self._going = launch, frozenset()

    def answered(self, going: Collection[int]) -> None:
        """The flag has arrived: the rows that the launch was run for."""
        self._going = frozenset(going)

    def take(
        self,
        rows: tuple[int, ...],
        starts: tuple[int, ...],
        counts: tuple[int, ...],
        first: int,
        last: int,
        version: int,
    ) -> int | None:
        """What the open launch has done of a pass: the layer up to which it was run, or None.

        It is none of a pass of other rows or positions, or of several tokens; what was launched is
        then given up. Each launch is taken once.
        """
        launch, self._open = self._open, None
        if launch is None:
            return None
        known = dict(zip(launch.rows, launch.starts, strict=True))
        fits = launch.first == first and launch.last <= last and launch.version == version
        fits = fits and set(counts) == {1} and self._going.issuperset(rows)
        fits = fits and all(known.get(row) == at for row, at in zip(rows, starts, strict=True))
        self._learned.learn(launch.exit, fits)
        if not fits:
            self._discarded.append(launch)
            return None
        return launch.last

    def give_up(self) -> None:
        """What was launched, if anything, will not be used."""
        if self._open is not None:
            self._learned.learn(self._open.exit, False)
            self._discarded.append(self._open)
            self._open = None

    def discard(self, launch: Launch) -> None:
        """Something was launched and will not be used."""
        self._learned.launched += 1
        self._discarded.append(launch)

    def take_discarded(self) -> list[Launch]:
        """Discarded launches since the last call: they were run, and a count of layers has them."""
        found, self._discarded = self._discarded, []
        return found


def give_up(cache: Any) -> None:
    """What was launched early of a cache, if anything, will not be used."""
    flight = in_flight(cache)
    if flight is not None:
        flight.give_up()


def in_flight(cache: Any) -> InFlight | None:
    """Of a cache in memory of fixed address; None of any other, and of None."""
    return getattr(cache, "flight", None)


def launch_above(
    backbone: Any, cache: Any, exit_index: int, layers: Sequence[int], buffers: Any, rows: int
) -> InFlight | None:
    """Launches the segment above an exit for the rows that by the device's count do not exit.

    Args:
        backbone: the executor, a `CudaFusedBackbone`.
        cache: of the pass that ended at the exit; None: nothing is launched.
        layers: of all exits.
        buffers: where the exit was read: ``going`` and ``remaining``.
        rows: rows of which the exit was evaluated.

    Returns:
        What is in flight of the cache, if anything was launched.
    """
    flight = in_flight(cache)
    passed = None if flight is None else flight.last_pass
    if flight is None or passed is None or passed.last != layers[exit_index]:
        return None
    everyone = tuple(range(cache.batch))
    whole = passed.rows == everyone and rows == len(everyone)
    if not whole or not flight.worth(exit_index):
        return None
    first = layers[exit_index]
    last = (*layers, backbone.num_layers)[exit_index + 1]
    workspace = cache.workspace
    step = workspace.step(1)
    step.take_list(buffers.going[: step.listed.rows.shape[0]], buffers.remaining)
    backbone.replay(workspace, step, first, last)
    flight.begin(Launch(exit_index, first, last, passed.rows, passed.starts, cache.version))
    return flight
