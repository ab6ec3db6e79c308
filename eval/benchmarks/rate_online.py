"""The plan of one budget, decoded on fresh problems beside each level alone, by the wall clock."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from tqdm import tqdm

from deliberate.data.problem import Problem
from deliberate.engine.spec import DecodingSpec
from deliberate.eval.benchmarks.chain_setup import ChainSetup, chain_setup
from deliberate.eval.benchmarks.harness import table_console
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.grading.equality import same_answer
from deliberate.eval.statistics import Estimate, PairedAccuracy, paired_accuracy, ratio_of_sums
from deliberate.reasoning.rate_votes import VoteTables
from deliberate.reasoning.rated_rules import RatedChain, RatedVotes
from deliberate.reasoning.rates import RateTables
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.vote_runner import run_votes
from deliberate.reasoning.votes import FixedVotes, VoteRule
from deliberate.utils.errors import DeliberateError

WIDTH = 110
_WARM = 3
_SEEDS_APART = 64
# Multiples of it, without their whole parts, are spread evenly over [0, 1).
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Levels:
    """How a problem is decoded.

    Attributes:
        fidelity: of its chains.
        least_rate: right answers a second.
        length: the chains' length draws on it.
        votes: what another chain is worth at that rate; None: one chain.
    """

    fidelity: str
    least_rate: float = 0.0
    length: bool = False
    votes: VoteTables | None = None


@dataclass(frozen=True)
class Plan:
    """How problems are decoded.

    Attributes:
        name: of the variant.
        setting: as in the table of recorded chains.
        levels: of a problem; None: it is left unanswered.
        dearer: of a share of the problems; None: of none.
        share: in [0, 1].
    """

    name: str
    setting: str
    levels: Levels | None
    dearer: Levels | None = None
    share: float = 0.0

    def of(self, number: int) -> Levels | None:
        """How problem `number` is decoded."""
        if self.dearer is not None and in_share(number, self.share):
            return self.dearer
        return self.levels


def in_share(number: int, share: float) -> bool:
    """Whether a problem is among such a share of all, which are spread evenly."""
    return (number * _GOLDEN) % 1.0 < share


@dataclass(frozen=True)
class OnlineRow:
    """One plan on the fresh problems.

    Attributes:
        right: share of right answers.
        seconds, chains, tokens: means of a problem; tokens of reasoning.
        time_ratio: its seconds over those of the first plan.
        versus: the first plan's accuracy minus this one's, paired; None for the first.
    """

    name: str
    setting: str
    budget: float
    right: float
    seconds: float
    chains: float
    tokens: float
    time_ratio: Estimate | None
    versus: PairedAccuracy | None


@dataclass(frozen=True)
class _Done:
    right: bool
    seconds: float
    chains: int
    tokens: int


def decode_plans(
    plans: Sequence[Plan],
    tables: Mapping[str, RateTables],
    *,
    budget: float,
    model: str,
    size: int,
    seed: int,
    known: frozenset[str],
    greedy_first: bool,
) -> list[OnlineRow]:
    """Decodes fresh problems of the task `chains` by every plan in turn.

    Args:
        plans: the first is compared with the others.
        tables: by fidelity.
        budget: mean seconds for which the plans were chosen.
        model: by name.
        size: problems at most.
        seed: of the problems.
        known: ids of problems that the tables have seen: they are left out.
        greedy_first: the first chain of a problem is greedy; else all are sampled.

    Raises:
        DeliberateError: all problems are known.
    """
    given = [f"model={model}", f"task.size={size}", f"seed={seed}"]
    setup = chain_setup(bench_config("bench_chains", given, verbatim=("model",)))
    problems = [one for one in setup.task.problems if one.id not in known]
    if not problems:
        raise DeliberateError(
            f"online={size} with seed={seed}: the tables have seen all of these problems; give "
            "another seed"
        )
    made: list[list[_Done]] = [[] for _ in plans]
    for number, problem in enumerate(tqdm([*problems[:_WARM], *problems], leave=False)):
        for turn in range(len(plans)):
            place = (number + turn) % len(plans)
            levels = plans[place].of(number)
            done = _Done(False, 0.0, 0, 0)
            if levels is not None:
                table = tables[levels.fidelity]
                done = _decode(setup, levels, table, problem, number, greedy_first)
            if number >= _WARM:
                made[place].append(done)
    first = made[0]
    return [
        OnlineRow(
            plan.name,
            plan.setting,
            budget,
            float(np.mean([one.right for one in done])),
            float(np.mean([one.seconds for one in done])),
            float(np.mean([one.chains for one in done])),
            float(np.mean([one.tokens for one in done])),
            None if done is first else _over(done, first),
            None
            if done is first
            else paired_accuracy([one.right for one in first], [one.right for one in done]),
        )
        for plan, done in zip(plans, made, strict=True)
    ]


def _over(done: Sequence[_Done], first: Sequence[_Done]) -> Estimate:
    seconds, others = (np.asarray([one.seconds for one in own]) for own in (done, first))
    return ratio_of_sums(seconds, others)


def _decode(
    setup: ChainSetup,
    levels: Levels,
    tables: RateTables,
    problem: Problem,
    number: int,
    greedy_first: bool,
) -> _Done:
    """One problem at its levels."""
    spec = DecodingSpec(fidelity=levels.fidelity)  # type: ignore[arg-type]

    def chain(index: int) -> ChainRequest:
        policy = None
        if levels.length:
            policy = RatedChain(tables, levels.least_rate, setup.encode, same_answer)
        greedy = greedy_first and index == 0
        seed = None if greedy else number * _SEEDS_APART + index
        return setup.request(problem, policy, seed=seed, spec=spec)

    rule: VoteRule = FixedVotes(1)
    if levels.votes is not None:
        rule = RatedVotes(
            levels.votes, levels.least_rate, setup.answer_of, same_answer, probed=levels.length
        )
    began = time.perf_counter()
    vote = run_votes(
        setup.runner,
        chain,
        rule,
        answer_of=lambda result: setup.answer_of(result.answer),
        same=same_answer,
    )
    seconds = time.perf_counter() - began
    tokens = sum(one.reasoning_tokens for one in vote.chains)
    return _Done(setup.right(vote.answer, problem), seconds, len(vote.chains), tokens)


def show_online(rows: Sequence[OnlineRow]) -> None:
    """The table of what was decoded."""
    title = f"decoded on fresh problems, by the wall clock, for a budget of {rows[0].budget:.3g} s"
    table = Table(title=title)
    for name in ("variant", "right", "s", "chains", "tokens", "its time over one rate's"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    table.add_column("one rate against it", justify="right")
    for row in rows:
        ratio, against = "", ""
        if row.time_ratio is not None and row.versus is not None:
            ratio = _interval(row.time_ratio.value, row.time_ratio.interval, "{:.2f}")
            against = _interval(100 * row.versus.difference, row.versus.interval, "{:+.1f}", 100)
        table.add_row(
            f"{row.name} ({row.setting})",
            f"{row.right:.1%}",
            f"{row.seconds:.4f}",
            f"{row.chains:.1f}",
            f"{row.tokens:.0f}",
            ratio,
            against,
        )
    table_console(WIDTH).print(table)


def _interval(value: float, interval: object, form: str, scale: float = 1.0) -> str:
    if interval is None:
        return form.format(value)
    low, high = (scale * float(getattr(interval, name)) for name in ("low", "high"))
    return f"{form.format(value)} [{form.format(low)}, {form.format(high)}]"
