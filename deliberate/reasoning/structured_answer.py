"""A description of the answer's form that holds for the answer alone, after the reasoning.

Grammar and budget move together: tokens of the reasoning and its tags are the budget's, those of
the answer are both's. So a closing tag is never part of what a grammar reads (vLLM issue 34650).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deliberate.engine.constraints import LogitConstraint
from deliberate.reasoning.budget_state import FORBIDDEN, Phase
from deliberate.reasoning.token_budget import ReasoningConstraint
from deliberate.utils.errors import DeliberateError


class StructuredAnswer:
    """A `LogitConstraint`: reasoning under a budget, then an answer of a given form.

    A model that opens its reasoning itself either does so with its first tokens or begins the
    answer there.

    Args:
        budget: of the reasoning, at the beginning of the output.
        form: of the answer, at its beginning.
    """

    def __init__(self, budget: ReasoningConstraint, form: LogitConstraint) -> None:
        self.budget = budget
        self.form = form
        # Of each token whether it is the budget's, and how many the form was advanced by with it.
        self._of: list[tuple[bool, int]] = []
        self._tokens: list[int] = []

    @property
    def finished(self) -> bool:
        """Whether the answer is complete."""
        return self.form.finished

    def mask(self, scores: Tensor) -> Tensor:
        """Scores ``[V]`` in which what may not come next is minus infinity."""
        budget = self.budget
        if budget.phase is Phase.REASONING:
            return budget.mask(scores)
        if self._opening:
            return self._only(scores, budget.marks.opening[len(self._of)])
        form = self.form.mask(scores)
        if budget.phase is Phase.BEFORE:
            if not self._of and budget.may_open:
                first = budget.marks.opening[0]
                form = form.clone()
                form[first] = scores[first]
                return form
            return self._without_tag(form)
        both = torch.where(form > FORBIDDEN, budget.mask(scores), form)
        # A form may allow an empty answer, or nothing but an end.
        return both if bool((both > FORBIDDEN).any()) else form

    def advance(self, token: int) -> None:
        """The output continues with this token.

        Raises:
            DeliberateError: it is not allowed here.
        """
        phase = self.budget.phase
        if phase is Phase.BEFORE:
            tag = self.budget.marks.opening
            begins = not self._of and self.budget.may_open and token == tag[0]
            of_form = not (begins or self._opening)
            # An answer without reasoning: what it holds opens none.
            of_budget = not of_form
        else:
            of_form, of_budget = phase is Phase.ANSWER, True
        if of_form:
            self.form.advance(token)
        if of_budget:
            self.budget.advance(token)
        read = int(of_form)
        if phase is Phase.REASONING and self.budget.called:
            read = self._begin_call()
        self._of.append((of_budget, read))
        self._tokens.append(token)

    def _begin_call(self) -> int:
        """A tool call has ended the reasoning: it is the answer's, its first tokens included.

        Raises:
            DeliberateError: the form has no call here; nothing was advanced then.
        """
        call = self.budget.marks.call
        for number, token in enumerate(call):
            try:
                self.form.advance(token)
            except DeliberateError:
                self.form.rollback(number)
                self.budget.rollback(1)
                raise
        return len(call)

    def rollback(self, count: int) -> None:
        """The last `count` tokens are removed."""
        if count:
            removed = self._of[-count:]
            self.form.rollback(sum(read for _, read in removed))
            self.budget.rollback(sum(of_budget for of_budget, _ in removed))
            del self._of[-count:], self._tokens[-count:]

    def forced(self) -> list[int]:
        """What must follow: the rest of a tag, or of what the form has no choice in."""
        budget = self.budget
        if budget.phase is Phase.REASONING:
            return budget.forced()
        if self._opening:
            return list(budget.marks.opening[len(self._of) :])
        if budget.phase is Phase.BEFORE and not self._of and budget.may_open:
            return []
        return self.form.forced()

    @property
    def _opening(self) -> bool:
        """Whether an opening tag has been begun and is not complete."""
        begun = self.budget.phase is Phase.BEFORE and bool(self._of)
        return begun and not self._of[0][1]

    def _without_tag(self, scores: Tensor) -> Tensor:
        """Scores of an answer without reasoning, which must not look as if it began some.

        Where the form has no other choice than the tag's last token, that one may come.
        """
        *begun, last = self.budget.marks.opening
        newest = self._tokens[len(self._tokens) - len(begun) :]
        if newest != begun or int((scores > FORBIDDEN).sum()) < 2:
            return scores
        scores = scores.clone()
        scores[last] = FORBIDDEN
        return scores

    @staticmethod
    def _only(scores: Tensor, token: int) -> Tensor:
        only = torch.full_like(scores, FORBIDDEN)
        only[token] = 0.0
        return only
