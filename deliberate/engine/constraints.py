"""Constraints on the output: which tokens may come next, at exits and at full depth alike.

A constraint is a state machine over the tokens of one sequence, e.g. a grammar's parser. Drafts
advance it and rejected drafts roll it back, so its tokens are always the first ones of the
sequence. Masks are applied to the logits before logits processors, sampling and confidences. What a
constraint allows is a function of the tokens alone; the output of exact mode therefore equals that
of dense decoding under the same constraint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from deliberate.trace import TokenRecord
from deliberate.utils.errors import DeliberateError


class LogitConstraint(Protocol):
    """Which tokens may come next in one sequence. The state is a function of the tokens so far."""

    @property
    def finished(self) -> bool:
        """Whether the output is complete: no token may follow."""
        ...

    def mask(self, scores: Tensor) -> Tensor:
        """Scores ``[V]`` with minus infinity for tokens that may not come next; a new tensor."""
        ...

    def advance(self, token: int) -> None:
        """The sequence continues with this token.

        Raises:
            DeliberateError: it is not allowed here.
        """
        ...

    def rollback(self, count: int) -> None:
        """The last `count` tokens are removed."""
        ...

    def forced(self) -> list[int]:
        """The tokens that must come next, which are emitted without choosing; often none."""
        ...


class ConstraintCursor:
    """A constraint that is moved along the tokens of its sequence.

    It is moved only when it is needed: a token that is drafted advances it when the next one is
    chosen. Verification moves it back to the first draft, and on over each draft that is accepted.

    Args:
        constraint: at the beginning of the output.
    """

    def __init__(self, constraint: LogitConstraint) -> None:
        self._constraint = constraint
        self._held = 0
        self._forced: tuple[int, list[int]] | None = None

    @property
    def held(self) -> int:
        """Tokens that the constraint has been advanced by."""
        return self._held

    def seek(self, records: Sequence[TokenRecord], count: int) -> LogitConstraint:
        """The constraint after the first `count` of the sequence's tokens."""
        if self._held > count:
            self.cut(count)
        while self._held < count:
            self._constraint.advance(records[self._held].token)
            self._held += 1
            self._forced = None
        return self._constraint

    def cut(self, count: int) -> None:
        """The tokens after the first `count` are removed from the sequence."""
        if self._held > count:
            self._constraint.rollback(self._held - count)
            self._held = count
            self._forced = None

    def forced(self, records: Sequence[TokenRecord], count: int) -> list[int]:
        """The tokens that must follow the first `count`."""
        constraint = self.seek(records, count)
        if self._forced is None or self._forced[0] != count:
            self._forced = (count, constraint.forced())
        return self._forced[1]

    def finished(self, records: Sequence[TokenRecord]) -> bool:
        """Whether nothing may follow these tokens."""
        return self.seek(records, len(records)).finished


def only(token: int, like: Tensor) -> Tensor:
    """Scores ``[1, V]`` of a forced token: 0 for it, minus infinity for all others.

    Args:
        like: any tensor of the vocabulary's width, for its device.
    """
    scores = torch.full((1, like.shape[-1]), float("-inf"), device=like.device)
    scores[0, token] = 0.0
    return scores


def check_chosen(token: int, allowed: Tensor, processed: Tensor, index: int, names: str) -> None:
    """Refuses a token that the constraint does not allow, or that nothing allows.

    Args:
        allowed: ``[V]`` after the constraint's mask.
        processed: ``[V]`` after the logits processors.
        index: of the token in the output.
        names: what was done to the logits, for the message.

    Raises:
        DeliberateError: logits processors and constraint leave no token, or contradict each other.
    """
    if processed[token] > float("-inf") and allowed[token] > float("-inf"):
        return
    raise DeliberateError(
        f"the constraint and {names} leave no token at generated token {index}: a logits processor "
        "forbids what the constraint allows; leave out one of them"
    )
