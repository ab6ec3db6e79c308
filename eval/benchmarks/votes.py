"""`deliberate bench votes`: what votes gain over one greedy answer, and what rules save of them.

Every problem is answered by every variant before the next one: greedy, a fixed number of samples,
and the rules that stop earlier. Sample i of a problem has the same seed in all of them, so that
they vote on the same chains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from omegaconf import OmegaConf
from rich.table import Table

from deliberate.eval.benchmarks.chain_setup import ChainSetup, chain_setup
from deliberate.eval.benchmarks.harness import (
    CLOCKS,
    Session,
    check_clock,
    interleaved,
    table_console,
    timed,
)
from deliberate.eval.benchmarks.settings import bench_config, listed
from deliberate.eval.grading.equality import same_answer
from deliberate.eval.statistics import PairedAccuracy, paired_accuracy, ratio_of_sums
from deliberate.reasoning.chain_output import ChainResult
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.vote_runner import run_votes
from deliberate.reasoning.votes import VOTE_RULES, FixedVotes, VoteRule
from deliberate.utils.checks import all_at_least, one_of
from deliberate.utils.errors import DeliberateError

GREEDY = "greedy"
WIDTH = 110


@dataclass
class Voted:
    """One variant's answers, one entry a problem."""

    right: list[bool] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    killed: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench votes`` with overrides of `configs/bench_votes.yaml`.

    Raises:
        DeliberateError: settings that cannot work.
    """
    verbatim = ("model", "out", "open_tag", "close_tag", "answer")
    cfg = bench_config("bench_votes", arguments, verbatim=verbatim)
    all_at_least(cfg, {"samples": 2, "batch": 1, "threads": 1, "warmup": 0, "answer_tokens": 1})
    check_clock(cfg)
    rules = dict(vote_rule(one) for one in listed(cfg, "rules"))
    fixed = f"fixed {cfg.samples}"
    variants: dict[str, VoteRule | None] = {GREEDY: None, fixed: FixedVotes(cfg.samples), **rules}
    session = Session("votes", arguments, cfg.threads)
    setup = chain_setup(cfg)
    done = {name: Voted() for name in variants}
    problems = setup.task.problems
    if len(problems) <= cfg.warmup:
        raise DeliberateError(f"warmup={cfg.warmup} of {len(problems)} problems leaves none")
    for turn, problem, name in interleaved(
        problems, list(variants), warmup=cfg.warmup, title="bench votes"
    ):
        run = partial(answer, setup, problem, variants[name], turn.index)
        (text, chains), seconds = timed(run, CLOCKS[cfg.clock])
        if turn.counted:
            own = done[name]
            own.right.append(setup.right(text, problem))
            own.samples.append(len(chains))
            own.killed.append(sum(chain.killed for chain in chains))
            own.tokens.append(sum(len(chain.tokens) for chain in chains))
            own.seconds.append(seconds)
    session.end()
    show(done, fixed, f"{cfg.model} on {setup.task.name}")
    table_console(WIDTH).print(session.line(str(cfg.clock)))
    figures = {name: dataclasses.asdict(one) for name, one in done.items()}
    session.write(cfg.out, {"settings": OmegaConf.to_container(cfg), "variants": figures})


def vote_rule(given: Mapping[str, Mapping[str, Any] | None]) -> tuple[str, VoteRule]:
    """Name and rule of ``{name: settings}``.

    Raises:
        DeliberateError: several rules in one, an unknown one, or a setting that it does not have.
    """
    if not isinstance(given, Mapping) or len(given) != 1:
        raise DeliberateError(f"rules: {given!r:.80} must be one {{rule: settings}}")
    ((name, settings),) = given.items()
    one_of("rules", name, VOTE_RULES)
    try:
        return name, VOTE_RULES[name](**(settings or {}))
    except TypeError:
        fields = ", ".join(one.name for one in dataclasses.fields(VOTE_RULES[name]))  # type: ignore[arg-type]
        raise DeliberateError(f"rules: {name} has the settings {fields}") from None


def answer(
    setup: ChainSetup, problem: Any, rule: VoteRule | None, index: int
) -> tuple[str, list[ChainResult]]:
    """The answer of a variant, and its chains."""
    if rule is None:
        (one,) = setup.runner.run([setup.request(problem)])
        return setup.answer_of(one.answer), [one]

    def chain(number: int) -> ChainRequest:
        return setup.request(problem, seed=setup.cfg.seed + 1009 * (index + 1) + number)

    voted = run_votes(
        setup.runner,
        chain,
        rule,
        answer_of=lambda result: setup.answer_of(result.answer),
        same=same_answer,
    )
    return voted.answer, voted.chains


def show(done: Mapping[str, Voted], fixed: str, title: str) -> None:
    """The table: every variant against greedy and against the fixed number of samples."""
    table = Table(title=f"{title}: {len(done[fixed].right)} problems")
    for name in ("variant", "right", "samples", "fewer", "time", "against greedy", "against fixed"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    base = done[fixed]
    for name, own in done.items():
        size = len(own.right)
        time = ratio_of_sums(base.seconds, own.seconds)
        within = time.interval
        spread = "" if within is None else f" [{within.low:.2f}, {within.high:.2f}]"
        table.add_row(
            name,
            f"{sum(own.right) / size:.1%}",
            f"{sum(own.samples) / size:.1f}",
            f"{1 - sum(own.samples) / sum(base.samples):.0%}",
            f"{time.value:.2f}x{spread}",
            "" if name == GREEDY else _difference(paired_accuracy(own.right, done[GREEDY].right)),
            "" if name in (GREEDY, fixed) else _difference(paired_accuracy(own.right, base.right)),
        )
    table_console(WIDTH).print(table)


def _difference(found: PairedAccuracy) -> str:
    low, high = found.interval.low, found.interval.high
    points = f"{100 * found.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{points}, p = {found.mcnemar.p:.2g}"
