"""Constraints on the output: which tokens may come next, at exits and at full depth alike.

A constraint is a state machine over the tokens of one sequence, e.g. a grammar's parser. Drafts
advance it and rejected drafts roll it back, so its tokens are always the first ones of the
sequence. Masks are applied to the logits before logits processors, sampling and confidences. What a
constraint allows is a function of the tokens alone; the output of exact mode therefore equals that
of dense decoding under the same constraint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from deliberate.config import Fidelity, KVMode
from deliberate.engine.spec import DecodingSpec
from deliberate.kernels.native_sampling import ScoreRules
from deliberate.modeling.measures import Measure
from deliberate.trace import TokenRecord
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class SteadyMask:
    """What a constraint does to the scores of several tokens to come, whichever they are.

    Attributes:
        count: tokens that it holds for, at least 1.
        rules: of their scores. Tokens that the rules leave out are chosen by `mask`.
        recent: newest tokens so far, oldest first, as many as the rules depend on or all.
        matched: tokens of the rules' tag that the newest ones have begun.
    """

    count: int
    rules: ScoreRules
    recent: tuple[int, ...] = ()
    matched: int = 0


class LogitConstraint(Protocol):
    """Which tokens may come next in one sequence. The state is a function of the tokens so far.

    A constraint may have ``steady() -> SteadyMask | None``: several tokens can then be chosen in
    one call of the executor; without it, or where it is None, each is chosen by `mask`. Such tokens
    are told by ``passed(token, logprob)`` where it has this method, else by `advance`.
    """

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

    Attributes:
        places: of the tokens that it forced, in the output.
    """

    def __init__(self, constraint: LogitConstraint) -> None:
        self._constraint = constraint
        self.places: set[int] = set()
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

    def steady(self, records: Sequence[TokenRecord]) -> SteadyMask | None:
        """What it does to the tokens after these; None where that is to be asked for each."""
        said = getattr(self.seek(records, len(records)), "steady", None)
        return None if said is None else said()

    def passed(self, records: Sequence[TokenRecord], logprobs: Sequence[float]) -> None:
        """Moves over tokens that were chosen as `steady` says.

        Args:
            records: of the sequence, those tokens last.
            logprobs: of each of those tokens, by the model's own logits.
        """
        pass_by = getattr(self._constraint, "passed", None)
        for record, logprob in zip(records[self._held :], logprobs, strict=True):
            if pass_by is None:
                self._constraint.advance(record.token)
            else:
                pass_by(record.token, logprob)
            self._held += 1
        self._forced = None

    def cut(self, count: int) -> None:
        """The tokens after the first `count` are removed from the sequence."""
        if self._held > count:
            self._constraint.rollback(self._held - count)
            self._held = count
            self.places = {place for place in self.places if place <= count}
            self._forced = None

    def forced(self, records: Sequence[TokenRecord], count: int) -> list[int]:
        """The tokens that must follow the first `count`."""
        constraint = self.seek(records, count)
        if self._forced is None or self._forced[0] != count:
            self._forced = (count, constraint.forced())
            self.places.update(range(count, count + len(self._forced[1])))
        return self._forced[1]

    def finished(self, records: Sequence[TokenRecord]) -> bool:
        """Whether nothing may follow these tokens."""
        return self.seek(records, len(records)).finished

    def allowed(self, records: Sequence[TokenRecord], tokens: Sequence[int]) -> list[int]:
        """The first of these tokens that may follow in this order and do not end the output."""
        constraint = self.seek(records, len(records))
        fitting: list[int] = []
        for token in tokens:
            try:
                constraint.advance(token)
            except DeliberateError:
                break
            fitting.append(token)
            if constraint.finished:
                break
        finished = constraint.finished
        if fitting:
            constraint.rollback(len(fitting))
        return fitting[:-1] if finished else fitting

    def finishes(self, records: Sequence[TokenRecord], token: int) -> bool:
        """Whether nothing may follow once this token has."""
        constraint = self.seek(records, len(records))
        constraint.advance(token)
        finished = constraint.finished
        constraint.rollback(1)
        return finished


def check_constrained(spec: DecodingSpec, rope_switch: int | None) -> None:
    """Refuses what cannot be obeyed together with a constraint.

    Args:
        spec: with its fidelity.
        rope_switch: length at which the model's rotary frequencies change, or None.

    Raises:
        DeliberateError: names the setting and what to use instead.
    """
    reason = None
    if spec.fidelity in (Fidelity.CERTIFIED, Fidelity.BUDGET):
        reason = (
            f"fidelity {str(spec.fidelity)!r}: its calibration is of unconstrained text; use "
            "dense, exact or threshold"
        )
    elif spec.kv_mode is not KVMode.DEFER:
        reason = f"kv_mode {str(spec.kv_mode)!r}: forced tokens run in one pass; use 'defer'"
    elif spec.strict is not False:
        reason = f"strict={spec.strict!r}: forced tokens run in one pass; leave strict out"
    elif rope_switch is not None:
        reason = (
            "a model whose rotary frequencies change at a length: a pass over forced tokens may "
            "cross it; use another model"
        )
    if reason is not None:
        raise DeliberateError(f"structured output, or a limit of reasoning, with {reason}")


def only(token: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Scores ``[1, width]`` of a forced token: 0 for it, minus infinity for all others."""
    scores = torch.full((1, width), float("-inf"), device=device)
    scores[0, token] = 0.0
    return scores


def confidence_of(measure: Measure, logits: Tensor) -> float:
    """Confidence of an exit in the most likely of the tokens that a mask has left.

    Args:
        measure: one of the exit's logits.
        logits: ``[V]``, minus infinity for tokens that may not come next.
    """
    left = logits[logits > float("-inf")]
    return 1.0 if len(left) < 2 else float(measure.score(left)[1])


class Constrained(Protocol):
    """What is read of a sequence that a token is chosen for.

    Attributes:
        constraint: None where every token may come next.
        records: its tokens so far.
        chooser: how its logits become tokens.
    """

    constraint: ConstraintCursor | None
    records: list[TokenRecord]
    chooser: Any


def masked(logits: Tensor, places: Sequence[tuple[Constrained, int]]) -> Tensor:
    """Logits ``[R, V]`` with minus infinity for tokens that may not come next.

    Args:
        places: of each row its sequence and the index of the token in its output.
    """
    rows = []
    for row, (sequence, index) in zip(logits, places, strict=True):
        cursor = sequence.constraint
        rows.append(row if cursor is None else cursor.seek(sequence.records, index).mask(row))
    return torch.stack(rows)


def choose_constrained(
    logits: Tensor,
    places: Sequence[tuple[Any, int]],
    choose: Callable[[Tensor, Any, bool], list[tuple[int, Tensor]]],
    *,
    drafting: bool,
) -> list[tuple[int, Tensor]]:
    """Token and scores ``[1, V]`` of each row of ``[R, V]``, as its sequence's constraint allows.

    A token that is forced is taken whatever the logits are.

    Args:
        places: of each row its sequence (`Constrained`) and the index of the token in its output.
        choose: the same without constraints, from masked logits.
        drafting: full depth may reject the tokens. A draft is -1 where logits processors forbid all
            that the constraint allows.

    Raises:
        DeliberateError: unless drafting, where they do.
    """
    chosen: dict[int, tuple[int, Tensor]] = {}
    for row, (sequence, index) in enumerate(places):
        if sequence.constraint is not None:
            following = sequence.constraint.forced(sequence.records, index)
            if following:
                scores = only(following[0], logits.shape[-1], logits.device)
                chosen[row] = following[0], scores
    free = [row for row in range(len(places)) if row not in chosen]
    if not free:
        return [chosen[row] for row in range(len(places))]
    own = [places[row] for row in free]
    allowed = masked(logits if len(free) == len(places) else logits[free], own)
    none = float("-inf")
    for at, (token, scores) in enumerate(choose(allowed, own, drafting)):
        sequence, index = own[at]
        fits = float(scores[0, token]) > none and float(allowed[at, token]) > none
        if not fits and sequence.constraint is not None:
            if not drafting:
                raise DeliberateError(
                    f"the constraint and {sequence.chooser.describe()} leave no token at generated "
                    f"token {index}: a logits processor contradicts what the constraint allows; "
                    "leave out one of them"
                )
            token = -1
        chosen[free[at]] = token, scores
    return [chosen[row] for row in range(len(places))]
