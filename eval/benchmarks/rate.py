"""`deliberate bench rate`: one rate for depth, length and number of chains, against each alone.

Tables are fitted on one half of the problems of files of recorded chains, one file or more for each
fidelity; each variant's setting for a budget of mean seconds is chosen there too. The other half is
judged by them, and so the first half by the other's. Fixed rules cut every chain at one length and
sample a fixed number of chains. With `online` problems the plan of one budget is decoded, beside
each level alone (`deliberate.eval.benchmarks.rate_online`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf

from deliberate.api import checkpoint
from deliberate.eval.benchmarks.chains import halves
from deliberate.eval.benchmarks.harness import Session, table_console
from deliberate.eval.benchmarks.rate_choice import (
    UNANSWERED,
    Choice,
    Play,
    Problem,
    Setting,
    choose,
    enough,
    mean_seconds,
    share_right,
)
from deliberate.eval.benchmarks.rate_online import (
    Levels,
    OnlineRow,
    Plan,
    decode_plans,
    show_online,
)
from deliberate.eval.benchmarks.rate_tables import ONE, WIDTH, RateRow, rate_figure, show
from deliberate.eval.benchmarks.settings import bench_config, mapped
from deliberate.eval.grading.equality import same_answer
from deliberate.eval.statistics import paired_accuracy
from deliberate.reasoning.calibrated_bands import boundary_ids
from deliberate.reasoning.chain_calibration import fit_curves
from deliberate.reasoning.chain_walks import LookPlaces, walk
from deliberate.reasoning.rate_replay import (
    Spent,
    replay_cut,
    replay_rate,
    replay_whole,
)
from deliberate.reasoning.rate_votes import VoteTables, fit_votes
from deliberate.reasoning.rates import ProblemChains, RateTables, fit_tables
from deliberate.reasoning.recorded_chains import ChainCosts, ChainSet, RecordedChain
from deliberate.utils.checks import all_at_least
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text

DEPTH, LENGTH, CHAINS = "depth alone", "length alone", "chains alone"
LEVELS = (DEPTH, LENGTH, CHAINS)
_RATES_TRIED = 30
_CUTS = (0.3, 0.45, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Comparison:
    """All rows, and what was fitted.

    Attributes:
        rows: every variant at every budget.
        tables: by fidelity, of the first half.
        chosen: by budget and variant, of the first half.
    """

    rows: list[RateRow]
    tables: Mapping[str, RateTables]
    chosen: Mapping[float, Mapping[str, Choice]]


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
    settings = mapped(cfg, "places")
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
    plans = [
        Plan(
            name,
            choice.name,
            choice.setting.levels,
            None if choice.dearer is None else choice.dearer.levels,
            choice.share,
        )
        for name, choice in found.chosen[budget].items()
        if name in (ONE, *LEVELS)
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


@dataclass(frozen=True)
class _Fold:
    """What one half of the problems chose.

    Attributes:
        tables: by fidelity.
        found: by variant, the settings that may be chosen.
        tried: of each, what it spent on these problems.
        judged: the other half.
    """

    tables: Mapping[str, RateTables]
    found: Mapping[str, Sequence[Setting]]
    tried: Mapping[str, Sequence[Sequence[Spent]]]
    judged: Sequence[Problem]

    def choices(self, budget: float) -> dict[str, Choice]:
        """Of every variant."""
        chosen = {name: choose(budget, own, self.tried[name]) for name, own in self.found.items()}
        return {name: choice for name, choice in chosen.items() if choice is not None}

    def limits(self) -> tuple[float, float]:
        """The least and the most mean seconds of a budget."""
        low = min(map(mean_seconds, self.tried[ONE][1:])) * 1.02
        compared = (name for name in (ONE, *LEVELS) if name in self.tried)
        return low, max(1.02 * low, *(enough(self.tried[name]) for name in compared))


def compare(
    files: Sequence[ChainSet],
    places: LookPlaces,
    encode: Callable[[str], Sequence[int]],
    budgets: int,
) -> Comparison:
    """Every variant at every budget, each half of the problems by what the other one chose."""
    split = {
        fidelity: tuple(
            problems_of(half, places, encode) for half in zip(*map(halves, own), strict=True)
        )
        for fidelity, own in by_fidelity(files).items()
    }
    one, other = ({name: own[half] for name, own in split.items()} for half in (0, 1))
    folds = [_fold(one, other, places), _fold(other, one, places)]
    rows, picked = [], {}
    for budget in map(float, np.geomspace(*folds[0].limits(), budgets)):
        chosen = [fold.choices(budget) for fold in folds]
        picked[budget] = chosen[0]
        done = {
            name: [
                spent
                for fold, choices in zip(folds, chosen, strict=True)
                for spent in choices[name].spend(fold.judged)
            ]
            for name in chosen[0]
        }
        rows += _rows(budget, chosen[0], done)
    return Comparison(rows, folds[0].tables, picked)


def _fold(
    fitting: Mapping[str, Sequence[ProblemChains]],
    judged: Mapping[str, Sequence[ProblemChains]],
    places: LookPlaces,
) -> _Fold:
    tables = {}
    for fidelity, problems in fitting.items():
        curves = fit_curves([one for p in problems for one in p.walks], places)
        tables[fidelity] = fit_tables(problems, curves)
    chose = _together(fitting)
    found = variants(tables, chose)
    tried = {
        name: [[setting.play(p) for p in chose] for setting in settings]
        for name, settings in found.items()
    }
    return _Fold(tables, found, tried, _together(judged))


def _together(problems: Mapping[str, Sequence[ProblemChains]]) -> list[Problem]:
    """Of each problem the chains of every fidelity."""
    return [dict(zip(problems, own, strict=True)) for own in zip(*problems.values(), strict=True)]


def _rows(
    budget: float, chosen: Mapping[str, Choice], done: Mapping[str, Sequence[Spent]]
) -> list[RateRow]:
    """The variants at a budget; the setting's name is that of the first half's choice."""
    own = [one.right for one in done[ONE]]
    return [
        RateRow(
            name,
            budget,
            chosen[name].name,
            share_right(spent),
            mean_seconds(spent),
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
    base = "dense" if "dense" in tables else next(iter(tables))

    def votes(fidelity: str, rate: float, length: bool) -> VoteTables:
        own = [problem[fidelity] for problem in fitting]
        return fit_votes(own, tables[fidelity], rate, same_answer, length=length)

    # Without probes chains are the same at any rate.
    whole = {fidelity: votes(fidelity, 0.0, False) for fidelity in tables}
    known = [*(one.looks for one in tables.values()), whole[base].rates]
    rates = sorted({r for own in known for r in own.values() if r > 0})
    least_rates = [0.0]
    if rates:
        least_rates += np.geomspace(min(rates) / 2, max(rates) * 2, _RATES_TRIED).tolist()

    def play(levels: Levels) -> Play:
        def spend(problem: Problem) -> Spent:
            own, table = problem[levels.fidelity], tables[levels.fidelity]
            rate, vote = levels.least_rate, levels.votes
            return replay_rate(own, table, rate, same_answer, votes=vote, length=levels.length)

        return spend

    def plans(f: str, length: bool) -> list[Setting]:
        name = f if length else f"{f}, unprobed"
        found = (
            Levels(f, rate, length, votes(f, rate, True) if length else whole[f])
            for rate in least_rates
        )
        return [Setting(f"{one.least_rate:.3g}, {name}", play(one), one) for one in found]

    def rated(fidelity: str, vote: VoteTables | None, length: bool) -> list[Setting]:
        found = (Levels(fidelity, rate, length, vote) for rate in least_rates)
        return [Setting(f"{one.least_rate:.3g}", play(one), one) for one in found]

    def unruled(replay: Callable[..., Spent], size: int) -> Play:
        return lambda problem: replay(problem[base], size, same_answer)

    longest = max(one.tokens for p in fitting for one in p[base].walks)
    sizes = [int(share * longest) for share in _CUTS]
    depths = [Levels(depth) for depth in tables]
    found = {
        ONE: [one for depth in tables for probed in (True, False) for one in plans(depth, probed)],
        DEPTH: [Setting(one.fidelity, play(one), one) for one in depths],
        LENGTH: rated(base, None, True),
        CHAINS: rated(base, whole[base], False),
        "fixed length": [Setting(f"{n} tokens", unruled(replay_cut, n)) for n in sizes],
        "fixed chains": [
            Setting(f"{n} chains", unruled(replay_whole, n)) for n in range(1, whole[base].most + 1)
        ],
    }
    # Two levels at once: what the third one adds.
    for fidelity in tables:
        if fidelity != base:
            found[f"length, {fidelity}"] = rated(fidelity, None, True)
    if len(tables) == 1:
        del found[DEPTH]
    return {name: [UNANSWERED, *settings] for name, settings in found.items()}
