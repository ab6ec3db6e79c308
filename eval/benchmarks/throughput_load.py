"""What `deliberate bench throughput` has served: prompts, lengths of answers, arrivals."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from deliberate.data import seeds
from deliberate.data.problem import Problem
from deliberate.data.word_problems import word_problems
from deliberate.eval.benchmarks.harness import UNBOUNDED
from deliberate.eval.tasks.prompts import prompt_encoder
from deliberate.utils.errors import DeliberateError

LOADS = ("once", "few", "poisson", "prefix", "mixed")
# Those whose requests arrive at random.
ARRIVING = ("poisson", "mixed")


@dataclass(frozen=True)
class Call:
    """One request.

    Attributes:
        prompt: token ids.
        answer: tokens of its answer; nothing else ends it.
        arrival: seconds after the load began.
    """

    prompt: tuple[int, ...]
    answer: int
    arrival: float = 0.0


@dataclass(frozen=True)
class Load:
    """Requests in the order of their arrival, and how many are served at a time at most."""

    name: str
    calls: tuple[Call, ...]
    at_a_time: int

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(call.answer for call in self.calls)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and answer."""
        return max(len(call.prompt) + call.answer for call in self.calls)


def loads_of(cfg: DictConfig, tokenizer: Any, context: int | None) -> dict[str, Load]:
    """Loads by name; those of `ARRIVING` have no arrivals yet, see `arriving`.

    Raises:
        DeliberateError: the longest request does not fit the context.
    """
    draw = random.Random(cfg.seed)
    texts = _solved_problems(cfg, tokenizer)
    calls = tuple(
        Call(_cut(texts, draw.randint(*cfg.prompt_tokens)), draw.randint(*cfg.answer_tokens))
        for _ in range(cfg.requests)
    )
    prefix = _cut(texts, cfg.prefix_tokens)
    questions = _questions(cfg, tokenizer)
    behind = tuple(
        Call(
            prefix + _own(questions, draw.randint(*cfg.own_tokens)),
            draw.randint(*cfg.prefix_answer_tokens),
        )
        for _ in range(cfg.requests)
    )
    long = sorted(draw.sample(range(cfg.requests), round(cfg.long_share * cfg.requests)))
    mixed = tuple(
        Call(_cut(texts, draw.randint(*cfg.long_tokens)), call.answer) if at in long else call
        for at, call in enumerate(calls)
    )
    made = {
        "once": Load("once", calls, cfg.max_running),
        "few": Load("few", calls, min(cfg.few, cfg.max_running)),
        "poisson": Load("poisson", calls, cfg.max_running),
        "prefix": Load("prefix", behind, cfg.max_running),
        "mixed": Load("mixed", mixed, cfg.max_running),
    }
    made = {name: made[name] for name in cfg.loads}
    longest = max(load.longest for load in made.values())
    if longest > (context or UNBOUNDED):
        raise DeliberateError(
            f"the longest request has {longest} tokens, more than the context of {context}: lower "
            "prompt_tokens, long_tokens, prefix_tokens or answer_tokens"
        )
    return made


def arriving(load: Load, rate: float, seed: int) -> Load:
    """The load with Poisson arrivals at `rate` requests a second, the first at 0."""
    draw = random.Random(seed)
    now, calls = 0.0, []
    for call in load.calls:
        calls.append(dataclasses.replace(call, arrival=now))
        now += draw.expovariate(rate)
    return dataclasses.replace(load, calls=tuple(calls))


def _problems(cfg: DictConfig) -> Iterator[Problem]:
    """Fresh word problems, without end."""
    own = seeds.WORD_PROBLEMS[seeds.THROUGHPUT_BENCHMARK]
    seed = own.of(cfg.seed, f"the {seeds.THROUGHPUT_BENCHMARK}")
    size = 8 * cfg.requests + 64
    return itertools.cycle(word_problems("test", size=size, seed=seed, steps=(1, 6)))


def _solved_problems(cfg: DictConfig, tokenizer: Any) -> Iterator[list[int]]:
    """Ids of a solved problem and then one to solve, without end."""
    encoder = prompt_encoder(cfg, tokenizer, max_tokens=UNBOUNDED)
    problems = _problems(cfg)
    for shown in problems:
        solution = tokenizer.encode(shown.solution, add_special_tokens=False)
        yield encoder.prompt(shown.question) + solution + encoder.prompt(next(problems).question)


def _questions(cfg: DictConfig, tokenizer: Any) -> Iterator[list[int]]:
    """Ids of questions alone, without end."""
    for problem in _problems(cfg):
        yield tokenizer.encode(problem.question, add_special_tokens=False)


def _cut(texts: Iterator[list[int]], tokens: int) -> tuple[int, ...]:
    """So many tokens, the last ones of a prompt with solved problems before it."""
    made: list[int] = []
    while len(made) < tokens:
        made = [*next(texts), *made]
    return tuple(made[len(made) - tokens :])


def _own(questions: Iterator[list[int]], tokens: int) -> tuple[int, ...]:
    """So many tokens, the first ones of a question."""
    made: list[int] = []
    while len(made) < tokens:
        made += next(questions)
    return tuple(made[:tokens])
