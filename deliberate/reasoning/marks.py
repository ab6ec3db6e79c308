"""How a model marks its reasoning: the tags around it, and characters that end within a token."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deliberate.utils.errors import DeliberateError

OPEN_TAG, CLOSE_TAG = "<think>", "</think>"
REASONING_TAGS = "reasoning_tags"
"""Entry of a model's configuration: its opening and its closing tag."""
Forms = tuple[frozenset[int], ...]
"""Of each token of a tag, the ids that may stand in its place."""


@dataclass(frozen=True)
class ReasoningMarks:
    """Token ids around a model's reasoning.

    Attributes:
        closing: by which reasoning ends, at least one; in a model without tags, what comes before
            its answer.
        opening: by which it begins; empty: an output begins with reasoning.
        answer: that follow `closing` where a chain is ended from outside, before the answer.
        reopening: the opening tag again, which a budget keeps out of the answer; empty: there is
            none.
        call: by which a tool call begins. It ends reasoning as the closing tag does, so that no
            budget cuts the call, and is the answer's; empty: none is made.
        closing_forms, opening_forms: other ids in which the tags are written, since blanks before a
            tag or after it may share a token with it (`` </``, ``>\\n``); empty: there are none.

    Raises:
        DeliberateError: `closing` is empty.
    """

    closing: tuple[int, ...]
    opening: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()
    reopening: tuple[int, ...] = ()
    call: tuple[int, ...] = ()
    closing_forms: Forms = ()
    opening_forms: Forms = ()

    def __post_init__(self) -> None:
        for name in ("closing", "opening", "answer", "reopening", "call"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.closing:
            raise DeliberateError("closing is empty: give the text by which reasoning ends")

    @property
    def handover(self) -> tuple[int, ...]:
        """What ends a chain from outside."""
        return self.closing + self.answer

    def rest(self, output: Sequence[int]) -> tuple[int, ...]:
        """The handover after these tokens, which may have begun the closing tag: in a model whose
        answers stand on a line of their own every new line does."""
        sizes = range(len(self.closing) - 1, 0, -1)
        return self.handover[next((n for n in sizes if written(output, self.closes[:n])), 0) :]

    @functools.cached_property
    def closes(self) -> Forms:
        """What closes the reasoning, in any of its forms."""
        return self.closing_forms or _exactly(self.closing)

    @functools.cached_property
    def opens(self) -> Forms:
        """What opens it, in any of its forms; empty where an output begins with it."""
        return (self.opening_forms or _exactly(self.opening)) if self.opening else ()

    def least(self, answer: int) -> int:
        """Tokens of the shortest output with so many for its answer."""
        return len(self.opening) + len(self.handover) + answer


def marks_of(
    tokenizer: Any,
    *,
    open_tag: str | None = OPEN_TAG,
    close_tag: str = CLOSE_TAG,
    answer: str = "",
    prompt: str = "",
) -> ReasoningMarks:
    """The marks of a tokenizer.

    Args:
        tokenizer: of transformers.
        open_tag: None: outputs begin with reasoning.
        close_tag: in a model without tags, the text before its answer, such as ``\\n#### ``.
        answer: text between the closing tag and the answer.
        prompt: where it ends in the opening tag, as some chat templates write it, the output
            begins with reasoning.
    """

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()

    opened = open_tag is None or prompt.rstrip().endswith(open_tag)
    tag = encode(open_tag or "")
    closing = encode(close_tag)
    texts = token_texts(tokenizer)
    return ReasoningMarks(
        closing,
        () if opened else tag,
        encode(answer),
        tag,
        closing_forms=_forms(closing, texts),
        opening_forms=_forms(tag, texts),
    )


def written(tokens: Sequence[int], forms: Forms) -> bool:
    """Whether the newest tokens are a tag, in any of its forms."""
    size = len(forms)
    if len(tokens) < size:
        return False
    return all(token in ids for token, ids in zip(tokens[len(tokens) - size :], forms, strict=True))


def _exactly(tag: Sequence[int]) -> Forms:
    return tuple(frozenset([token]) for token in tag)


def _forms(tag: Sequence[int], texts: Sequence[str]) -> Forms:
    """The forms of a tag: its first token after blanks, its last one before blanks.

    A token that is special has no text and one form.
    """
    forms = [{token} for token in tag]
    if not tag or not all(texts[token] for token in tag):
        return _exactly(tag)
    first, last = texts[tag[0]], texts[tag[-1]]
    for token, text in enumerate(texts):
        if len(tag) == 1:
            before, found, after = text.partition(first)
            if found and not before.strip() and not after.strip():
                forms[0].add(token)
            continue
        if text.endswith(first) and not text[: -len(first)].strip():
            forms[0].add(token)
        if text.startswith(last) and not text[len(last) :].strip():
            forms[-1].add(token)
    return tuple(map(frozenset, forms))


def reasoning_tags(tokenizer: Any, config: Any = None) -> tuple[str, str] | None:
    """The tags between which a model reasons; None for a model that is not known to have any.

    Args:
        tokenizer: of transformers. Where it has ``<think>`` and ``</think>`` as a token each, those
            are the tags.
        config: of the model; its ``reasoning_tags`` come first.
    """
    stated = getattr(config, REASONING_TAGS, None)
    if stated:
        opening, closing = stated
        return str(opening), str(closing)
    tags = tokenizer.convert_tokens_to_ids([OPEN_TAG, CLOSE_TAG])
    unknown = getattr(tokenizer, "unk_token_id", None)
    return None if any(tag in (None, unknown) for tag in tags) else (OPEN_TAG, CLOSE_TAG)


def begun_in(
    marks: ReasoningMarks, prompt_ids: Sequence[int], blank: Collection[int], *, chat: bool
) -> ReasoningMarks:
    """The marks of an output whose prompt may have begun its reasoning.

    Args:
        marks: with an opening tag.
        prompt_ids: token ids.
        blank: tokens of blanks alone.
        chat: only an opening tag at the prompt's end counts, as chat templates write it: one within
            a message is text. Else reasoning is begun where the last opening tag is not closed.
    """
    if not marks.opening:
        return marks
    ids = tuple(prompt_ids)
    opened = _last(ids, marks.opens)
    rest = ids[opened + len(marks.opens) :] if opened >= 0 else ()
    if opened < 0 or _last(rest, marks.closes) >= 0:
        return marks
    if chat and any(token not in blank for token in rest):
        return marks
    return replace(marks, opening=())


def _last(tokens: Sequence[int], forms: Forms) -> int:
    """Where a tag begins for the last time; -1 where it does not occur."""
    size = len(forms)
    return next(
        (i for i in range(len(tokens) - size, -1, -1) if written(tokens[i : i + size], forms)), -1
    )


def _byte_characters() -> dict[str, int]:
    """The printable characters by which byte-level tokenizers write bytes (GPT-2's table)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    table = {chr(byte): byte for byte in kept}
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


def _bytes_of(token: str, table: dict[str, int]) -> bytes | None:
    """The bytes of a byte-level token or of a single byte ``<0xE4>``; None for other tokens."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    try:
        return bytes(table[character] for character in token)
    except KeyError:
        return None


@dataclass(frozen=True)
class Utf8Ends:
    """UTF-8 characters that tokens begin and do not complete.

    Attributes:
        missing: bytes that the character which a token begins still needs; tokens that end with a
            whole character are left out.
        continues: bytes at a token's front that continue an earlier character, where it has some.
        whole: of the tokens in `continues`, those that hold nothing but such bytes.
    """

    missing: dict[int, int]
    continues: dict[int, int]
    whole: frozenset[int]

    def after(self, need: int, token: int) -> int:
        """Bytes that are missing after a token, where `need` were missing before it."""
        if token in self.missing:
            return self.missing[token]
        if need and token in self.whole:
            return max(0, need - self.continues[token])
        return 0

    @classmethod
    def of_tokens(cls, tokens: Sequence[str | None]) -> Utf8Ends:
        """Of a vocabulary, in the form of `convert_ids_to_tokens`."""
        table, missing, continues, whole = _byte_characters(), {}, {}, set()
        for number, token in enumerate(tokens):
            raw = None if token is None else _bytes_of(token, table)
            if not raw:
                continue
            front = next((i for i, b in enumerate(raw) if b & 0xC0 != 0x80), len(raw))
            if front:
                continues[number] = front
            if front == len(raw):
                whole.add(number)
                continue
            lead = max(i for i, b in enumerate(raw) if b & 0xC0 != 0x80)
            first = raw[lead]
            size = 4 if first >= 0xF0 else 3 if first >= 0xE0 else 2 if first >= 0xC0 else 1
            if size > len(raw) - lead:
                missing[number] = size - (len(raw) - lead)
        return cls(missing, continues, frozenset(whole))


def utf8_ends(tokenizer: Any) -> Utf8Ends:
    """Of a tokenizer of transformers; computed once for each."""
    found = _UTF8.get(tokenizer)
    if found is None or found[0] != len(tokenizer):
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        found = _UTF8[tokenizer] = len(tokenizer), Utf8Ends.of_tokens(tokens)
    return found[1]


def blank_tokens(tokenizer: Any, vocabulary: int = 0) -> frozenset[int]:
    """Special tokens and tokens of blanks alone: an answer of them is empty.

    Args:
        tokenizer: of transformers.
        vocabulary: width of the model's logits, where it is more than the tokenizer has.
    """
    texts = token_texts(tokenizer)
    blank = frozenset(token for token, text in enumerate(texts) if not text.strip())
    return blank.union(range(len(texts), vocabulary))


_UTF8: weakref.WeakKeyDictionary[Any, tuple[int, Utf8Ends]] = weakref.WeakKeyDictionary()
_TEXTS: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()


def token_texts(tokenizer: Any) -> list[str]:
    """The text of each token, empty for special ones; decoded once for each tokenizer."""
    found = _TEXTS.get(tokenizer)
    if found is None or len(found) != len(tokenizer):
        ids = [[token] for token in range(len(tokenizer))]
        found = _TEXTS[tokenizer] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return found
