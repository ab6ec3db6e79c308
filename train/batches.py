"""Training batches as a pure function of (seed, index): resuming needs no replay.

One optimizer step sees one *pool* of problems drawn from the mixture. The pool is sorted by length
and cut into `parts` micro-batches of nearly equal token counts, so that rows are padded little and
every step still sees short and long problems in the mixture's proportions.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from deliberate.errors import DeliberateError
from deliberate.train.losses import IGNORE_INDEX
from deliberate.train.problem import Problem
from deliberate.train.words import MAX_STEPS, MIN_STEPS, draw_in_split, word_problem

# So many word problems in a row that are too long mean that none fits.
_MOST_REFUSALS = 1000

PROMPT = "Question: {question}\nAnswer:"


def prompt_text(question: str, template: str = PROMPT) -> str:
    """The text put before the model's answer."""
    return template.format(question=question.strip())


@dataclass(frozen=True)
class Example:
    """Token ids of one problem; the loss is taken on `answer` only."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class Encoder:
    """Turns problems into token ids: ``<bos> prompt`` and ``solution <eos>``."""

    def __init__(self, tokenizer: Any, *, max_tokens: int, template: str = PROMPT) -> None:
        if tokenizer.eos_token_id is None:
            raise DeliberateError("the tokenizer has no end-of-text token: answers could not stop")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.template = template

    def prompt(self, question: str) -> list[int]:
        """Ids of a question as the model is asked it."""
        bos = self.tokenizer.bos_token_id
        text = prompt_text(question, self.template)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ([] if bos is None else [bos]) + ids

    def example(self, problem: Problem) -> Example | None:
        """Ids of a problem with its solution, or None where it is longer than `max_tokens`."""
        solution = problem.solution or f"#### {problem.answer}"
        answer = self.tokenizer.encode(" " + solution.strip(), add_special_tokens=False)
        example = Example(self.prompt(problem.question), [*answer, self.tokenizer.eos_token_id])
        return example if len(example) <= self.max_tokens else None


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Right-padded batch: ``input_ids``, ``labels`` and ``attention_mask``, int64 ``[B, T]``.

    Labels are `IGNORE_INDEX` on prompt and padding; they are not shifted.
    """
    longest = max(len(example) for example in examples)
    ids = torch.full((len(examples), longest), pad_id)
    labels = torch.full((len(examples), longest), IGNORE_INDEX)
    mask = torch.zeros((len(examples), longest), dtype=torch.int64)
    for row, example in enumerate(examples):
        size = len(example)
        ids[row, :size] = torch.tensor(example.prompt + example.answer)
        labels[row, len(example.prompt) : size] = torch.tensor(example.answer)
        mask[row, :size] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def curriculum_steps(progress: float, *, full_at: float) -> int:
    """Most steps of a word problem at `progress` in [0, 1]: 2 at first, all six from `full_at`."""
    if progress >= full_at:
        return MAX_STEPS
    return min(MAX_STEPS, 2 + int(progress / full_at * (MAX_STEPS - 2)))


class MixtureBatches(Dataset[dict[str, Tensor]]):
    """Map-style data set whose item i is micro-batch i.

    Args:
        encoder: makes the token ids.
        fixed: lists of training problems by source.
        weights: share of problems by source; the key ``words`` is the grammar, drawn afresh.
        pools: optimizer steps; the length is ``pools * parts``.
        parts: micro-batches in a step.
        tokens_per_step: real tokens in a pool, at least.
        seed: of the draws; equal seeds and settings give equal micro-batches.
        curriculum: share of training by whose end problems of all lengths are drawn.

    Raises:
        DeliberateError: a negative weight, no source at all, or one with nothing short enough.
    """

    def __init__(
        self,
        encoder: Encoder,
        fixed: Mapping[str, Sequence[Problem]],
        weights: Mapping[str, float],
        *,
        pools: int,
        parts: int,
        tokens_per_step: int,
        seed: int,
        curriculum: float = 0.0,
    ) -> None:
        self.encoder = encoder
        self.pools, self.parts = pools, parts
        self.tokens_per_step = tokens_per_step
        self.seed = seed
        self.curriculum = curriculum
        for name, weight in weights.items():
            if weight < 0:
                raise DeliberateError(f"weight {weight} of data source {name!r} is negative")
        self._names = [name for name, weight in weights.items() if weight > 0]
        self._weights = [float(weights[name]) for name in self._names]
        if not self._names:
            raise DeliberateError("the data mixture is empty: give a source a weight above 0")
        # Encoded once: they are drawn again and again.
        self._fixed = {
            name: [e for p in fixed[name] if (e := encoder.example(p)) is not None]
            for name in self._names
            if name != "words"
        }
        for name, examples in self._fixed.items():
            if not examples:
                raise _nothing_fits(name, encoder)
        self._cached: tuple[int, list[list[Example]]] | None = None

    def __len__(self) -> int:
        return self.pools * self.parts

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pool, part = divmod(index, self.parts)
        if self._cached is None or self._cached[0] != pool:
            self._cached = (pool, self.pool(pool))
        return collate(self._cached[1][part], self._pad_id())

    def _pad_id(self) -> int:
        tokenizer = self.encoder.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def pool(self, index: int) -> list[list[Example]]:
        """The micro-batches of optimizer step `index`."""
        rng = random.Random(f"pool:{self.seed}:{index}")
        most = (
            curriculum_steps(index / self.pools, full_at=self.curriculum)
            if self.curriculum > 0
            else MAX_STEPS
        )
        examples: list[Example] = []
        tokens = refused = 0
        while tokens < self.tokens_per_step or len(examples) < self.parts:
            name = rng.choices(self._names, self._weights)[0]
            if name == "words":
                drawn = self._word_example(rng, most)
                if drawn is None:
                    refused += 1
                    if refused == _MOST_REFUSALS:
                        raise _nothing_fits(name, self.encoder)
                    continue
                refused, example = 0, drawn
            else:
                example = rng.choice(self._fixed[name])
            examples.append(example)
            tokens += len(example)
        examples.sort(key=len)
        return _cut(examples, self.parts, tokens)

    def _word_example(self, rng: random.Random, most: int) -> Example | None:
        steps = rng.randint(MIN_STEPS, most)
        problem = draw_in_split(rng, "train", lambda drawn: word_problem(drawn, steps))
        return self.encoder.example(problem)


def _nothing_fits(name: str, encoder: Encoder) -> DeliberateError:
    return DeliberateError(
        f"no problem of {name!r} fits data.max_tokens={encoder.max_tokens}: raise it"
    )


def _cut(examples: Sequence[Example], parts: int, tokens: int) -> list[list[Example]]:
    """Consecutive runs of nearly equal token counts; none is empty."""
    runs: list[list[Example]] = [[]]
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
