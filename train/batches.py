"""Training batches as a pure function of (seed, index), so that a run can resume at any step.

One optimizer step sees one *pool* of problems drawn from the mixture. The pool is sorted by length
and cut into `parts` micro-batches of nearly equal token counts, so that rows are padded little and
every step still sees short and long problems in the mixture's proportions. With packing, several
examples share a row; each keeps its own positions, and none sees another.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from deliberate.config import IGNORE_INDEX
from deliberate.data.chains import CHAINS, chain_problem
from deliberate.data.problem import Problem
from deliberate.data.prompts import PROMPT, Encoder, Example, prompt_text
from deliberate.data.texts import Document
from deliberate.data.word_problems import MAX_STEPS, MIN_STEPS, draw_in_split, word_problem
from deliberate.utils.errors import DeliberateError

__all__ = [
    "PROMPT", "Encoder", "Example", "MixtureBatches", "Packed", "collate", "curriculum_steps",
    "pack", "prompt_text",
]  # fmt: skip

# After so many word problems in a row that are too long, none is taken to fit.
_MAX_TOO_LONG = 1000
# Drawn problems encoded to check that the tokenizer knows their text.
_CHECKED = 8
# The grammars, whose problems are drawn afresh.
_GRAMMARS = {"words": word_problem, CHAINS: chain_problem}

T = TypeVar("T", bound=Sized)


@dataclass(frozen=True)
class Packed:
    """Several examples in one row of a batch, one after the other."""

    examples: tuple[Example, ...]

    def __len__(self) -> int:
        return sum(map(len, self.examples))


def pack(examples: Sequence[Example], capacity: int) -> list[Packed]:
    """Packs the examples into rows of at most `capacity` tokens; returns the shortest row first.

    First fit, longest example first: at most 11/9 of the fewest rows possible, plus one.
    """
    rows: list[list[Example]] = []
    free: list[int] = []
    for example in sorted(examples, key=len, reverse=True):
        place = next((i for i, left in enumerate(free) if left >= len(example)), None)
        if place is None:
            place = len(rows)
            rows.append([])
            free.append(capacity)
        rows[place].append(example)
        free[place] -= len(example)
    return sorted((Packed(tuple(row)) for row in rows), key=len)


def collate(rows: Sequence[Example | Packed], pad_id: int) -> dict[str, Tensor]:
    """Right-padded ``input_ids``, ``labels`` and ``attention_mask``, int64 ``[B, T]``.

    Labels are `IGNORE_INDEX` on prompts, padding and the first token of each example, which no
    position predicts; they are not shifted. With packed rows also ``position_ids``, which start at
    0 with each example: transformers separates the examples of a row by them.
    """
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORE_INDEX)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    positions = torch.zeros((len(rows), longest), dtype=torch.int64)
    for number, row in enumerate(rows):
        start = 0
        for example in row.examples if isinstance(row, Packed) else (row,):
            end = start + len(example)
            ids[number, start:end] = torch.tensor(example.prompt + example.answer)
            answer = start + len(example.prompt)
            labels[number, answer:end] = torch.tensor(example.answer)
            labels[number, start] = IGNORE_INDEX
            positions[number, start:end] = torch.arange(len(example))
            start = end
        mask[number, :start] = 1
        # The padding is one more example, of which no position has a target.
        positions[number, start:] = torch.arange(longest - start)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    if any(isinstance(row, Packed) for row in rows):
        batch["position_ids"] = positions
    return batch


def curriculum_steps(progress: float, *, full_at: float) -> int:
    """Largest number of steps of a word problem at `progress` in [0, 1]: 2 at first, 6 from
    `full_at` on."""
    if progress >= full_at:
        return MAX_STEPS
    return min(MAX_STEPS, 2 + int(progress / full_at * (MAX_STEPS - 2)))


class MixtureBatches(Dataset[dict[str, Tensor]]):
    """Map-style data set whose item i is micro-batch i.

    Args:
        encoder: makes the token ids.
        fixed: lists of training problems or documents by source.
        weights: share of problems by source; the grammars, ``words`` and ``chains``, are drawn
            afresh.
        pools: optimizer steps; the length is ``pools * parts``.
        parts: micro-batches in a step.
        tokens_per_step: real tokens in a pool, at least.
        seed: of the draws; equal seeds and settings give equal micro-batches.
        curriculum: share of training by whose end problems of all lengths are drawn.
        packing: several examples in a row of at most the encoder's `max_tokens`.

    Raises:
        DeliberateError: a negative weight, no source at all, one with nothing short enough or with
            text that the tokenizer does not know, or too few tokens in a step to fill packed rows.
    """

    def __init__(
        self,
        encoder: Encoder,
        fixed: Mapping[str, Sequence[Problem | Document]],
        weights: Mapping[str, float],
        *,
        pools: int,
        parts: int,
        tokens_per_step: int,
        seed: int,
        curriculum: float = 0.0,
        packing: bool = False,
    ) -> None:
        self.encoder = encoder
        self.pools, self.parts = pools, parts
        self.tokens_per_step = tokens_per_step
        self.seed = seed
        self.curriculum = curriculum
        self.packing = packing
        if packing and tokens_per_step < parts * encoder.max_tokens:
            raise DeliberateError(
                f"trainer.tokens_per_step={tokens_per_step} cannot fill {parts} micro-batches of "
                f"packed rows of {encoder.max_tokens} tokens: raise it, or lower data.max_tokens"
            )
        for name, weight in weights.items():
            if weight < 0:
                raise DeliberateError(f"weight {weight} of data source {name!r} is negative")
        self._names = [name for name, weight in weights.items() if weight > 0]
        self._weights = [float(weights[name]) for name in self._names]
        if not self._names:
            raise DeliberateError("the data mixture is empty: give a source a weight above 0")
        # Encoded once: they are drawn again and again.
        self._fixed = {
            name: [e for item in fixed[name] for e in encoder.examples(item)]
            for name in self._names
            if name not in _GRAMMARS
        }
        for name, examples in self._fixed.items():
            if not examples:
                raise _nothing_fits(name, encoder)
            encoder.check_source(name, examples)
        for name in _GRAMMARS.keys() & set(self._names):
            rng = random.Random(name)
            some = (self._drawn_example(name, rng, MAX_STEPS) for _ in range(_CHECKED))
            encoder.check_source(name, [example for example in some if example is not None])
        self._cached: tuple[int, Sequence[Sequence[Example | Packed]]] | None = None
        self._tokens: dict[int, int] = {}

    def __len__(self) -> int:
        return self.pools * self.parts

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pool, part = divmod(index, self.parts)
        if self._cached is None or self._cached[0] != pool:
            self._cached = (pool, self.pool(pool))
        batch = collate(self._cached[1][part], self._pad_id())
        # Seeds the micro-batch's random draws, which so are the same in any process.
        batch["index"] = torch.tensor(index)
        return batch

    def fixed_tokens(self) -> set[int] | None:
        """All tokens of all texts; None where problems are drawn afresh."""
        if _GRAMMARS.keys() & set(self._names):
            return None
        every = (one for examples in self._fixed.values() for one in examples)
        return {token for one in every for token in (*one.prompt, *one.answer)}

    def step_tokens(self, pool: int) -> int:
        """Real tokens of optimizer step `pool`, 0 where this process has not drawn it."""
        return self._tokens.get(pool, 0)

    def _pad_id(self) -> int:
        tokenizer = self.encoder.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def pool(self, index: int) -> Sequence[Sequence[Example | Packed]]:
        """The micro-batches of optimizer step `index`."""
        examples = self._draw(index)
        self._tokens[index] = sum(map(len, examples))
        if self.packing:
            rows = pack(examples, self.encoder.max_tokens)
            return _cut(rows, self.parts, sum(map(len, rows)))
        examples.sort(key=len)
        return _cut(examples, self.parts, sum(map(len, examples)))

    def _draw(self, index: int) -> list[Example]:
        rng = random.Random(f"pool:{self.seed}:{index}")
        most = (
            curriculum_steps(index / self.pools, full_at=self.curriculum)
            if self.curriculum > 0
            else MAX_STEPS
        )
        examples: list[Example] = []
        tokens = too_long = 0
        while tokens < self.tokens_per_step or len(examples) < self.parts:
            name = rng.choices(self._names, self._weights)[0]
            if name in _GRAMMARS:
                drawn = self._drawn_example(name, rng, most)
                if drawn is None:
                    too_long += 1
                    if too_long == _MAX_TOO_LONG:
                        raise _nothing_fits(name, self.encoder)
                    continue
                too_long, example = 0, drawn
            else:
                example = rng.choice(self._fixed[name])
            examples.append(example)
            tokens += len(example)
        return examples

    def _drawn_example(self, name: str, rng: random.Random, most: int) -> Example | None:
        steps, draw = rng.randint(MIN_STEPS, most), _GRAMMARS[name]
        problem = draw_in_split(rng, "train", lambda drawn: draw(drawn, steps))
        return self.encoder.example(problem)


def _nothing_fits(name: str, encoder: Encoder) -> DeliberateError:
    return DeliberateError(
        f"no problem of {name!r} fits data.max_tokens={encoder.max_tokens}: raise it"
    )


def _cut(examples: Sequence[T], parts: int, tokens: int) -> list[list[T]]:
    """Consecutive runs of nearly equal token counts; none is empty."""
    runs: list[list[T]] = [[]]
    seen = 0
    for position, example in enumerate(examples):
        left = len(examples) - position
        open_runs = parts - len(runs)
        full = seen >= tokens * len(runs) / parts
        if runs[-1] and open_runs and (full or left == open_runs):
            runs.append([])
        runs[-1].append(example)
        seen += len(example)
    return runs


def rows_of(
    batches: MixtureBatches | Sequence[Mapping[str, Tensor]], tokens: int
) -> list[list[int]]:
    """The texts of some micro-batches, each by itself and once, of so many tokens or more.

    Args:
        batches: `MixtureBatches`, packed or not, or a list of theirs.
    """
    texts: list[list[int]] = []
    known: set[tuple[int, ...]] = set()
    found = 0
    for number in range(len(batches)):
        batch = batches[number]
        for place, mask in enumerate(batch["attention_mask"]):
            row = batch["input_ids"][place, : int(mask.sum())].tolist()
            starts = [0]
            if "position_ids" in batch:
                positions = batch["position_ids"][place, : len(row)]
                starts = (positions == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
                text = row[start:end]
                if len(text) > 1 and tuple(text) not in known:
                    known.add(tuple(text))
                    texts.append(text)
                    found += len(text)
        if found >= tokens:
            break
    return texts
