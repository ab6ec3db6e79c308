"""`deliberate bench gate`: the gate and early exit together, against the dense model without gate.

Every problem is answered at batch 1 by every variant before the next problem, in rotating order:
the baseline (full depth, no gate), full depth, exact, threshold, certified where the calibration
has a certificate of accuracy, and threshold mode at several lambdas of the calibration, each of
which sets the exits' thresholds and the gate's. Accuracy is compared problem by problem, time as
totals over all problems.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deliberate.api import checkpoint
from deliberate.api.generation import AdaptiveDecoding
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.certificate import Risk
from deliberate.calibration.stopping_policy import PolicyTable
from deliberate.data import seeds
from deliberate.engine.spec import DecodingSpec
from deliberate.eval.benchmarks.harness import (
    CLOCKS,
    UNBOUNDED,
    BenchRequest,
    Clock,
    Session,
    check_clock,
    encode_requests,
    grade_texts,
    interleaved,
    load_model,
    stop_if_inexact,
    timed,
)
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.report.detokenize import decode_text
from deliberate.eval.runner.guarantee_check import certificate_notes, policy_alone
from deliberate.eval.runner.model_names import model_name
from deliberate.eval.runner.runner import plain_greedy
from deliberate.eval.statistics import Interval, paired_accuracy
from deliberate.eval.tasks.calibration_overlap import set_apart
from deliberate.eval.tasks.prompts import prompt_encoder, run_conditions
from deliberate.eval.tasks.registry import VERBATIM, command_task
from deliberate.eval.tasks.task import Task
from deliberate.policies.guarantee_settings import decoding_conditions
from deliberate.utils.checks import all_at_least, at_least, one_of
from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.errors import DeliberateError

BASELINE = "dense, no gate"
VARIANTS = ("dense", "exact", "threshold", "certified", "lambdas")
RESAMPLES = 1000


@dataclass
class Taken:
    """What one variant took over the problems so far: a number of each for every problem."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class GateRow:
    """One variant against the baseline, on the same problems.

    Attributes:
        accuracy: share of right answers.
        difference, interval: accuracy less the baseline's, with Newcombe's paired interval.
        gained, lost, p: problems that only this variant solved, and only the baseline; McNemar's
            exact p.
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


def variants_of(model: AdaptiveModel, lambdas: Sequence[float]) -> dict[str, Mapping[str, Any]]:
    """What `AdaptiveDecoding` is given, by the variant's name.

    Raises:
        DeliberateError: a model without a gate, or lambdas for one without a calibration.
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
    if model.calibration is None and not lambdas:
        return found
    certificates = model.require_calibration().certificates
    if any(certificate.risk is Risk.ACCURACY for certificate in certificates):
        found["certified"] = {"fidelity": "certified", "risk": "accuracy"}
    for lambda_ in lambdas:
        found[_lambda_name(lambda_)] = {"fidelity": "threshold", "lambda_": lambda_}
    return found


def _lambda_name(lambda_: float) -> str:
    return f"lambda {lambda_:.3g}"


def chosen(
    variants: Mapping[str, Mapping[str, Any]], wanted: Sequence[str] | None
) -> dict[str, Mapping[str, Any]]:
    """The baseline and the wanted ones of `VARIANTS`; all of them where `wanted` is None."""
    kept = set(VARIANTS if wanted is None else wanted)
    return {
        name: settings
        for name, settings in variants.items()
        if name == BASELINE or name in kept or ("lambda_" in settings and "lambdas" in kept)
    }


def lambdas_between(table: PolicyTable, count: int, risks: Sequence[float]) -> list[float]:
    """`count` lambdas on a log scale between those of two expected risks.

    Raises:
        DeliberateError: the table has no two such lambdas.
    """
    low, high = table.lambda_for_risk(max(risks)), table.lambda_for_risk(min(risks))
    low = low or table.lambdas[1]
    if math.isinf(high):
        high = table.lambdas[-2]
    if not 0 < low < high:
        raise DeliberateError(
            f"risks={list(risks)}: the calibration has no two lambdas between them; "
            "give lambdas=[...]"
        )
    return [float(lambda_) for lambda_ in np.geomspace(low, high, count)]


def run(
    model: AdaptiveModel,
    requests: Sequence[BenchRequest],
    variants: Mapping[str, Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    warmup: int,
    clock: Clock,
) -> dict[str, Taken]:
    """Answers every request by every variant; the first `warmup` are not counted."""
    taken = {name: Taken() for name in variants}
    ends = list(end_tokens(model.base.generation_config, tokenizer))
    turns = interleaved(requests, list(variants), warmup=warmup, title="bench gate")
    with plain_greedy(model, ends):
        for turn, request, name in turns:
            ids = torch.tensor([list(request.prompt)], device=model.device)
            loop = AdaptiveDecoding(model, **variants[name]).loop(
                max_new_tokens=max_new_tokens, end_tokens=ends, prompt_tokens=ids.shape[1]
            )
            _, seconds = timed(partial(deque, loop.run(ids), maxlen=0), clock, model.device)
            if not turn.counted:
                continue
            own = taken[name]
            own.seconds.append(seconds)
            own.tokens.append(loop.trace.tokens)
            own.rounds.append(sum(loop.batch.deliberation_rounds))
            own.layers.append(sum(loop.trace.layer_calls))
    return taken


def compare(
    taken: Mapping[str, Taken], right: Mapping[str, Sequence[bool]], seed: int = 0
) -> list[GateRow]:
    """Every variant against `BASELINE`."""
    base, count = taken[BASELINE], len(right[BASELINE])
    draws = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    full = taken["dense"].tokens if "dense" in taken else []
    rows = []
    for name, own in taken.items():
        mine = np.asarray(right[name])
        versus = paired_accuracy(right[name], right[BASELINE])
        gained, lost = versus.mcnemar.c, versus.mcnemar.b
        spent, against = np.asarray(own.seconds), np.asarray(base.seconds)
        ratios = spent[draws].sum(axis=1) / against[draws].sum(axis=1)
        low, high = np.percentile(ratios, [2.5, 97.5])
        tokens = sum(map(len, own.tokens))
        rows.append(
            GateRow(
                name=name,
                accuracy=float(mine.mean()),
                difference=versus.difference,
                interval=versus.interval,
                gained=gained,
                lost=lost,
                p=versus.mcnemar.p,
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
    session = Session("gate", arguments, cfg.threads)
    task = _task(cfg)
    model = load_model(cfg)
    task, _ = set_apart(task, model.calibration, lambda seen: _task(cfg, seen))
    console = Console()
    table = None if model.calibration is None else model.calibration.policy
    lambdas: list[float] = []
    if isinstance(cfg.lambdas, ListConfig):
        lambdas = [float(lambda_) for lambda_ in cfg.lambdas]
    elif table is not None:
        lambdas = lambdas_between(table, cfg.lambdas, list(cfg.risks))
    else:
        console.print("no calibration: no lambdas and no certificate", style="dim")
    variants = chosen(variants_of(model, lambdas), cfg.variants)
    tokenizer = checkpoint.load_tokenizer(str(cfg.model))
    limit = task.max_new_tokens
    encoder = prompt_encoder(cfg, tokenizer, max_tokens=UNBOUNDED, template=task.template)
    requests = encode_requests(task, encoder, model.backbone.max_positions, warmup=cfg.warmup)
    notes: list[str] = []
    if "certified" in variants:
        dtype = model.base.dtype
        here = run_conditions(
            encoder, task=task.name, max_new_tokens=limit, dtype=dtype, grading=task.style
        ) | decoding_conditions(model, DecodingSpec(), max_new_tokens=limit)
        notes = certificate_notes(model, {"risk": Risk.ACCURACY}, here, tokenizer)
        if notes:
            variants["certified"] = policy_alone(model, {"risk": Risk.ACCURACY})
    taken = run(
        model,
        requests,
        variants,
        tokenizer,
        max_new_tokens=limit,
        warmup=cfg.warmup,
        clock=CLOCKS[cfg.clock],
    )
    session.end()
    texts = {
        name: [decode_text(tokenizer, tokens) for tokens in own.tokens]
        for name, own in taken.items()
    }
    problems = [request.problem for request in requests[cfg.warmup :]]
    rows = compare(taken, grade_texts(task, problems, texts, cfg.graders), cfg.seed)
    record = {
        "rows": [asdict(row) for row in rows],
        "model": model_name(cfg.model),
        "task": task.name,
        "problems": len(problems),
        "clock": str(cfg.clock),
        # The keys of files that earlier releases wrote.
        "prices": {
            _lambda_name(lambda_): {"price": lambda_, "band": table.gate_threshold(lambda_)}
            for lambda_ in lambdas
            if table is not None
        },
        "notes": notes,
        "config": OmegaConf.to_container(cfg, resolve=True),
    }
    session.write(cfg.out, record)
    show(rows, len(problems), console)
    console.print(f"{session.line(str(cfg.clock))}; {cfg.out}", highlight=False, soft_wrap=True)
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    same = next((row.identical for row in rows if row.name == "exact"), len(problems))
    stop_if_inexact(same, len(problems), "problems")


def _check(cfg: DictConfig) -> None:
    all_at_least(cfg, {"problems": 2, "warmup": 0, "threads": 1})
    if isinstance(cfg.lambdas, ListConfig):
        for lambda_ in cfg.lambdas:
            number = isinstance(lambda_, int | float) and not isinstance(lambda_, bool)
            if not number or not lambda_ >= 0:
                raise DeliberateError(f"lambdas: {lambda_} must be a number of at least 0")
    else:
        at_least("lambdas", cfg.lambdas, 0)
    if cfg.variants is not None:
        wanted = list(cfg.variants) if isinstance(cfg.variants, ListConfig) else [cfg.variants]
        for variant in wanted:
            one_of("variants", variant, VARIANTS)
        if not wanted or ("exact" in wanted and "dense" not in wanted):
            raise DeliberateError(f"variants={wanted}: give at least one, and dense beside exact")
    check_clock(cfg)
    risks = list(cfg.risks) if isinstance(cfg.risks, ListConfig) else []
    if len(risks) != 2 or not all(isinstance(r, float) and 0 < r < 1 for r in risks):
        raise DeliberateError(f"risks={cfg.risks} must be two shares in (0, 1): risks=[0.01,1e-4]")


def _task(cfg: DictConfig, excluded: Callable[[str], bool] | None = None) -> Task:
    """Problems that nothing else draws, those that warm up first."""
    count = cfg.problems + cfg.warmup
    return command_task(cfg, use=seeds.GATE_BENCHMARK, size=count, excluded=excluded)
