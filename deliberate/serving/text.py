"""Tokens of an answer as text: whole characters only, and stop strings that never reach the client.

Half a character, and what may still become a stop string, is held back until it is decided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Tokens that are decoded again for each new one: enough for any tokenizer's joins.
_CONTEXT = 6
# A character takes at most 4 bytes, hence tokens; after more, the bytes are no character.
_LONGEST_CHARACTER = 8


class TokenText(NamedTuple):
    """What one token made it possible to hand out.

    Attributes:
        text: may be empty: half a character, or what may become a stop string.
        layer: after which the token was chosen.
        offset: characters of the answer before the token, those held back included.
        logprobs: of it as in a chat (`deliberate.serving.logprobs`), where they are asked for.
        reasoning: it is of the reasoning, not of the answer.
    """

    text: str
    layer: int
    offset: int = 0
    logprobs: dict[str, Any] | None = None
    reasoning: bool = False


class AnswerText:
    """The text of one answer, as its tokens come.

    Args:
        tokenizer: turns ids into text.
        stops: strings that end the answer; they are not part of it.

    Attributes:
        stopped: a stop string was found.
        token_count: tokens up to the one that completed a stop string, or all so far.
        length: characters so far, those held back included.
        is_reasoning, reasoning_tokens: as in `deliberate.serving.reasoning_text`; never, and none.
    """

    is_reasoning = False
    reasoning_tokens = 0

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self.token_count = 0
        self.length = 0
        self._decode = decoder(tokenizer)
        self._stops = tuple(stops)
        self._tokens: list[int] = []
        self._decoded = 0  # tokens whose text is in `_held` or was handed out
        self._held = ""

    def push(self, token: int) -> str:
        """The text that can be handed out once `token` is there."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        self.token_count += 1
        self._held += self._new_text(final=False)
        return self._hand_out(final=False)

    def finish(self) -> str:
        """What was held back, once no token follows."""
        if self.stopped:
            return ""
        self._held += self._new_text(final=True)
        return self._hand_out(final=True)

    def _new_text(self, *, final: bool) -> str:
        start = max(0, self._decoded - _CONTEXT)
        known = self._decode(self._tokens[start : self._decoded])
        text = self._decode(self._tokens[start:])
        undecided = len(self._tokens) - self._decoded
        if text.endswith(_INCOMPLETE) and not final and undecided <= _LONGEST_CHARACTER:
            return ""
        self._decoded = len(self._tokens)
        self.length += len(text) - len(known)
        return text[len(known) :]

    def _hand_out(self, *, final: bool) -> str:
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = 0 if final else max((overlap(self._held, s) for s in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """What turns ids into text, without special tokens and without cleaning up spaces.

    Of a fast tokenizer its backend, where transformers' own `decode` would do nothing but check and
    copy the ids first: that takes several times as long, for every token of every stream.
    """
    plain = getattr(PreTrainedTokenizerFast, "_decode", None)
    if plain is not None and getattr(type(tokenizer), "_decode", None) is plain:
        backend = tokenizer.backend_tokenizer
        return lambda ids: str(backend.decode(ids, skip_special_tokens=True))

    def decode(ids: list[int]) -> str:
        made = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(made)

    return decode


def overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
