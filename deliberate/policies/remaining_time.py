"""How long requests of an engine still run, from the lengths of earlier ones and measured times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deliberate.engine.step_plan import RequestView, SequenceView
from deliberate.policies.lengths import LengthPredictor

View = RequestView | SequenceView


class PredictedRemaining:
    """Remaining time given what a request has got so far.

    Lengths are learnt apart for each power of two of a request's limit, since what clients allow
    says something about what they ask for.

    Args:
        prompt_seconds: of so many tokens of a prompt; None while nothing is known.
        token_seconds: between two tokens while so many are decoded; None likewise.
    """

    def __init__(
        self,
        prompt_seconds: Callable[[int], float | None],
        token_seconds: Callable[[int], float | None],
    ) -> None:
        self._prompt_seconds = prompt_seconds
        self._token_seconds = token_seconds
        self._lengths: dict[int, LengthPredictor] = {}
        self._unfinished: dict[int, tuple[int, int]] = {}

    def see(self, views: Sequence[View]) -> None:
        """All unfinished requests: those that are missing since the last call have ended."""
        now = {one.id: (one.limit, one.made) for one in views}
        for number, (limit, made) in self._unfinished.items():
            if number not in now and made:
                # Its last tokens came after this was noted.
                self._of(limit).observe(min(limit, made + 1) if limit else made + 1)
        self._unfinished = now

    def seconds(self, view: View, running: int) -> float:
        """Of one request while so many are decoded; 0 while nothing is known of the machine."""
        first = view.length if isinstance(view, SequenceView) else view.cached
        prompt = self._prompt_seconds(max(0, view.tokens - first))
        each = self._token_seconds(running)
        if prompt is None or each is None:
            return 0.0
        limit = max(view.limit, view.made + 1)
        return prompt + each * self._of(view.limit).mean(view.made, limit)

    def _of(self, limit: int) -> LengthPredictor:
        return self._lengths.setdefault(limit.bit_length(), LengthPredictor())
