"""Generated tokens as text, one by one, such that the pieces add up to the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class IncrementalDecoder:
    """Decodes a growing list of tokens.

    A character may take several tokens (byte-level BPE): their pieces are empty until the last of
    them, which gets the character. Special tokens are empty pieces.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """The text that `token` adds."""
        self._tokens.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """What is left over: bytes at the end that never became a character."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        text = decode_text(self.tokenizer, self._tokens)
        if not final and text.endswith(_INCOMPLETE):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece


def decode_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Text of generated tokens without special tokens."""
    return tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def split_text(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """One piece a token; their concatenation is `decode_text` of all of them."""
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokens]
    if pieces:
        pieces[-1] += decoder.finish()
    return pieces
