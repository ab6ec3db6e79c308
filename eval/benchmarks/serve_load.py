"""What `deliberate bench serve` sends: prompts, limits, deadlines, arrivals."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from deliberate.data import seeds
from deliberate.data.problem import Problem
from deliberate.data.prompts import Encoder
from deliberate.data.word_problems import word_problems
from deliberate.eval.benchmarks.harness import UNBOUNDED
from deliberate.eval.tasks.prompts import prompt_encoder
from deliberate.utils.errors import DeliberateError

KINDS = ("short", "long")
_DISTINCT = 512


@dataclass(frozen=True)
class Shot:
    """One request to send.

    Attributes:
        kind: "short", "long", or the name of a tier.
        prompt: token ids.
        max_tokens: limit of the answer, which may end before.
        deadline_ms: milliseconds from arrival; None: no deadline.
        arrival: seconds after the load began, where arrivals are given.
        fields: of the body, besides.
    """

    kind: str
    prompt: tuple[int, ...]
    max_tokens: int
    deadline_ms: float | None = None
    arrival: float = 0.0
    fields: Mapping[str, Any] = field(default_factory=dict)


def shots(cfg: DictConfig, tokenizer: Any, context: int | None) -> Iterator[Shot]:
    """Requests of the mix, without end, the same for the same seed.

    Raises:
        DeliberateError: the longest of them does not fit the context.
    """
    draw = random.Random(cfg.seed)
    encoder = prompt_encoder(cfg, tokenizer, max_tokens=UNBOUNDED)
    short = itertools.cycle(_problems(cfg, (1, 3)))
    hard, solved = itertools.cycle(_problems(cfg, (5, 6))), itertools.cycle(_problems(cfg, (1, 6)))
    while True:
        if draw.random() < cfg.long_share:
            prompt = _with_examples(encoder, tokenizer, next(hard), solved, cfg.long_prompt_tokens)
            made = Shot("long", prompt, cfg.long_max_tokens, cfg.long_deadline_ms)
        else:
            prompt = tuple(encoder.prompt(next(short).question))
            made = Shot("short", prompt, cfg.short_max_tokens, cfg.short_deadline_ms)
        tokens = len(made.prompt) + made.max_tokens
        if tokens > (context or UNBOUNDED):
            raise DeliberateError(
                f"a {made.kind} request has {tokens} tokens, more than the context of {context}: "
                f"lower long_prompt_tokens or {made.kind}_max_tokens"
            )
        yield made


def _problems(cfg: DictConfig, steps: tuple[int, int]) -> list[Problem]:
    own = seeds.WORD_PROBLEMS[seeds.SERVING_BENCHMARK]
    seed = own.of(cfg.seed, f"the {seeds.SERVING_BENCHMARK}")
    return list(word_problems("test", size=_DISTINCT, seed=seed, steps=steps))


def _with_examples(
    encoder: Encoder, tokenizer: Any, problem: Problem, solved: Iterator[Problem], least: int
) -> tuple[int, ...]:
    """Solved problems before the one that is put, at least so many tokens in all."""
    made = encoder.prompt(problem.question)
    while len(made) < least:
        shown = next(solved)
        solution = tokenizer.encode(f"{shown.solution}\n\n", add_special_tokens=False)
        made = [*encoder.prompt(shown.question), *solution, *made]
    return tuple(made)


def poisson(source: Iterator[Shot], rate: float, seconds: float, seed: int) -> list[Shot]:
    """Requests with Poisson arrivals at `rate` a second until `seconds`, the first at 0."""
    draw = random.Random(seed)
    now, made = 0.0, []
    while now < seconds:
        made.append(dataclasses.replace(next(source), arrival=now))
        now += draw.expovariate(rate)
    return made
