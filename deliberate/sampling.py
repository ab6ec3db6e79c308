"""Choosing a token from logits: plain greedy, processed, or sampled so that depth cannot show.

Sampling uses the Gumbel-max coupling (Daliri et al., "Coupling without Communication and
Drafter-Invariant Speculative Decoding", arXiv:2408.07978): the noise of a token is a function of
the seed, the sequence and the token's index only, and the token is argmax(scores + noise). An exit
and the full depth see the same noise, so a draft is accepted exactly when the full depth, given
that noise, chooses the same token. What stands is always the full depth's own choice: the output
follows its distribution whatever the exits decided, and equals the dense output of the same seed
token for token. The classic rule (accept with probability min(1, p/q), arXiv:2211.17192) accepts a
little more, but is unbiased only where the decision to draft does not look at the drafted token,
which confidence, end tokens and a controller all do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deliberate.errors import DeliberateError

_MASK = (1 << 64) - 1


def _mixed(*parts: int) -> int:
    """A 64-bit hash of whole numbers (SplitMix64's finaliser after each)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class TokenChooser:
    """How a generation turns full-vocabulary logits into tokens, at exits and at the top alike.

    Args:
        processors: transformers' logits processors and warpers, called for one sequence at a time
            with float32 scores; they must depend on ids and scores alone, since a draft that is
            refused is chosen again. In a batch each call shows the sequence in every row and only
            its own row is used: some processors hold settings by row.
        sample: draw from the processed distribution instead of taking its mode.
        seed: of the draws.
        batch: sequences that are decoded together.
    """

    def __init__(
        self,
        processors: Sequence[Any] = (),
        *,
        sample: bool = False,
        seed: int = 0,
        batch: int = 1,
    ) -> None:
        self._processors = tuple(processors)
        self._sample = sample
        self._seed = seed
        self._batch = batch
        self._generator: torch.Generator | None = None

    @property
    def plain(self) -> bool:
        """Whether the choice is the argmax of the logits."""
        return not self._processors and not self._sample

    def describe(self) -> str:
        """What is done to the logits, in words: ``sampling``, the processors' classes, or both."""
        names = [type(processor).__name__ for processor in self._processors]
        return " and ".join((["sampling"] if self._sample else []) + names) or "greedy"

    def choose(
        self, logits: Tensor, ids: Sequence[int], sequence: int, index: int
    ) -> tuple[int, Tensor]:
        """The token at `index` of a sequence's output, and the processed scores ``[1, V]``.

        Args:
            logits: ``[V]``, any floating dtype.
            ids: the sequence so far, prompt included.

        Raises:
            DeliberateError: a processor raised; the message names it and the sequence.
        """
        scores = logits.to(torch.float32, copy=True).unsqueeze(0)
        if self._processors:
            prefix = torch.tensor([list(ids)] * self._batch, device=logits.device)
            scores = scores.repeat(self._batch, 1)
            for processor in self._processors:
                try:
                    scores = processor(prefix, scores)
                except Exception as error:
                    raise DeliberateError(
                        f"logits_processor {type(processor).__name__} failed on sequence "
                        f"{sequence} at generated token {index}: {type(error).__name__}: {error}"
                    ) from error
            scores = scores[sequence : sequence + 1]
        if not self._sample:
            return int(scores.argmax()), scores
        return int((scores - self._noise(scores, sequence, index).log_()).argmax()), scores

    def _noise(self, like: Tensor, sequence: int, index: int) -> Tensor:
        """Exponential noise ``[1, V]``; minus its logarithm is Gumbel noise."""
        if self._generator is None:
            self._generator = torch.Generator(device=like.device)
        self._generator.manual_seed(_mixed(self._seed, sequence, index))
        noise = torch.empty_like(like).exponential_(generator=self._generator)
        return noise.clamp_(min=torch.finfo(like.dtype).tiny)
