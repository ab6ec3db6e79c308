"""`deliberate bench gate`: the gate and early exit together, against the dense model without gate.

Every problem is answered at batch 1 in every way before the next problem, in rotating order: the
baseline (full depth, no gate), full depth, exact, threshold, certified where the calibration has a
certificate of accuracy, and threshold mode at several prices of the calibration, each of which sets
exits and band. Accuracy is compared problem by problem, time as totals over all problems.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from deliberate.api import checkpoint
from deliberate.api.generation import AdaptiveDecoding
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.certificate import Risk
from deliberate.calibration.stopping_policy import PolicyTable
from deliberate.data import seeds
from deliberate.data.prompts import Encoder
from deliberate.eval.benchmarks.cost import CLOCKS
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.grading.graders import GraderPool
from deliberate.eval.report.detokenize import decode_text
from deliberate.eval.runner.guarantee_check import certificate_notes
from deliberate.eval.runner.model_names import model_name
from deliberate.eval.runner.runner import plain_greedy
from deliberate.eval.statistics import Interval, mcnemar_exact, paired_difference_interval
from deliberate.eval.tasks.calibration_overlap import set_apart
from deliberate.eval.tasks.prompts import asking_encoder, run_conditions
from deliberate.eval.tasks.registry import VERBATIM, command_task
from deliberate.eval.tasks.task import Task
from deliberate.kernels.backends import describe
from deliberate.utils.devices import synchronize
from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.environment import load_average
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text

BASELINE = "dense, no gate"
WAYS = ("dense", "exact", "threshold", "certified", "prices")
RESAMPLES = 1000


@dataclass
class Taken:
    """What one way took over the problems so far: a number of each for every problem."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class GateRow:
    """One way against the baseline, on the same problems.

    Attributes:
        accuracy: share of right answers.
        difference, interval: accuracy less the baseline's, with Newcombe's paired interval.
        gained, lost, p: problems only this way solved, only the baseline, and McNemar's exact p.
        time, time_interval: total seconds over the baseline's, and a percentile bootstrap over
            problems.
        ms_per_token: total time over all tokens, prompt pass included.
        rounds, layers: rounds and layer calls per token.
        identical: problems answered with the tokens of full depth with the gate.
    """

    name: str
    accuracy: float
    difference: float
    interval: Interval
    gained: int
    lost: int
    p: float
    time: float
    time_interval: Interval
    ms_per_token: float
    rounds: float
    layers: float
    identical: int


def ways_of(model: AdaptiveModel, prices: Sequence[float]) -> dict[str, Mapping[str, Any]]:
    """What `AdaptiveDecoding` is given, by name.

    Raises:
        DeliberateError: a model without a gate, or prices for one without a calibration.
    """
    if model.gate is None:
        raise DeliberateError(
            "the model has no deliberation gate: give model=tiny-gate or one that was trained with "
            "`deliberate train +experiment=gate`"
        )
    found: dict[str, Mapping[str, Any]] = {
        BASELINE: {"fidelity": "dense", "gate": False},
        "dense": {"fidelity": "dense"},
        "exact": {"fidelity": "exact"},
        "threshold": {"fidelity": "threshold"},
    }
    if model.calibration is None and not prices:
        return found
    certificates = model.require_calibration().certificates
    if any(certificate.risk is Risk.ACCURACY for certificate in certificates):
        found["certified"] = {"fidelity": "certified", "risk": "accuracy"}
    for price in prices:
        found[f"price {price:.3g}"] = {"fidelity": "threshold", "lambda_": price}
    return found


def chosen(
    ways: Mapping[str, Mapping[str, Any]], wanted: Sequence[str] | None
) -> dict[str, Mapping[str, Any]]:
    """The baseline and the wanted ones of `WAYS`; all without a choice."""
    kept = set(WAYS if wanted is None else wanted)
    return {
        name: way
        for name, way in ways.items()
        if name == BASELINE or name in kept or ("lambda_" in way and "prices" in kept)
    }


def prices_of(table: PolicyTable, count: int, risks: Sequence[float]) -> list[float]:
    """So many prices on a log scale between those of two expected risks.

    Raises:
        DeliberateError: a table without two such prices.
    """
    low, high = table.price_for_risk(max(risks)), table.price_for_risk(min(risks))
    low = low or table.prices[1]
    if math.isinf(high):
        high = table.prices[-2]
    if not 0 < low < high:
        raise DeliberateError(
            f"risks={list(risks)}: the calibration has no two prices between them"
        )
    return [float(price) for price in np.geomspace(low, high, count)]


def run(
    model: AdaptiveModel,
    encoder: Encoder,
    task: Task,
    ways: Mapping[str, Mapping[str, Any]],
    *,
    warmup: int,
    clock: str,
) -> tuple[dict[str, Taken], list[int]]:
    """Answers every problem in every way; also the numbers of the problems that were counted."""
    room = (model.backbone.max_positions or 1 << 30) - task.max_new_tokens
    asked = [(row, encoder.prompt(p.question)) for row, p in enumerate(task.problems)]
    asked = [(row, prompt) for row, prompt in asked if len(prompt) <= room]
    if len(asked) <= warmup:
        raise DeliberateError(
            f"{len(asked)} problems leave room for task.max_new_tokens={task.max_new_tokens} in "
            f"the context, and {warmup} of them warm up: raise problems"
        )
    taken = {name: Taken() for name in ways}
    names, read, ends = (
        list(ways),
        CLOCKS[clock],
        end_tokens(model.base.generation_config, encoder.tokenizer),
    )
    with plain_greedy(model, ends):
        for number, (_, prompt) in enumerate(tqdm(asked, desc="bench gate")):
            turn = number % len(names)
            ids = torch.tensor([prompt], device=model.device)
            gc.collect()
            for name in names[turn:] + names[:turn]:
                loop = AdaptiveDecoding(model, **ways[name]).loop(
                    max_new_tokens=task.max_new_tokens,
                    end_tokens=ends,
                    prompt_tokens=len(prompt),
                )
                synchronize(model.device)
                began = read()
                for _ in loop.run(ids):
                    pass
                synchronize(model.device)
                seconds = read() - began
                if number < warmup:
                    continue
                own = taken[name]
                own.seconds.append(seconds)
                own.tokens.append(loop.trace.tokens)
                own.rounds.append(sum(loop.batch.deliberation_rounds))
                own.layers.append(sum(loop.trace.layer_calls))
    return taken, [row for row, _ in asked[warmup:]]


def grade(
    taken: Mapping[str, Taken], rows: Sequence[int], task: Task, tokenizer: Any, graders: Any
) -> dict[str, list[bool]]:
    """Whether each answer is right."""
    right: dict[str, list[bool]] = {name: [] for name in taken}
    with GraderPool(graders.processes, time_limit=graders.time_limit) as pool:
        for number, row in enumerate(rows):
            texts = [decode_text(tokenizer, own.tokens[number]) for own in taken.values()]
            grades = task.grade(task.problems[row], texts, pool)
            for name, one in zip(taken, grades, strict=True):
                right[name].append(one.correct)
    return right


def compare(
    taken: Mapping[str, Taken], right: Mapping[str, Sequence[bool]], seed: int = 0
) -> list[GateRow]:
    """Every way against `BASELINE`."""
    base, solved = taken[BASELINE], np.asarray(right[BASELINE])
    count = len(solved)
    draws = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    full = taken["dense"].tokens if "dense" in taken else []
    rows = []
    for name, own in taken.items():
        mine = np.asarray(right[name])
        gained, lost = int((mine & ~solved).sum()), int((solved & ~mine).sum())
        both = int((mine & solved).sum())
        spent, against = np.asarray(own.seconds), np.asarray(base.seconds)
        ratios = spent[draws].sum(axis=1) / against[draws].sum(axis=1)
        low, high = np.percentile(ratios, [2.5, 97.5])
        tokens = sum(map(len, own.tokens))
        rows.append(
            GateRow(
                name=name,
                accuracy=float(mine.mean()),
                difference=(gained - lost) / count,
                interval=paired_difference_interval(
                    both, gained, lost, count - both - gained - lost
                ),
                gained=gained,
                lost=lost,
                p=mcnemar_exact(b=lost, c=gained).p,
                time=float(spent.sum() / against.sum()),
                time_interval=Interval(float(low), float(high)),
                ms_per_token=1e3 * float(spent.sum()) / max(1, tokens),
                rounds=sum(own.rounds) / max(1, tokens),
                layers=sum(own.layers) / max(1, tokens),
                identical=sum(map(list.__eq__, own.tokens, full)),
            )
        )
    return rows


def show(rows: Sequence[GateRow], problems: int, console: Console) -> None:
    """Prints the comparison."""
    table = Table(
        title=f"{problems} problems, each against '{BASELINE}'; in brackets 95 %",
        box=SIMPLE_HEAD,
        title_justify="left",
        padding=0,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for column in (
        "accuracy", "difference\npoints", "gained\nlost, p", "time", "ms /\ntoken",
        "rounds\nlayers",
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{100 * row.accuracy:.2f} %",
            f"{100 * row.difference:+.2f}\n{_within(row.interval, 100, '+.2f')}",
            f"{row.gained} / {row.lost}\n{row.p:.2g}",
            f"{row.time:.3f}\n{_within(row.time_interval, 1, '.3f')}",
            f"{row.ms_per_token:.2f}",
            f"{row.rounds:.4f}\n{row.layers:.2f}",
        )
    console.print(table)


def _within(interval: Interval, scale: float, form: str) -> str:
    """An interval, in brackets that are not markup."""
    return escape(f"[{scale * interval.low:{form}},{scale * interval.high:{form}}]")


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench gate`` with overrides of `configs/bench_gate.yaml`.

    Raises:
        DeliberateError: the configuration cannot work, or exact mode differs from dense.
    """
    cfg = bench_config("bench_gate", arguments, verbatim=(*VERBATIM, "calibration"), required=True)
    _check(cfg)
    torch.set_num_threads(cfg.threads)
    task = _task(cfg)
    model = AdaptiveModel.from_pretrained(str(cfg.model), executor=str(cfg.executor))
    if torch.cuda.is_available():
        model = model.to("cuda")
    if cfg.calibration is not None:
        model.set_calibration(Path(str(cfg.calibration)).expanduser())
    task, _ = set_apart(task, model.calibration, lambda some: _task(cfg, some))
    console = Console()
    table = None if model.calibration is None else model.calibration.policy
    prices: list[float] = []
    if isinstance(cfg.prices, ListConfig):
        prices = [float(price) for price in cfg.prices]
    elif table is not None:
        prices = prices_of(table, cfg.prices, list(cfg.risks))
    else:
        console.print("no calibration: no prices and no certificate", style="dim")
    ways = chosen(ways_of(model, prices), cfg.ways)
    tokenizer = checkpoint.load_tokenizer(str(cfg.model))
    before = load_average()
    encoder = asking_encoder(cfg, tokenizer, max_tokens=1 << 30, template=task.template)
    notes: list[str] = []
    if "certified" in ways:
        dtype, limit = model.base.dtype, task.max_new_tokens
        here = run_conditions(encoder, task=task.name, max_new_tokens=limit, dtype=dtype)
        notes = certificate_notes(model, {"risk": Risk.ACCURACY}, here, tokenizer)
    taken, counted = run(model, encoder, task, ways, warmup=cfg.warmup, clock=cfg.clock)
    load = {"before": before, "after": load_average()}
    right = grade(taken, counted, task, tokenizer, cfg.graders)
    rows = compare(taken, right, cfg.seed)
    environment = describe()
    facts = {
        "model": model_name(cfg.model),
        "task": task.name,
        "problems": len(counted),
        "clock": str(cfg.clock),
        "prices": {f"price {price:.3g}": {"price": price, "band": table.band(price)}
                   for price in prices if table is not None},
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "load": load,
        "environment": environment,
        "notes": notes,
        "config": OmegaConf.to_container(cfg, resolve=True),
    }  # fmt: skip
    raw = {"rows": [asdict(row) for row in rows], **facts}
    write_text(Path(cfg.out), json.dumps(raw, indent=1, allow_nan=False) + "\n")
    show(rows, len(counted), console)
    console.print(
        f"{environment['cpu']}, {cfg.threads} thread(s), {cfg.clock} time; load {load['before']} "
        f"before, {load['after']} after; {cfg.out}",
        highlight=False,
        soft_wrap=True,
    )
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    same = next((row.identical for row in rows if row.name == "exact"), len(counted))
    if same != len(counted):
        raise DeliberateError(
            f"exact differs from dense on {len(counted) - same} of {len(counted)} problems: a "
            "near-tie in the logits, or a bug"
        )


def _check(cfg: DictConfig) -> None:
    least = {"problems": 2, "warmup": 0, "threads": 1}
    if not isinstance(cfg.prices, ListConfig):
        least["prices"] = 0
    for name, value in least.items():
        given = cfg[name]
        if isinstance(given, bool) or not isinstance(given, int) or given < value:
            raise DeliberateError(f"{name}={given} must be a whole number of at least {value}")
    if isinstance(cfg.prices, ListConfig):
        for price in cfg.prices:
            if isinstance(price, bool) or not isinstance(price, int | float) or not price >= 0:
                raise DeliberateError(f"prices: {price} must be a price of 0 or more")
    if cfg.ways is not None:
        asked = list(cfg.ways) if isinstance(cfg.ways, ListConfig) else [cfg.ways]
        for way in asked:
            if way not in WAYS:
                raise DeliberateError(f"ways: {way} is not one of {', '.join(WAYS)}")
        if not asked or ("exact" in asked and "dense" not in asked):
            raise DeliberateError(f"ways={asked}: at least one, and dense beside exact")
    if cfg.clock not in CLOCKS:
        raise DeliberateError(f"clock={cfg.clock} is unknown; it is one of {', '.join(CLOCKS)}")
    risks = list(cfg.risks) if isinstance(cfg.risks, ListConfig) else []
    if len(risks) != 2 or not all(isinstance(r, float) and 0 < r < 1 for r in risks):
        raise DeliberateError(f"risks={cfg.risks} must be two shares in (0, 1): risks=[0.01,1e-4]")


def _task(cfg: DictConfig, excluded: Callable[[str], bool] | None = None) -> Task:
    """Problems that nothing else draws, those that warm up first."""
    count = cfg.problems + cfg.warmup
    return command_task(cfg, use=seeds.GATE_BENCHMARK, size=count, excluded=excluded)
