"""Back to a sound state after a step that failed, so that its requests can be run again.

Wherever a step fails, what it has computed of each sequence is dropped down to what was there
before it or is known to be right: the keys and values are computed again from the tokens
(`deliberate.engine.prefill`), which are the request's alone. Nothing that a client has got changes.
"""

from __future__ import annotations

from collections.abc import Sequence

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
