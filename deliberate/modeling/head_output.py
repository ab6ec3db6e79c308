"""What the head says at full depth: logits, and what is asked of them, computed when asked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deliberate.kernels.ops.exit_head import top_probability


class HeadOutput:
    """The full depth's answers about R tokens.

    Args:
        logits: ``[R, V]``.
        tokens, probabilities: the most likely token of each and its probability, where the executor
            computed them along with the logits.
        rounds: of the deliberation gate over each, empty where there is none.
    """

    __slots__ = ("_probabilities", "_tokens", "logits", "rounds")

    def __init__(
        self,
        logits: Tensor,
        tokens: list[int] | None = None,
        probabilities: list[float] | None = None,
        rounds: Sequence[int] = (),
    ) -> None:
        self.logits = logits
        self.rounds = rounds
        self._tokens = tokens
        self._probabilities = probabilities

    @property
    def tokens(self) -> list[int]:
        """The most likely token of each."""
        if self._tokens is None:
            self._tokens = self.logits.argmax(dim=-1).tolist()
        return self._tokens

    @property
    def probabilities(self) -> list[float]:
        """The probability of each one's most likely token."""
        if self._probabilities is None:
            self._probabilities = top_probability(self.logits)[1].tolist()
        return self._probabilities

    def rounds_of(self, row: int) -> int:
        """Rounds that the gate took over a token."""
        return self.rounds[row] if self.rounds else 0

    def take(self, rows: Sequence[int]) -> HeadOutput:
        """Of some rows, in this order."""
        if list(rows) == list(range(len(self.logits))):
            return self
        return HeadOutput(
            self.logits[list(rows)],
            None if self._tokens is None else [self._tokens[row] for row in rows],
            None if self._probabilities is None else [self._probabilities[row] for row in rows],
            [self.rounds[row] for row in rows] if self.rounds else (),
        )
