"""From problems and documents to token ids, with the part marked that the loss is taken on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deliberate.data.problem import Problem
from deliberate.data.texts import Document
from deliberate.utils.errors import DeliberateError

PROMPT = "Question: {question}\nAnswer:"
LOSS_ON = ("completion", "all")
CHAT = ("auto", "always", "never")
"""Settings of the chat template outside training: if there is one, required, not used."""

# A source with a larger share of unknown tokens, in its first examples, is refused.
_MAX_UNKNOWN, _CHECKED = 0.05, 200


def prompt_text(question: str, template: str = PROMPT) -> str:
    """The text put before the model's answer."""
    return template.format(question=question.strip())


@dataclass(frozen=True)
class Example:
    """Token ids of one problem or stretch of text; the loss is taken on `answer` only."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class Encoder:
    """Turns problems into token ids: ``<bos> prompt`` and ``solution <eos>``.

    Args:
        tokenizer: a transformers tokenizer with an end-of-text token.
        max_tokens: longer problems are left out, longer documents cut into stretches.
        template: the prompt around a question; with `chat` the user's message is the question as
            it is.
        chat: use the tokenizer's chat template for prompt and answer.
        system: system message of every chat.
        loss_on: ``completion`` (the answer) or ``all`` (the prompt too).

    Raises:
        DeliberateError: no end-of-text token, or `chat` with a tokenizer that has no template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_tokens: int,
        template: str = PROMPT,
        chat: bool = False,
        system: str | None = None,
        loss_on: str = "completion",
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise DeliberateError("the tokenizer has no end-of-text token: answers could not stop")
        if chat and not has_chat_template(tokenizer):
            raise DeliberateError("the tokenizer has no chat template: set data.chat=false")
        if loss_on not in LOSS_ON:
            raise DeliberateError(f"loss_on {loss_on!r} is unknown; it is {' or '.join(LOSS_ON)}")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.template = template
        self.chat = chat
        self.system = system
        self.loss_on = loss_on

    @property
    def form(self) -> str:
        """The prompt format: the template, or the chat template filled with ``{question}``."""
        return self._rendered("{question}") if self.chat else self.template

    def prompt(self, question: str) -> list[int]:
        """Ids of a question in the prompt format."""
        if self.chat:
            # A chat template adds the begin-of-text token itself.
            return self._ids(self._rendered(question))
        text = prompt_text(question, self.template)
        return self._start() + self._ids(text)

    def example(self, problem: Problem) -> Example | None:
        """Ids of a problem with its solution, or None where it is longer than `max_tokens`."""
        solution = (problem.solution or f"#### {problem.answer}").strip()
        prompt = self.prompt(problem.question)
        if self.chat:
            answer = self._ids(self._reply(problem.question, solution))
        else:
            answer = self._ids(" " + solution)
        eos = self.tokenizer.eos_token_id
        # A chat template may end a turn with the end-of-text token among its own marks.
        if eos not in answer[-3:]:
            answer.append(eos)
        if len(prompt) + len(answer) > self.max_tokens:
            return None
        if self.loss_on == "all":
            prompt, answer = prompt[:1], prompt[1:] + answer
        return Example(prompt, answer)

    def stretches(self, document: Document) -> Iterator[Example]:
        """A document cut into examples of at most `max_tokens`; all predicted tokens have loss."""
        ids = list(document.tokens) if document.tokens else self._ids(document.text)
        ids = [*self._start(), *ids, self.tokenizer.eos_token_id]
        for start in range(0, len(ids), self.max_tokens):
            part = ids[start : start + self.max_tokens]
            if len(part) > 1:
                yield Example(part[:1], part[1:])

    def examples(self, item: Problem | Document) -> list[Example]:
        """The training examples of one item of a data source; empty where it is too long."""
        if isinstance(item, Document) and item.prompt:
            return self._answered(item)
        if isinstance(item, Document):
            return list(self.stretches(item))
        example = self.example(item)
        return [] if example is None else [example]

    def _answered(self, document: Document) -> list[Example]:
        """A prompt with the model's own answer, cut at `max_tokens`; empty without an answer."""
        ids = list(document.tokens or ())[: self.max_tokens]
        start = 1 if self.loss_on == "all" else document.prompt
        return [Example(ids[:start], ids[start:])] if len(ids) > document.prompt else []

    def check_source(self, name: str, examples: Sequence[Example]) -> None:
        """Refuses a source of which the tokenizer does not know a large part.

        Raises:
            DeliberateError: more than 5 % of the tokens are unknown.
        """
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        some = examples[:_CHECKED]
        total = sum(map(len, some))
        if unknown is None or unknown == self.tokenizer.eos_token_id or not total:
            return
        lost = sum(e.prompt.count(unknown) + e.answer.count(unknown) for e in some)
        if lost / total > _MAX_UNKNOWN:
            raise DeliberateError(
                f"the tokenizer does not fit data source {name!r}: {lost / total:.0%} of the "
                "tokens are unknown to it; take other data or another model"
            )

    def _start(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [] if bos is None else [bos]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _rendered(self, question: str, solution: str | None = None) -> str:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages.append({"role": "user", "content": question.strip()})
        if solution is not None:
            messages.append({"role": "assistant", "content": solution})
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=solution is None
            )
        )

    def _reply(self, question: str, solution: str) -> str:
        """The assistant's turn as the template writes it after the prompt."""
        prompt, whole = self._rendered(question), self._rendered(question, solution)
        if not whole.startswith(prompt):
            raise DeliberateError(
                "the chat template's prompt is not the beginning of its conversation, so the "
                "answer cannot be separated from it: set data.chat=false"
            )
        return whole[len(prompt) :]


def has_chat_template(tokenizer: Any) -> bool:
    """Whether `apply_chat_template` can be used."""
    return bool(getattr(tokenizer, "chat_template", None))


def use_chat(setting: bool | str, tokenizer: Any) -> bool:
    """`auto` takes the chat template where the tokenizer has one."""
    return has_chat_template(tokenizer) if setting == "auto" else bool(setting)


def chat_wanted(setting: str, tokenizer: Any, *, system: str | None = None) -> bool:
    """Whether prompts use the tokenizer's chat template.

    Args:
        setting: ``auto`` (where there is one), ``always`` or ``never``.
        system: the system message, which only a chat template can hold.

    Raises:
        DeliberateError: another setting, ``always`` without a template, or a system message that
            would be left out.
    """
    if setting not in CHAT:
        raise DeliberateError(f"chat={setting} is not one of {', '.join(CHAT)}")
    if setting == "always" and not has_chat_template(tokenizer):
        raise DeliberateError("chat=always: the tokenizer has no chat template; use auto or never")
    wanted = setting != "never" and has_chat_template(tokenizer)
    if system is not None and not wanted:
        raise DeliberateError(
            f"system={system!r} needs a chat template, and none is used: leave system out"
        )
    return wanted
