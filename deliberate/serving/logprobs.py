"""Log-probabilities as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deliberate.engine.logprobs import TokenLogprobs

# Most alternatives of a token, OpenAI's limit.
MOST = 20
# What OpenAI answers for a probability of 0, which JSON has no logarithm of.
_LEAST = -9999.0
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def _alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes (GPT-2's table)."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printed)]
    names = {chr(byte): byte for byte in printed}
    return names | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES = _alphabet()


class TokenNames:
    """What single tokens are called.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int]]] = {}

    def of(self, token: int) -> tuple[str, list[int]]:
        """Text and bytes of a token. One that is no whole character has the text ``bytes:\\xe4``,
        say, as in OpenAI's completions."""
        if token not in self._known:
            text = str(
                self._tokenizer.decode(
                    [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
            )
            raw = list(text.encode())
            if _INCOMPLETE in text:
                raw = self._raw(token, raw)
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            self._known[token] = text, raw
        return self._known[token]

    def _raw(self, token: int, otherwise: list[int]) -> list[int]:
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if name.startswith("<0x") and name.endswith(">"):  # sentencepiece's single bytes
            return [int(name[3:-1], 16)]
        if all(one in _BYTES for one in name):
            return [_BYTES[one] for one in name]
        return otherwise

    def entry(self, token: int, logprobs: TokenLogprobs) -> dict[str, Any]:
        """One place of a chat's log-probabilities."""
        top = [self._one(*one) for one in logprobs.top]
        return self._one(token, logprobs.logprob) | {"top_logprobs": top}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self.of(token)
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": raw}


def chat(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A chat choice's ``logprobs``."""
    return {"content": list(entries), "refusal": None}


def completion(entries: Sequence[dict[str, Any]], offsets: Sequence[int]) -> dict[str, Any]:
    """A completion choice's ``logprobs``.

    Args:
        entries: as in a chat.
        offsets: of each the characters of the answer before it.
    """
    top: list[dict[str, float]] = []
    for one in entries:
        named: dict[str, float] = {}
        for other in (*one["top_logprobs"], one):  # the chosen token is always among them
            named.setdefault(other["token"], other["logprob"])
        top.append(named)
    return {
        "tokens": [one["token"] for one in entries],
        "token_logprobs": [one["logprob"] for one in entries],
        "top_logprobs": top,
        "text_offset": list(offsets),
    }
