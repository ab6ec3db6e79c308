"""What clients ask of a model's reasoning, and how it is enforced: budgets, effort, tags.

The budget has many names: vLLM's ``thinking_token_budget``, NIM's ``nvext.max_thinking_tokens``,
llama.cpp's ``reasoning_budget_tokens`` and ``thinking_budget_tokens``, SGLang's
``custom_params.thinking_budget``. `effort` is OpenAI's; its levels are shares of the answer's limit
as OpenRouter has them. Either is enforced as a `LogitConstraint`, so every path of decoding keeps
it, or refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deliberate.config import Fidelity
from deliberate.engine.constraints import LogitConstraint
from deliberate.reasoning.marks import (
    ReasoningMarks,
    Utf8Ends,
    begun_in,
    blank_tokens,
    marks_of,
    reasoning_tags,
    utf8_ends,
)
from deliberate.reasoning.settings import kept_for_answer
from deliberate.reasoning.structured_answer import StructuredAnswer
from deliberate.reasoning.token_budget import BudgetSettings, ReasoningConstraint
from deliberate.serving.errors import ApiError
from deliberate.serving.protocol import Generation
from deliberate.serving.reasoning_text import ReasoningText
from deliberate.serving.text import AnswerText
from deliberate.serving.tools import MARKER
from deliberate.utils.errors import DeliberateError

EFFORTS = {"none": 0.0, "minimal": 0.1, "low": 0.2, "medium": 0.5, "high": 0.8, "xhigh": 0.95}


@dataclass(frozen=True)
class Asked:
    """A limit of the reasoning, as a client has named it.

    Attributes:
        name: of the field.
        share: of the answer's limit; None where `tokens` says it.
        tokens: between the tags at most; None: as many as leave room for the answer.
    """

    name: str
    share: float | None = None
    tokens: int | None = None

    def budget(self, limit: int) -> int | None:
        """Tokens of reasoning of an output that may have `limit` tokens."""
        return self.tokens if self.share is None else int(self.share * limit)


def asked(body: Generation) -> Asked | None:
    """What a body says of the reasoning; None: nothing.

    Raises:
        ApiError: it says it twice.
    """
    nvext = None if body.nvext is None else body.nvext.max_thinking_tokens
    custom = None if body.custom_params is None else body.custom_params.thinking_budget
    given = {
        "thinking_token_budget": body.thinking_token_budget,
        "nvext.max_thinking_tokens": nvext,
        "reasoning_budget_tokens": body.reasoning_budget_tokens,
        "thinking_budget_tokens": body.thinking_budget_tokens,
        "custom_params.thinking_budget": custom,
    }
    found = [
        Asked(name, tokens=None if value < 0 else value)
        for name, value in given.items()
        if value is not None
    ]
    if body.reasoning_effort is not None:
        found.append(Asked("reasoning_effort", share=EFFORTS[body.reasoning_effort]))
    if len(found) > 1:
        names = " and ".join(one.name for one in found)
        raise ApiError(400, f"{names} all limit the reasoning: give one of them")
    return found[0] if found else None


class ModelReasoning:
    """The reasoning of one served model.

    Args:
        tokenizer: of the model.
        tags: its opening and closing tag; None for a model that is not known to have any.
        end_tokens: that end an output.
        vocabulary: width of the model's logits.
        default: tokens of reasoning of requests that name no limit; None: no limit.

    Raises:
        DeliberateError: a default for a model without tags.
    """

    def __init__(
        self,
        tokenizer: Any,
        tags: tuple[str, str] | None,
        end_tokens: Collection[int],
        vocabulary: int,
        default: int | None = None,
    ) -> None:
        if default is not None and tags is None:
            raise DeliberateError(f"thinking_token_budget={default}: {_NO_TAGS}")
        self._tokenizer = tokenizer
        self._end_tokens = tuple(end_tokens)
        self._default = default
        self._marks: ReasoningMarks | None = None
        self._ends: Utf8Ends | None = None
        self._blank: frozenset[int] = frozenset()
        self._call: tuple[int, ...] = ()
        if tags is not None:
            self._call = tuple(tokenizer.encode(MARKER, add_special_tokens=False))
            self._marks = marks_of(tokenizer, open_tag=tags[0], close_tag=tags[1])
            self._ends = utf8_ends(tokenizer)
            self._blank = blank_tokens(tokenizer, vocabulary)

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        config: Any,
        end_tokens: Collection[int],
        vocabulary: int,
        *,
        tags: tuple[str, str] | None = None,
        default: int | None = None,
    ) -> ModelReasoning:
        """Of a model; its tags are looked up where none are given."""
        found = tags or reasoning_tags(tokenizer, config)
        return cls(tokenizer, found, end_tokens, vocabulary, default)

    def budget(self, body: Generation, limit: int) -> int | None:
        """Tokens of reasoning that an output of `limit` tokens may have; None: no limit.

        Raises:
            ApiError: a limit that this model cannot obey.
        """
        wanted = asked(body)
        if wanted is None:
            return self._default
        if self._marks is None:
            raise ApiError(400, f"{wanted.name}: {_NO_TAGS}")
        return wanted.budget(limit)

    def limits(self, body: Generation) -> bool:
        """Whether a body, or the server for it, limits the reasoning."""
        return self._default is not None or asked(body) is not None

    def marks(
        self, prompt_ids: Sequence[int], *, chat: bool, calls: bool = False
    ) -> ReasoningMarks | None:
        """The marks of an output after this prompt; None for a model without tags.

        Args:
            calls: whether it may call tools between tags: such a call ends the reasoning.
        """
        if self._marks is None:
            return None
        marks = begun_in(self._marks, prompt_ids, self._blank, chat=chat)
        return replace(marks, call=self._call) if calls else marks

    def constraint(
        self,
        body: Generation,
        prompt_ids: Sequence[int],
        limit: int,
        form: LogitConstraint | None,
        *,
        chat: bool,
        calls: bool = False,
    ) -> LogitConstraint | None:
        """What one output must keep to: its budget of reasoning, and then the answer's form.

        Args:
            body: of the request, its fidelity filled in.
            prompt_ids: of it.
            limit: tokens of the output.
            form: of the answer, at its beginning; None: any.
            chat: whether the prompt is a chat.
            calls: as of `marks`.

        Raises:
            ApiError: it cannot be enforced here.
        """
        budget = self.budget(body, limit)
        marks = self.marks(prompt_ids, chat=chat, calls=calls)
        limited = self.limits(body)
        if marks is None or not (limited or form is not None):
            return form
        named = asked(body) or Asked("thinking_token_budget")
        if limited and body.fidelity in (Fidelity.CERTIFIED, Fidelity.BUDGET):
            raise ApiError(
                400,
                f"{named.name} with fidelity {body.fidelity}: its calibration is of unconstrained "
                "text; use dense, exact or threshold",
            )
        answer = kept_for_answer(limit)
        try:
            reasoning = ReasoningConstraint(
                BudgetSettings(limit, budget, answer),
                marks,
                self._end_tokens,
                self._ends,
                self._blank,
            )
        except DeliberateError:
            if not limited and marks.opening:
                return form  # too short for reasoning: the answer alone
            raise ApiError(
                400,
                f"{named.name}: max_tokens={limit} leaves no room for the tags and an answer: give "
                f"at least {marks.least(answer)}",
            ) from None
        return reasoning if form is None else StructuredAnswer(reasoning, form)

    def text(
        self, prompt_ids: Sequence[int], stops: Sequence[str], *, chat: bool, calls: bool = False
    ) -> AnswerText | ReasoningText:
        """The text of an output; a chat has its reasoning apart from its answer."""
        marks = self.marks(prompt_ids, chat=chat, calls=calls)
        if marks is None:
            return AnswerText(self._tokenizer, stops)
        return ReasoningText(self._tokenizer, marks, stops, apart=chat)


_NO_TAGS = (
    "this model marks no reasoning, so its tokens cannot be counted; leave it out, or start the "
    "server with --reasoning-tags if the model has tags of its own"
)
