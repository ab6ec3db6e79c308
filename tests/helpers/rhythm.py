"""Constraints that need no grammar, and force runs of tokens."""

from __future__ import annotations

import torch
from tiny_models import VOCAB

from deliberate.utils.errors import DeliberateError


class Forcing:
    """A constraint that allows what `_free` does, unless `forced` says which token comes next."""

    finished = False

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def forced(self) -> list[int]:
        raise NotImplementedError

    def _free(self, tokens: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def mask(self, scores):
        following, every = self.forced(), torch.arange(len(scores))
        allowed = every == following[0] if following else self._free(every)
        return scores.masked_fill(~allowed, -torch.inf)

    def advance(self, token):
        if not self.mask(torch.zeros(VOCAB))[token] == 0:
            raise DeliberateError(f"token {token} is not allowed")
        self.tokens.append(token)

    def rollback(self, count):
        del self.tokens[len(self.tokens) - count :]


class Rhythm(Forcing):
    """Tokens of every index have one remainder by 3; a multiple of 5 forces a run of tokens, and
    the output is complete after `length` tokens or more."""

    def __init__(self, run: int = 3, length: int = 1000) -> None:
        self.tokens = []
        self.run, self.length = run, length

    def _due(self) -> int:
        due = 0
        for index, token in enumerate(self.tokens):
            due = due - 1 if due else (self.run if (token + index) % 5 == 0 else 0)
        return due

    def forced(self) -> list[int]:
        made = len(self.tokens)
        return [(7 * (made + step)) % VOCAB for step in range(self._due())]

    @property
    def finished(self) -> bool:
        return len(self.tokens) >= self.length and not self._due()

    def _free(self, tokens):
        return tokens % 3 == len(self.tokens) % 3
