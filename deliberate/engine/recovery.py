"""Back to a sound state after a step that failed, so that its requests can be run again.

Wherever a step fails, what it has computed of each sequence is dropped down to what was there
before it or is known to be right: the keys and values are computed again from the tokens
(`deliberate.engine.prefill`), which are the request's alone. Nothing that a client has got changes.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

from deliberate.engine.admitted import Admitted, StepOutput
from deliberate.engine.segment_runner import SegmentRunner


class Recovery:
    """What is remembered of a step until it has ended well.

    Args:
        runner: of the engine.

    Attributes:
        outputs: made by the step so far.
    """

    def __init__(self, runner: SegmentRunner) -> None:
        self.outputs: list[StepOutput] = []
        self._runner = runner
        self._before: dict[int, tuple[int, list[int]]] = {}

    def begin(self, running: Sequence[Admitted]) -> None:
        """A step begins, of these at most.

        Only of tokens that exit unverified must be kept how far each layer had run them: all others
        are run through every layer.
        """
        self.outputs = []
        self._before = {
            one.number: (len(one.sequence.records), self._runner.held(one.sequence))
            for one in running
            if _unverified(one) and not one.prefilling
        }

    def rewind(self, entry: Admitted) -> list[int]:
        """Drops what the step made of a request that runs.

        Returns:
            Tokens that each segment's layers are to hold; none for a request without tokens.
        """
        sequence, segments = entry.sequence, len(self._runner.boundaries)
        if sequence.exact:
            sequence.drop_drafts()
        elif entry.number in self._before:
            count, held = self._before[entry.number]
            sequence.cut(count)
            return held
        if not sequence.records:
            return []
        if entry.prefilling and not entry.refill.new:
            return [entry.refill.held(k) for k in range(segments)]
        return [sequence.position] * segments


def _unverified(entry: Admitted) -> bool:
    return bool(entry.sequence.settings.exits) and not entry.sequence.exact


class Recoverable(ABC):
    """The part of an engine that makes it sound again."""

    _lock: threading.RLock
    _recovery: Recovery
    _running: dict[int, Admitted]
    _waiting: dict[int, Admitted]
    _aside: dict[int, Admitted]

    def recover(self) -> tuple[list[StepOutput], list[int]]:
        """Makes the engine sound again: all that ran wait, with their accepted tokens.

        Returns:
            Outputs that the failed step had made, and the numbers of those that ran in it.
        """
        with self._lock:
            numbers = list(self._running)
            for entry in list(self._running.values()):
                self._preempt(entry, self._recovery.rewind(entry))
            outputs, self._recovery.outputs = self._recovery.outputs, []
            return outputs, numbers

    def set_aside(self, numbers: Collection[int] | None) -> None:
        """These are not stepped, nor counted as unfinished, until the next call; None: none."""
        with self._lock:
            self._waiting.update(self._aside)
            self._aside = {}
            for number in numbers or ():
                if number in self._running:
                    self._preempt(self._running[number])
                if number in self._waiting:
                    self._aside[number] = self._waiting.pop(number)

    @abstractmethod
    def _preempt(self, entry: Admitted, held: list[int] | None = None) -> None:
        """Closes a running sequence's row; it waits again, with its accepted tokens."""
