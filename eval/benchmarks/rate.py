"""`deliberate bench rate`: one rate for length and number of chains against each level alone.

Tables are fitted on every other problem of a file of recorded chains; each variant's setting for a
budget of mean seconds is chosen there too, and all are compared on the other problems. Fixed rules
cut every chain at one length and sample a fixed number of chains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from omegaconf import OmegaConf
from rich.table import Table

from deliberate.api import checkpoint
from deliberate.eval.benchmarks.chain_setup import same_answer
from deliberate.eval.benchmarks.chains import halves
from deliberate.eval.benchmarks.harness import Session, table_console
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.report.figures import PLOT_INCHES, legend, render
from deliberate.eval.statistics import PairedAccuracy, paired_accuracy
from deliberate.reasoning.calibrated_bands import boundary_ids
from deliberate.reasoning.chain_calibration import fit_curves
from deliberate.reasoning.chain_walks import LookPlaces, walk
from deliberate.reasoning.rates import (
    ProblemChains,
    RateTables,
    Spent,
    fit_tables,
    rate_for,
    replay_rate,
)
from deliberate.reasoning.recorded_chains import ChainCosts, ChainSet
from deliberate.reasoning.votes import Ballot, tally
from deliberate.utils.checks import all_at_least
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text

ONE, WIDTH = "one rate", 110
_RATES_TRIED = 30
_CUTS = (0.3, 0.45, 0.6, 0.8, 1.0)
Play = Callable[[ProblemChains], Spent]


@dataclass(frozen=True)
class RateRow:
    """One variant at one budget, on the problems that chose nothing.

    Attributes:
        budget: mean seconds allowed.
        right: share of right answers.
        seconds, chains, tokens: means.
        versus: one rate's accuracy minus this one's, paired; None for one rate itself.
    """

    name: str
    budget: float
    setting: str
    right: float
    seconds: float
    chains: float
    tokens: float
    versus: PairedAccuracy | None


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench rate`` with overrides of `configs/bench_rate.yaml`.

    Raises:
        DeliberateError: no file of chains, or chains without references.
    """
    cfg = bench_config("bench_rate", arguments, verbatim=("model", "chains", "out"), folder=True)
    all_at_least(cfg, {"budgets": 2, "threads": 1})
    if cfg.chains is None:
        raise DeliberateError(
            "chains= is missing: give the chains.jsonl that `deliberate bench chains samples=8 "
            "out=FOLDER` wrote"
        )
    session = Session("rate", arguments, cfg.threads)
    tokenizer = checkpoint.load_tokenizer(str(cfg.model))
    encode = partial(tokenizer.encode, add_special_tokens=False)
    chains = ChainSet.load(Path(str(cfg.chains)).expanduser(), encode)
    settings: Any = OmegaConf.to_container(cfg.places, resolve=True)
    rows = compare(chains, LookPlaces(**settings), encode, cfg.budgets)
    session.end()
    show(rows)
    table_console(WIDTH).print(session.line())
    if cfg.out is not None:
        out = Path(str(cfg.out))
        session.write(out / "rate.json", {"rows": [dataclasses.asdict(row) for row in rows]})
        write_text(out / "rate.svg", rate_figure(rows) + "\n")


def problems_of(
    chains: ChainSet, places: LookPlaces, encode: Callable[[str], Sequence[int]]
) -> list[ProblemChains]:
    """The chains by problem."""
    endings = boundary_ids(places.boundaries, encode)
    found: dict[str, list[Any]] = {}
    for chain in chains.chains:
        if chain.expected is None:
            raise DeliberateError(
                f"chain {chain.id!r} has no expected answer: a least rate needs it"
            )
        found.setdefault(chain.id, []).append(chain)
    return [
        ProblemChains(
            own[0].expected,
            tuple(walk(chain, places, endings, same_answer) for chain in own),
            tuple(chain.answer for chain in own),
        )
        for own in found.values()
    ]


def compare(
    chains: ChainSet, places: LookPlaces, encode: Callable[[str], Sequence[int]], budgets: int
) -> list[RateRow]:
    """Every variant at every budget."""
    fitting, testing = (problems_of(one, places, encode) for one in halves(chains))
    costs = chains.costs
    calibration = fit_curves([one for p in fitting for one in p.walks], places)
    tables = fit_tables(fitting, calibration, costs, same_answer)
    found = variants(tables, fitting, costs)
    tried = {
        name: {setting: [play(p) for p in fitting] for setting, play in plays.items()}
        for name, plays in found.items()
    }
    means = [_seconds(done) for done in tried[ONE].values()]
    rows = []
    for budget in np.linspace(min(means) * 1.02, max(means), budgets):
        chosen: dict[str, tuple[str, list[Spent]]] = {}
        for name, plays in found.items():
            names = list(plays)
            place = rate_for(
                float(budget),
                range(len(names)),
                [_seconds(tried[name][one]) for one in names],
                [_right(tried[name][one]) for one in names],
            )
            if place is not None:
                setting = names[int(place)]
                chosen[name] = setting, [plays[setting](p) for p in testing]
        if ONE not in chosen:
            continue
        own = [one.right for one in chosen[ONE][1]]
        for name, (setting, done) in chosen.items():
            versus = None if name == ONE else paired_accuracy(own, [one.right for one in done])
            rows.append(
                RateRow(
                    name,
                    float(budget),
                    setting,
                    _right(done),
                    _seconds(done),
                    float(np.mean([one.chains for one in done])),
                    float(np.mean([one.tokens for one in done])),
                    versus,
                )
            )
    return rows


def variants(
    tables: RateTables, fitting: Sequence[ProblemChains], costs: ChainCosts
) -> dict[str, dict[str, Play]]:
    """By name and setting, how a problem is spent on."""
    rates = sorted({r for r in (*tables.looks.values(), *tables.votes.values()) if r > 0})
    least_rates = (
        [0.0, *np.geomspace(min(rates) / 2, max(rates) * 2, _RATES_TRIED)] if rates else [0.0]
    )

    def rated(*, length: bool = True, chains: bool = True) -> dict[str, Play]:
        return {
            f"{least_rate:.3g}": partial(
                replay_rate,
                tables=tables,
                least_rate=float(least_rate),
                costs=costs,
                same=same_answer,
                length=length,
                chains=chains,
            )
            for least_rate in least_rates
        }

    longest = max(one.tokens for p in fitting for one in p.walks)
    return {
        ONE: rated(),
        "length alone": rated(chains=False),
        "chains alone": rated(length=False),
        "fixed length": {
            f"{int(share * longest)} tokens": partial(cut, size=int(share * longest), costs=costs)
            for share in _CUTS
        },
        "fixed chains": {
            f"{n} chains": partial(fixed, count=n, costs=costs) for n in range(1, tables.most + 1)
        },
    }


def cut(problem: ProblemChains, size: int, costs: ChainCosts) -> Spent:
    """One chain, cut at a length; the newest probe up to there answers."""
    one, answer = problem.walks[0], problem.answers[0]
    if one.tokens <= size:
        right = bool(answer) and same_answer(answer, problem.expected)
        return Spent(right, costs.chain + costs.token * one.tokens, 1, one.tokens)
    before = [look for look in one.looks if look.at <= size]
    seconds = costs.chain + costs.token * size + costs.probe
    return Spent(bool(before and before[-1].right), seconds, 1, size)


def fixed(problem: ProblemChains, count: int, costs: ChainCosts) -> Spent:
    """A fixed number of whole chains."""
    winner = tally([Ballot(one) for one in problem.answers[:count]], same_answer).winner
    tokens = sum(one.tokens for one in problem.walks[:count])
    right = bool(winner) and same_answer(winner, problem.expected)
    return Spent(right, count * costs.chain + costs.token * tokens, count, tokens)


def _seconds(done: Sequence[Spent]) -> float:
    return float(np.mean([one.seconds for one in done]))


def _right(done: Sequence[Spent]) -> float:
    return float(np.mean([one.right for one in done]))


def show(rows: Sequence[RateRow]) -> None:
    """The table, a block a budget."""
    table = Table(title="right answers at the same mean seconds a problem, on fresh problems")
    for name in ("budget", "variant", "right", "took", "chains", "tokens", "one rate against it"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for row in rows:
        against = ""
        if row.versus is not None:
            low, high = row.versus.interval.low, row.versus.interval.high
            against = f"{100 * row.versus.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        table.add_row(
            f"{row.budget:.3g} s" if row.name == ONE else "",
            f"{row.name} ({row.setting})",
            f"{row.right:.1%}",
            f"{row.seconds:.3g}",
            f"{row.chains:.1f}",
            f"{row.tokens:.0f}",
            against,
        )
    table_console(WIDTH).print(table)


def rate_figure(rows: Sequence[RateRow]) -> str:
    """Right answers against mean seconds, one line a variant."""

    def draw(axes: Axes) -> None:
        lines: dict[str, list[RateRow]] = {}
        for row in rows:
            lines.setdefault(row.name, []).append(row)
        for name, own in lines.items():
            width = 2.0 if name == ONE else 1.0
            places = [row.seconds for row in own]
            axes.plot(places, [row.right for row in own], marker="o", linewidth=width, label=name)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("mean seconds a problem by the measured costs, probes included")
        axes.set_ylabel("right answers")
        legend(axes)

    return render(draw, "rate", "One rate against each level alone", height=PLOT_INCHES * 1.2)
