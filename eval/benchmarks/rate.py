"""`deliberate bench rate`: one rate for depth, length and number of chains, against each alone.

Tables are fitted on every other problem of files of recorded chains, one file or more for each
fidelity; each variant's setting for a budget of mean seconds is chosen there too, and all are
compared on the other problems. Fixed rules cut every chain at one length and sample a fixed number
of chains. With `online` problems the plan of one budget is decoded, beside the best level alone
(`deliberate.eval.benchmarks.rate_online`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from deliberate.api import checkpoint
from deliberate.eval.benchmarks.chain_setup import same_answer
from deliberate.eval.benchmarks.chains import halves
from deliberate.eval.benchmarks.harness import Session, table_console
from deliberate.eval.benchmarks.rate_online import OnlineRow, Plan, decode_plans, show_online
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
    best_depth,
    fit_tables,
    rate_for,
    replay_cut,
    replay_rate,
    replay_whole,
)
from deliberate.reasoning.recorded_chains import ChainCosts, ChainSet, RecordedChain
from deliberate.utils.checks import all_at_least
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text

ONE, DEPTH, LENGTH, CHAINS = "one rate", "depth alone", "length alone", "chains alone"
WIDTH = 110
_RATES_TRIED = 30
_CUTS = (0.3, 0.45, 0.6, 0.8, 1.0)
# A problem's chains by fidelity.
Problem = Mapping[str, ProblemChains]
Play = Callable[[Problem], Spent]


@dataclass(frozen=True)
class Setting:
    """What a variant does at a budget.

    Attributes:
        name: in the table.
        play: what it spends on a problem.
        fidelity: of its chains.
        least_rate: that tables are compared with.
        length, chains: which levels draw on it.
    """

    name: str
    play: Play
    fidelity: str
    least_rate: float = 0.0
    length: bool = False
    chains: bool = False


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


@dataclass(frozen=True)
class Comparison:
    """All rows, and what was fitted.

    Attributes:
        rows: every variant at every budget.
        tables: by fidelity.
        chosen: by budget and variant, the setting.
    """

    rows: list[RateRow]
    tables: Mapping[str, RateTables]
    chosen: Mapping[float, Mapping[str, Setting]]


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench rate`` with overrides of `configs/bench_rate.yaml`.

    Raises:
        DeliberateError: no file of chains, or chains without references.
    """
    listed = any(one.replace(" ", "").startswith("chains=[") for one in arguments)
    verbatim = ("model", "out") if listed else ("model", "chains", "out")
    cfg = bench_config("bench_rate", arguments, verbatim=verbatim, folder=True)
    all_at_least(cfg, {"budgets": 2, "threads": 1, "online": 0})
    if cfg.chains is None:
        raise DeliberateError(
            "chains= is missing: give the chains.jsonl that `deliberate bench chains samples=8 "
            "out=FOLDER` wrote, or a list of such files"
        )
    session = Session("rate", arguments, cfg.threads)
    tokenizer = checkpoint.load_tokenizer(str(cfg.model))
    encode = partial(tokenizer.encode, add_special_tokens=False)
    named = list(cfg.chains) if OmegaConf.is_list(cfg.chains) else [cfg.chains]
    files = [ChainSet.load(Path(str(one)).expanduser(), encode) for one in named]
    settings: Any = OmegaConf.to_container(cfg.places, resolve=True)
    found = compare(files, LookPlaces(**settings), encode, cfg.budgets)
    online = decoded(cfg, found, files) if cfg.online else []
    session.end()
    show(found.rows)
    if online:
        show_online(online)
    table_console(WIDTH).print(session.line())
    if cfg.out is not None:
        out = Path(str(cfg.out))
        written = [dataclasses.asdict(row) for row in found.rows]
        decoding = [dataclasses.asdict(row) for row in online]
        session.write(out / "rate.json", {"rows": written, "online": decoding})
        write_text(out / "rate.svg", rate_figure(found.rows) + "\n")


def decoded(cfg: DictConfig, found: Comparison, files: Sequence[ChainSet]) -> list[OnlineRow]:
    """The middle budget's plan and each level alone, on problems that are in no file."""
    budget = list(found.chosen)[len(found.chosen) // 2]
    chosen = found.chosen[budget]
    plans = [
        Plan(name, one.name, one.fidelity, one.least_rate, one.length, one.chains)
        for name, one in chosen.items()
        if name in (ONE, DEPTH, LENGTH, CHAINS)
    ]
    return decode_plans(
        plans,
        found.tables,
        budget=budget,
        model=str(cfg.model),
        size=int(cfg.online),
        seed=int(cfg.seed),
        known=frozenset(chain.id for file in files for chain in file.chains),
        greedy_first=not all(map(_sampled, files)),
    )


def problems_of(
    files: Sequence[ChainSet], places: LookPlaces, encode: Callable[[str], Sequence[int]]
) -> list[ProblemChains]:
    """The chains by problem, in the order of the first file; greedy chains come first.

    Raises:
        DeliberateError: chains without references, or files of other problems.
    """
    endings = boundary_ids(places.boundaries, encode)
    found: dict[str, list[tuple[RecordedChain, ChainCosts]]] = {}
    greedy = [one for one in files if one.header.conditions.get("sampling") == "greedy"]
    for file in (*greedy, *(one for one in files if one not in greedy)):
        for chain in file.chains:
            if chain.expected is None:
                raise DeliberateError(
                    f"chain {chain.id!r} has no expected answer: a least rate needs it"
                )
            found.setdefault(chain.id, []).append((chain, file.costs))
    if len({tuple(dict.fromkeys(c.id for c in file.chains)) for file in files}) > 1:
        raise DeliberateError(
            "chains= names files of different problems: record them with the same task, size, seed"
        )
    return [
        ProblemChains(
            str(own[0][0].expected),
            tuple(walk(chain, places, endings, same_answer) for chain, _ in own),
            tuple(chain.answer for chain, _ in own),
            tuple(costs for _, costs in own),
        )
        for own in found.values()
    ]


def by_fidelity(files: Sequence[ChainSet]) -> dict[str, list[ChainSet]]:
    """The files of each fidelity; one that has no sampled chains takes those of dense decoding.

    In exact mode a chain is the one that dense decoding gives, so dense's may stand for it.
    """
    found: dict[str, list[ChainSet]] = {}
    for file in files:
        found.setdefault(file.header.fidelity, []).append(file)
    sampled = [one for one in found.get("dense", ()) if _sampled(one)]
    for own in found.values():
        if not any(map(_sampled, own)):
            own += sampled
    return found


def _sampled(file: ChainSet) -> bool:
    return file.header.conditions.get("sampling") != "greedy"


def compare(
    files: Sequence[ChainSet],
    places: LookPlaces,
    encode: Callable[[str], Sequence[int]],
    budgets: int,
) -> Comparison:
    """Every variant at every budget."""
    fitting: dict[str, list[ProblemChains]] = {}
    testing: dict[str, list[ProblemChains]] = {}
    tables = {}
    for fidelity, own in by_fidelity(files).items():
        first, second = zip(*map(halves, own), strict=True)
        fitting[fidelity] = problems_of(first, places, encode)
        testing[fidelity] = problems_of(second, places, encode)
        walks = [one for p in fitting[fidelity] for one in p.walks]
        tables[fidelity] = fit_tables(fitting[fidelity], fit_curves(walks, places), same_answer)
    chose, judged = (_together(one) for one in (fitting, testing))
    found = variants(tables, chose)
    tried = {
        name: [[setting.play(p) for p in chose] for setting in settings]
        for name, settings in found.items()
    }
    means = [_seconds(done) for done in tried[ONE]]
    rows, picked = [], {}
    for budget in map(float, np.linspace(min(means) * 1.02, max(means), budgets)):
        chosen: dict[str, Setting] = {}
        for name, settings in found.items():
            seconds, right = map(_seconds, tried[name]), map(_right, tried[name])
            place = rate_for(budget, range(len(settings)), list(seconds), list(right))
            if place is not None:
                chosen[name] = settings[int(place)]
        picked[budget] = chosen
        if ONE in chosen:
            rows += _rows(budget, chosen, judged)
    return Comparison(rows, tables, picked)


def _together(problems: Mapping[str, Sequence[ProblemChains]]) -> list[Problem]:
    """Of each problem the chains of every fidelity."""
    return [dict(zip(problems, own, strict=True)) for own in zip(*problems.values(), strict=True)]


def _rows(
    budget: float, chosen: Mapping[str, Setting], problems: Sequence[Problem]
) -> list[RateRow]:
    """The variants at a budget, on problems that chose nothing."""
    done = {name: [setting.play(p) for p in problems] for name, setting in chosen.items()}
    own = [one.right for one in done[ONE]]
    return [
        RateRow(
            name,
            budget,
            chosen[name].name,
            _right(spent),
            _seconds(spent),
            float(np.mean([one.chains for one in spent])),
            float(np.mean([one.tokens for one in spent])),
            None if name == ONE else paired_accuracy(own, [one.right for one in spent]),
        )
        for name, spent in done.items()
    ]


def variants(
    tables: Mapping[str, RateTables], fitting: Sequence[Problem]
) -> dict[str, list[Setting]]:
    """By name, the settings that may be chosen: how a problem is spent on."""
    known = [(*one.looks.values(), *one.votes.values()) for one in tables.values()]
    rates = sorted({r for own in known for r in own if r > 0})
    least_rates = [0.0]
    if rates:
        least_rates += np.geomspace(min(rates) / 2, max(rates) * 2, _RATES_TRIED).tolist()
    base = "dense" if "dense" in tables else next(iter(tables))

    def play(fidelity: str, rate: float, *, length: bool = False, chains: bool = False) -> Play:
        def spend(problem: Problem) -> Spent:
            own, table = problem[fidelity], tables[fidelity]
            return replay_rate(own, table, rate, same_answer, length=length, chains=chains)

        return spend

    def plan(least_rate: float) -> Setting:
        plays = {
            fidelity: play(fidelity, least_rate, length=True, chains=True) for fidelity in tables
        }
        spent = {fidelity: [own(p) for p in fitting] for fidelity, own in plays.items()}
        depth = best_depth(least_rate, spent)
        name = f"{least_rate:.3g}" if len(tables) == 1 else f"{least_rate:.3g}, {depth}"
        return Setting(name, plays[depth], depth, least_rate, length=True, chains=True)

    def rated(fidelity: str, **levels: bool) -> list[Setting]:
        return [
            Setting(f"{r:.3g}", play(fidelity, r, **levels), fidelity, r, **levels)
            for r in least_rates
        ]

    def unruled(replay: Callable[..., Spent], fidelity: str, size: int) -> Play:
        return lambda problem: replay(problem[fidelity], size, same_answer)

    longest = max(one.tokens for p in fitting for one in p[base].walks)
    sizes = [int(share * longest) for share in _CUTS]
    found = {
        ONE: [plan(least_rate) for least_rate in least_rates],
        DEPTH: [Setting(one, unruled(replay_whole, one, 1), one) for one in tables],
        LENGTH: rated(base, length=True),
        CHAINS: rated(base, chains=True),
        "fixed length": [Setting(f"{n} tokens", unruled(replay_cut, base, n), base) for n in sizes],
        "fixed chains": [
            Setting(f"{n} chains", unruled(replay_whole, base, n), base)
            for n in range(1, tables[base].most + 1)
        ],
    }
    # Two levels at once: what the third one adds.
    for fidelity in tables:
        if fidelity != base:
            found[f"length, {fidelity}"] = rated(fidelity, length=True)
    if len(tables) == 1:
        del found[DEPTH]
    return found


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
