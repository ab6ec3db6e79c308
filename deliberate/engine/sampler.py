"""Choosing tokens from logits: greedy, processed, or sampled so that exact equals dense.

Sampling uses the Gumbel-max coupling (Daliri et al., "Coupling without Communication and
Drafter-Invariant Speculative Decoding", arXiv:2408.07978): the noise of a token is a function of
the seed, the sequence and the token's index only, and the token is argmax(scores + noise). An exit
and full depth use the same noise, so a draft is accepted exactly when full depth, with that noise,
chooses the same token. The accepted token is always full depth's own choice: the output follows its
distribution whatever the exits decided, and equals the dense output of the same seed token for
token. The classic rule (accept with probability min(1, p/q), arXiv:2211.17192) accepts a little
more, but is unbiased only where the decision to draft does not depend on the drafted token; with
confidences, end tokens and a latency controller it does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from deliberate.engine.constraints import ConstraintCursor, choose_constrained
from deliberate.engine.processors import (
    OWN_IDS,
    OWN_SCORES,
    among,
    keeps_state,
    may_keep_state,
    state_of,
)
from deliberate.utils.errors import DeliberateError

_MASK = (1 << 64) - 1
# Floats of the widest vector.
_ALIGNED = 16

# A sequence's index, the index of a token in its output, and its ids so far.
Place = tuple[int, int, list[int]]


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
    """How a generation turns full-vocabulary logits into tokens, at exits and at full depth alike.

    A row's scores must not depend on which other rows are chosen for in the same call: a draft and
    its verification run in different passes. On a CPU, where vectorised loops round the same
    element differently by its place in memory, processors that depend on one row are therefore
    called row by row; elsewhere for all rows of one length. All other processors are called with
    the whole batch, once for every length that occurs; rows for which no token is chosen are filled
    with their own text, cut or padded to that length.

    A processor that may keep state from call to call (`may_keep_state`) is called once for every
    accepted token, in order, and never for a draft that may be rejected: exits draft by `drafting`,
    without it.

    Args:
        processors: transformers' logits processors and warpers, called with float32 scores.
        sample: draw from the processed distribution instead of taking its mode.
        seed: of the draws.
        batch: sequences that are decoded together.
        pad: id that fills up rows that are shorter than the row of the choice.
        grouped: call processors for all rows of one length; by default where there is no CPU.
        together: tokens of one index are chosen in one call for the whole batch, as dense decoding
            does. Where they are not, a processor that changes its attributes is refused.

    Attributes:
        drafting: chooses drafts, which full depth may reject: without the processors that may keep
            state.
        may_keep_state: names of those processors.

    Raises:
        DeliberateError: a processor of transformers that keeps state from token to token.
    """

    def __init__(
        self,
        processors: Sequence[Any] = (),
        *,
        sample: bool = False,
        seed: int = 0,
        batch: int = 1,
        pad: int = 0,
        grouped: bool | None = None,
        together: bool = False,
    ) -> None:
        self._processors = tuple(processors)
        for processor in self._processors:
            if keeps_state(processor):
                raise DeliberateError(
                    f"logits_processor {type(processor).__name__} is not supported: it keeps state "
                    "from token to token, and a rejected draft would change it"
                )
        self._sample = sample
        self._seed = seed
        self._batch = batch
        self._pad = pad
        self._grouped = grouped
        self._generator: torch.Generator | None = None
        self._shown: dict[int, list[int]] = {}
        self.needs_ids = not all(among(one, OWN_SCORES) for one in self._processors)
        stateless = [one for one in self._processors if not may_keep_state(one)]
        self.may_keep_state = tuple(
            type(one).__name__ for one in self._processors if may_keep_state(one)
        )
        self._checks_state = batch > 1 and not together
        self.drafting = self
        if self.may_keep_state:
            self.drafting = TokenChooser(
                stateless, sample=sample, seed=seed, batch=batch, pad=pad, grouped=grouped
            )

    @property
    def plain(self) -> bool:
        """Whether the choice is the argmax of the logits."""
        return not self._processors and not self._sample

    @property
    def temperature(self) -> float | None:
        """That scores are divided by, where nothing else changes them; None where something does.

        1 where they are not changed at all.
        """
        if not self._processors:
            return 1.0
        (first, *others) = self._processors
        warps = among(first, frozenset({"TemperatureLogitsWarper"})) and not others
        return float(first.temperature) if warps and self._sample else None

    def drawn(self, number: int) -> TokenChooser:
        """A chooser that samples from what this one chooses from, with noise of a number's own."""
        seed = _mixed(self._seed, number)
        return TokenChooser(
            self._processors, sample=True, seed=seed, batch=self._batch, pad=self._pad
        )

    def noise(self, sequence: int, first: int, count: int, width: int) -> Tensor:
        """What is taken from the scores of `count` tokens, minus Gumbel noise: ``[count, >= V]``.

        On the CPU, in float32.

        Args:
            first: index of the first of them in the sequence's output.
            width: V.
        """
        # Every row begins where a vector does, as one that is drawn by itself: the same numbers.
        made = torch.empty((count, -(-width // _ALIGNED) * _ALIGNED), device="cpu")
        for row in range(count):
            own = made[row : row + 1, :width]
            self._drawn(own, sequence, first + row).log_()
        return made

    def describe(self) -> str:
        """Names what is done to the logits: ``sampling``, the processors' classes, or both."""
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
        tokens, scores = self.choose_rows(logits.unsqueeze(0), [(sequence, index, list(ids))])
        return tokens[0], scores

    def choose_rows(self, logits: Tensor, places: Sequence[Place]) -> tuple[list[int], Tensor]:
        """Tokens of R different sequences, and their processed scores ``[R, V]``.

        Args:
            logits: ``[R, V]``, any floating dtype.
            places: of each row its sequence, the index of the token in the sequence's output, and
                the sequence so far, prompt included (may be empty unless `needs_ids`).

        Raises:
            DeliberateError: a processor raised; the message names it and the sequence.
        """
        # Not inference tensors: a processor may keep what it is given, and so may the caller.
        with torch.inference_mode(False), torch.no_grad():
            scores = logits.to(torch.float32, copy=True)
            if self._processors:
                scores = self._processed(scores, places)
            if not self._sample:
                return scores.argmax(dim=-1).tolist(), scores
            drawn = [
                (row.unsqueeze(0) - self._noise(row.unsqueeze(0), sequence, index).log_()).argmax()
                for row, (sequence, index, _) in zip(scores, places, strict=True)
            ]
            return torch.stack(drawn).tolist(), scores

    def _processed(self, scores: Tensor, places: Sequence[Place]) -> Tensor:
        lengths: dict[int, list[int]] = {}
        if self.needs_ids:
            for row, (sequence, _, ids) in enumerate(places):
                self._shown[sequence] = ids
                lengths.setdefault(len(ids), []).append(row)
        else:
            lengths[0] = list(range(len(places)))
        same_length = list(lengths.values())
        grouped = scores.device.type != "cpu" if self._grouped is None else self._grouped
        groups = same_length if grouped else [[row] for row in range(len(places))]
        parts: list[Any] = [[rows, scores[rows] if len(groups) > 1 else scores] for rows in groups]
        for processor in self._processors:
            if not (among(processor, OWN_SCORES) or among(processor, OWN_IDS)):
                every = _gathered(parts, len(places))
                parts = [
                    [rows, self._whole_batch(processor, every, rows, places)]
                    for rows in same_length
                ]
                if not grouped:
                    every = _gathered(parts, len(places))
                    parts = [[[row], every[row : row + 1]] for row in range(len(places))]
                continue
            for part in parts:
                chosen = [places[row] for row in part[0]]
                shown = [ids for _, _, ids in chosen] if self.needs_ids else [[]] * len(chosen)
                part[1] = self._call(
                    _for_rows(processor, [sequence for sequence, _, _ in chosen]),
                    torch.tensor(shown, dtype=torch.int64, device=scores.device),
                    part[1],
                    chosen,
                )
        return _gathered(parts, len(places))

    def _whole_batch(
        self, processor: Any, scores: Tensor, rows: list[int], places: Sequence[Place]
    ) -> Tensor:
        """Scores of rows of one length, from a call with every sequence at its index."""
        length = len(places[rows[0]][2])
        texts = [self._shown.get(sequence, [])[:length] for sequence in range(self._batch)]
        every = scores.new_zeros(self._batch, scores.shape[1])
        chosen = [places[row] for row in rows]
        mine = [sequence for sequence, _, _ in chosen]
        every[mine] = scores[rows]
        ids = [text + [self._pad] * (length - len(text)) for text in texts]
        shown = torch.tensor(ids, device=scores.device)
        if not self._checks_state or not may_keep_state(processor):
            return self._call(processor, shown, every, chosen)[mine]
        before = state_of(processor)
        scores = self._call(processor, shown, every, chosen)[mine]
        if state_of(processor) != before:
            name = type(processor).__name__
            raise DeliberateError(
                f"logits_processor {name} changes its attributes when it is called, and the "
                f"{self._batch} sequences of the batch reach a token at different times: decode "
                f"one prompt at a time, use fidelity='dense', or set {name}.stateless = True if "
                "its scores do not depend on earlier calls"
            )
        return scores

    def _call(self, processor: Any, ids: Tensor, scores: Tensor, chosen: Sequence[Place]) -> Tensor:
        try:
            return processor(ids, scores)
        except Exception as error:
            place, cause = chosen[0], error
            for one in chosen if len(chosen) > 1 else ():
                # Finds the row that failed: each is put in every row, so that no index matters.
                try:
                    processor(
                        torch.tensor([one[2]] * len(ids), dtype=torch.int64, device=ids.device),
                        scores.new_zeros(scores.shape),
                    )
                except Exception as again:
                    place, cause = one, again
                    break
            words = " ".join(str(cause).split())
            raise DeliberateError(
                f"logits_processor {type(processor).__name__} failed on sequence {place[0]} at "
                f"generated token {place[1]}: {type(cause).__name__}: {words}"
            ) from error

    def _noise(self, like: Tensor, sequence: int, index: int) -> Tensor:
        """Exponential noise ``[1, V]``; minus its logarithm is Gumbel noise."""
        return self._drawn(torch.empty_like(like), sequence, index)

    def _drawn(self, noise: Tensor, sequence: int, index: int) -> Tensor:
        """Fills `noise` with that of a token."""
        if self._generator is None:
            self._generator = torch.Generator(device=noise.device)
        self._generator.manual_seed(_mixed(self._seed, sequence, index))
        noise.exponential_(generator=self._generator)
        return noise.clamp_(min=torch.finfo(noise.dtype).tiny)


class Chosen(Protocol):
    """What is read of a sequence that a token is chosen for.

    Attributes:
        chooser: its own.
        place: its sequence in the chooser.
        constraint: None where every token may come next.
    """

    chooser: TokenChooser
    constraint: ConstraintCursor | None
    place: int

    def ids(self, count: int) -> list[int]:
        """Prefix and the first `count` generated tokens."""
        ...


def choose_tokens(
    logits: Tensor, places: Sequence[tuple[Chosen, int]], *, drafting: bool = False
) -> list[tuple[int, Tensor]]:
    """Token and processed scores ``[1, V]`` of each row of ``[R, V]``, each by its own chooser.

    Args:
        places: of each row its sequence, all different, and the index of the token in its output.
        drafting: full depth may reject the tokens. Of a constrained sequence whose logits
            processors forbid all that its constraint allows, the draft is then -1.

    Raises:
        DeliberateError: a processor raised, or it contradicts a constraint.
    """
    if any(sequence.constraint is not None for sequence, _ in places):
        return choose_constrained(logits, places, _choose, drafting=drafting)
    return _choose(logits, places, drafting)


def _choose(
    logits: Tensor, places: Sequence[tuple[Chosen, int]], drafting: bool
) -> list[tuple[int, Tensor]]:
    groups: dict[int, list[int]] = {}
    for row, (sequence, _) in enumerate(places):
        groups.setdefault(id(sequence.chooser), []).append(row)
    chosen: dict[int, tuple[int, Tensor]] = {}
    for rows in groups.values():
        chooser = places[rows[0]][0].chooser
        if drafting:
            chooser = chooser.drafting
        own = logits if len(groups) == 1 else logits[rows]
        ids = chooser.needs_ids
        tokens, scores = chooser.choose_rows(
            own,
            [
                (sequence.place, index, sequence.ids(index) if ids else [])
                for sequence, index in (places[row] for row in rows)
            ],
        )
        chosen |= zip(rows, zip(tokens, scores.split(1), strict=True), strict=True)
    return [chosen[row] for row in range(len(places))]


def _gathered(parts: Sequence[Any], rows: int) -> Tensor:
    """Scores ``[R, V]`` in the order of the rows."""
    if len(parts) == 1:
        return parts[0][1]
    scores = parts[0][1].new_empty(rows, parts[0][1].shape[1])
    for own, part in parts:
        scores[own] = part
    return scores


def _for_rows(processor: Any, sequences: Sequence[int]) -> Any:
    """The processor for these rows only, where it holds something for each row of the batch."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if isinstance(ignored, Tensor):
        own = copy.copy(processor)
        own.prompt_ignore_length = ignored[list(sequences)]
        return own
    allowed = getattr(processor, "_prefix_allowed_tokens_fn", None)
    if allowed is not None:
        own = copy.copy(processor)
        own._prefix_allowed_tokens_fn = lambda row, ids: allowed(sequences[row], ids)
        return own
    return processor
