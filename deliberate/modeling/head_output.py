"""Output of the LM head after the last layer: logits, and tokens and probabilities on demand."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deliberate.kernels.ops.exit_head import top_probability


class HeadOutput:
    """The full-depth model's predictions after R tokens.

    Args:
        logits: ``[R, V]``.
        tokens, probabilities: the most likely token of each and its probability, where the executor
            computed them along with the logits.
        rounds: that the deliberation gate took over each; empty where there is no gate.
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
        """Rounds that the deliberation gate took over a row."""
        return self.rounds[row] if self.rounds else 0

    def take(self, rows: Sequence[int]) -> HeadOutput:
        """The output of some rows, in this order."""
        if list(rows) == list(range(len(self.logits))):
            return self
        return HeadOutput(
            self.logits[list(rows)],
            None if self._tokens is None else [self._tokens[row] for row in rows],
            None if self._probabilities is None else [self._probabilities[row] for row in rows],
            [self.rounds[row] for row in rows] if self.rounds else (),
        )
