"""How much a text repeats itself, and how well it reads to a judge.

rep-n is the share of n-grams that stood before in the same text (Welleck et al.,
arXiv:1908.04319), here of words and not of tokens, so that models with different tokenizers can be
compared; distinct-n (Li et al., arXiv:1510.03055) is pooled over all texts of a run and so also
sees texts that resemble one another.

A language model as judge gives repeated text a high likelihood, since copying is easy to predict.
So likelihoods are given twice: of all characters, and of the *fresh* ones, those of words that do
not end a 4-gram of words that stood before. What repeats adds nothing to the second; what it cannot
see are loops of fewer than four words and paraphrases, and the fresh words are still judged after
whatever stands before them, loops included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deliberate.utils.errors import DeliberateError

_WORD = re.compile(r"\w+|[^\w\s]")
STALE_AFTER = 4
"""Words in the n-grams that decide whether a word is fresh."""


def words(text: str) -> list[str]:
    """Words and punctuation marks, in order."""
    return _WORD.findall(text)


def repetition(tokens: Sequence[str], n: int) -> float:
    """rep-n: 1 - distinct n-grams / all n-grams; 0 where the text is shorter than n."""
    total = len(tokens) - n + 1
    return 1.0 - len(_grams(tokens, n)) / total if total > 0 else 0.0


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """distinct-n over several texts of words; 1 where none has n words."""
    total = sum(max(0, len(text) - n + 1) for text in texts)
    return len(set().union(*(_grams(text, n) for text in texts))) / total if total else 1.0


def _grams(tokens: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def fresh_characters(text: str) -> NDArray[np.bool_]:
    """Whether each character belongs to a word that ends no 4-gram that stood before, ``[len]``.

    Spaces are fresh.
    """
    found = list(_WORD.finditer(text))
    fresh = np.ones(len(text), dtype=np.bool_)
    seen: set[tuple[str, ...]] = set()
    pieces = [match.group() for match in found]
    grams = zip(*(pieces[shift:] for shift in range(STALE_AFTER)), strict=False)
    for last, gram in enumerate(grams, start=STALE_AFTER - 1):
        if gram in seen:
            fresh[found[last].start() : found[last].end()] = False
        seen.add(gram)
    return fresh


@dataclass(frozen=True)
class Verdict:
    """A judge's opinion of a continuation, in nats per character.

    Attributes:
        likelihood: mean log-likelihood, given the prompt.
        fresh: the same of the fresh characters.
        coherence: what the prompt and the first half (in words) add to the log-likelihood of the
            fresh characters of the second half, against the second half alone.
    """

    likelihood: float
    fresh: float
    coherence: float


class Judge:
    """A causal language model that scores text.

    Args:
        model: transformers' causal language model.
        tokenizer: its own, with character offsets.

    Raises:
        DeliberateError: a tokenizer without offsets.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DeliberateError(
                "the judge's tokenizer gives no character offsets: take a fast one"
            )
        self._model = model
        self._tokenizer = tokenizer
        self._context = getattr(model.config, "max_position_embeddings", None) or math.inf

    def verdict(self, prompt: str, text: str) -> Verdict:
        """Scores `text` as a continuation of `prompt`; NaN where there is nothing to score.

        Raises:
            DeliberateError: half of the text is longer than the judge's context.
        """
        found = list(_WORD.finditer(text))
        middle = found[len(found) // 2].start() if found else 0
        fresh = fresh_characters(text)
        first = self.characters(prompt, text[:middle])
        second = self.characters(prompt + text[:middle], text[middle:])
        alone = self.characters("", text[middle:])
        every = np.concatenate((first, second))
        later = fresh[middle:]
        return Verdict(
            likelihood=_mean(every),
            fresh=_mean(every[fresh]),
            coherence=_mean((second - alone)[later]),
        )

    @torch.inference_mode()
    def characters(self, before: str, text: str) -> NDArray[np.float64]:
        """Log-likelihood of each character of `text`, a token's spread evenly over its characters.

        As much of the end of `before` is shown as the context has room for.
        """
        scores = np.zeros(len(text))
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = found["input_ids"], found["offset_mapping"]
        if not ids:
            return scores
        start = self._tokenizer.bos_token_id
        head = [self._tokenizer.eos_token_id if start is None else start]
        room = self._context - len(ids) - len(head)
        if room < 0:
            raise DeliberateError(
                f"a text of {len(ids)} tokens does not fit the judge's context of {self._context}: "
                "take shorter texts or another judge"
            )
        shown = self._tokenizer(before, add_special_tokens=False)["input_ids"]
        shown = shown[max(0, len(shown) - int(min(room, len(shown)))) :]
        given = torch.tensor([head + shown + ids], device=self._model.device)
        logits = self._model(given, use_cache=False).logits[0, -len(ids) - 1 : -1]
        told = logits.float().log_softmax(dim=-1).gather(1, given[0, -len(ids) :, None])
        for (begin, end), value in zip(offsets, told[:, 0].tolist(), strict=True):
            # Tokens of no characters of their own (bytes of one, a mark of beginning) go to the
            # character at their place.
            begin = min(begin, len(text) - 1)
            end = max(end, begin + 1)
            scores[begin:end] += value / (end - begin)
        return scores


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else math.nan
