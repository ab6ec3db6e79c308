"""`deliberate bench cost`: measures the cost model of this machine and tests its predictions.

Whole generations are timed between the rounds of the measurement, so that prediction and
measurement saw the same machine. A generation's time is predicted from the passes it ran; its
error is what the model does not know, not what the text did. With `clock=cpu` both are seconds of
this process's own time, which leaves out what other processes took: for a machine that is not idle.

Each generation stands between two short dense ones, probes of the machine's speed at that moment.
The error `at probed speed` is what remains when their ratio to prediction is divided out.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from deliberate.api import checkpoint
from deliberate.api.generation import AdaptiveDecoding
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.break_even import break_even_rate
from deliberate.cost.cache import keep
from deliberate.cost.grid import Grid
from deliberate.cost.measure import measure
from deliberate.cost.meter import Work, predict_seconds
from deliberate.cost.model import CostModel, duration
from deliberate.eval.benchmarks.decode_variants import prompts_of
from deliberate.eval.benchmarks.harness import (
    Session,
    check_clock,
    load_model,
    thresholds_of,
    timed,
)
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.statistics import percentiles
from deliberate.utils.end_tokens import end_tokens

PROBE_TOKENS = 8
FIDELITIES = ("dense", "exact", "threshold")


@dataclass(frozen=True)
class Generation:
    """One generation that was timed.

    Attributes:
        fidelity: how it decoded.
        seconds: of the whole, prompt pass included.
        tokens: it made.
        work: what it ran.
        probes: of the dense ones before and after, where there were any.
    """

    fidelity: str
    seconds: float
    tokens: int
    work: Work
    probes: tuple[Generation, ...] = ()


def timed_generation(
    model: AdaptiveModel,
    ids: Tensor,
    fidelity: str,
    thresholds: Any,
    limit: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Generation:
    """Decodes from ``[1, n]`` and keeps the counts that `CostModel.predict` needs."""
    ends = end_tokens(model.base.generation_config)
    loop = AdaptiveDecoding(model, fidelity, thresholds).loop(max_new_tokens=limit, end_tokens=ends)
    ids = ids.to(model.device)
    _, seconds = timed(lambda: deque(loop.run(ids), maxlen=0), clock, model.device)
    work = Work(
        layers=loop.boundaries[:-1],
        passes=loop.batch.passes,
        prompts=(1, ids.shape[1]),
        verifies=fidelity == "exact",
        reads=loop.batch.reads,
        deliberation_rounds=None if loop.gate is None else loop.batch.deliberation_rounds,
        runs=loop.batch.runs,
    )
    return Generation(fidelity, seconds, len(loop.trace.tokens), work)


def prediction_errors(
    cost: CostModel, generations: Sequence[Generation]
) -> dict[str, dict[str, Any]]:
    """Predicted against measured seconds, by fidelity, JSON-ready."""
    rows: dict[str, dict[str, Any]] = {}
    for fidelity in dict.fromkeys(generation.fidelity for generation in generations):
        own = [g for g in generations if g.fidelity == fidelity]
        predicted = [predict_seconds(cost, g.work) for g in own]
        errors = [abs(p / g.seconds - 1) for p, g in zip(predicted, own, strict=True)]
        bias = statistics.median(p / g.seconds - 1 for p, g in zip(predicted, own, strict=True))
        probed = [
            abs(p * probed_speed(cost, g) / g.seconds - 1)
            for p, g in zip(predicted, own, strict=True)
        ]
        spread = percentiles(errors)
        rows[fidelity] = {
            "generations": len(own),
            "tokens": sum(g.tokens for g in own),
            "measured_ms": 1e3 * statistics.median(g.seconds for g in own),
            "predicted_ms": 1e3 * statistics.median(predicted),
            "median_error": spread.median,
            "p90_error": spread.p90,
            "median_bias": bias,
            "median_error_at_probed_speed": percentiles(probed).median,
        }
    return rows


def probed_speed(cost: CostModel, generation: Generation) -> float:
    """Measured over predicted time of the probes around a generation; 1 without any."""
    predicted = sum(predict_seconds(cost, probe.work) for probe in generation.probes)
    return sum(probe.seconds for probe in generation.probes) / predicted if predicted else 1.0


def segment_table(cost: CostModel, grid: Grid, context: int) -> Table:
    """Milliseconds of each segment's pass by the tokens it carries."""
    table = Table(title=f"one pass at a context of {context} tokens, 1 sequence (ms)")
    table.add_column("layers")
    table.add_column("1, warm", justify="right")
    for tokens in grid.tokens:
        table.add_column(f"{tokens} tok.", justify="right")
    table.add_column("per deferred", justify="right")
    edges = [0, *cost.layers, cost.num_layers]
    for k, (low, high) in enumerate(itertools.pairwise(edges)):
        warm = 1e3 * cost.segment_seconds(k, context=context, staleness=0.0)
        times = [1e3 * cost.segment_seconds(k, tokens=m, context=context) for m in grid.tokens]
        deferred = 1e3 * cost.deferred_seconds(k, context)
        table.add_row(
            f"{low + 1}-{high}", f"{warm:.3f}", *(f"{ms:.3f}" for ms in times), f"{deferred:.3f}"
        )
    return table


def exit_table(cost: CostModel, context: int) -> Table:
    """What evaluating each exit costs and from which exit rate on it pays."""
    table = Table(
        title="exits: what evaluation costs, and the share that must exit there for it to pay"
    )
    for name in ("after layer", "read", "against full depth", "against the next exit"):
        table.add_column(name, justify="right")
    for k, layer in enumerate(cost.layers):
        first = k == 0
        top = break_even_rate(cost, k, context=context, multi_step=first)
        following = break_even_rate(cost, k, beyond=k + 1, context=context, multi_step=first)
        read = duration(cost.read_seconds(k))
        table.add_row(str(layer), read, f"{100 * top:.1f} %", f"{100 * following:.1f} %")
    return table


def show(
    cost: CostModel, grid: Grid, rows: Mapping[str, Mapping[str, Any]], console: Console
) -> None:
    """Prints the cost model and its predictions."""
    context = sorted(grid.contexts)[len(grid.contexts) // 2]
    console.print(segment_table(cost, grid, context))
    console.print(exit_table(cost, context))
    console.print(
        f"head {duration(cost.head_seconds)}, step {duration(cost.step)}; dense "
        f"{duration(cost.dense_seconds_per_token(context))} a token; fit error "
        f"{100 * cost.fit_error:.1f} % (P90 {100 * cost.fit_error_p90:.1f} %) over "
        f"{cost.facts['points']} sizes, {cost.facts['rounds']} rounds",
        highlight=False,
    )
    if cost.multi_step is not None:
        steps = [
            duration(cost.multi_step.step_seconds(k, context)) for k in range(cost.num_exits + 1)
        ]
        calls = [duration(value) for value in cost.multi_step.calls]
        console.print(
            f"several steps in one call: a step {', '.join(steps)} to each exit and full depth, a "
            f"call {', '.join(calls)} more",
            highlight=False,
        )
    if cost.deliberation is not None:
        console.print(
            f"deliberation gate: {duration(cost.remember_seconds)} a full-depth pass, "
            f"{duration(cost.round_seconds)} a round",
            highlight=False,
        )
    table = Table(title="whole generations: predicted against measured")
    names = (
        "fidelity",
        "number",
        "measured",
        "predicted",
        "error",
        "P90",
        "bias",
        "at probed speed",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "fidelity" else "right")
    for fidelity, row in rows.items():
        table.add_row(
            fidelity,
            str(row["generations"]),
            duration(row["measured_ms"] / 1e3),
            duration(row["predicted_ms"] / 1e3),
            f"{100 * row['median_error']:.1f} %",
            f"{100 * row['p90_error']:.1f} %",
            f"{100 * row['median_bias']:+.1f} %",
            f"{100 * row['median_error_at_probed_speed']:.1f} %",
        )
    console.print(table)


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench cost`` with overrides of `configs/bench_cost.yaml`.

    Raises:
        DeliberateError: the configuration cannot work.
    """
    cfg = bench_config("bench_cost", arguments, verbatim=("model", "out", "text"))
    clock = check_clock(cfg)
    session = Session("cost", arguments, cfg.threads)
    model = load_model(cfg)
    thresholds = thresholds_of(cfg)
    grid = Grid(
        tuple(cfg.tokens),
        tuple(cfg.contexts),
        tuple(cfg.batches),
        tuple(cfg.prompt_lengths),
        steps=cfg.script,
        rounds=cfg.rounds,
    ).within(model.backbone.max_positions)
    prompts = prompts_of(cfg, checkpoint.load_tokenizer(cfg.model))

    def decode(ids: Tensor, fidelity: str, limit: int) -> Generation:
        return timed_generation(model, ids, fidelity, thresholds, limit, clock)

    for ids in prompts[: cfg.warmup]:
        for fidelity in FIDELITIES:
            decode(ids, fidelity, cfg.max_new_tokens)
    waiting = list(prompts[cfg.warmup :])
    generations: list[Generation] = []

    def generate(share: int) -> None:
        for _ in range(share):
            ids = waiting.pop(0)
            gc.collect()
            before = decode(ids, "dense", PROBE_TOKENS)
            for fidelity in FIDELITIES:
                made = decode(ids, fidelity, cfg.max_new_tokens)
                after = decode(ids, "dense", PROBE_TOKENS)
                generations.append(replace(made, probes=(before, after)))
                before = after

    def between(done: int) -> None:
        left = max(1, grid.rounds - done)
        generate(-(-len(waiting) // left))

    cost = measure(
        model.backbone,
        model.reader(),
        model.exit_config,
        gate=model.gate,
        grid=grid,
        clock=clock,
        between=between,
    )
    generate(len(waiting))  # the measurement ended early for want of time
    rows = prediction_errors(cost, generations)
    if cfg.keep and cfg.clock == "wall":
        keep(cost)
    session.end()
    console = Console()
    show(cost, grid, rows, console)
    console.print(f"{cost.facts['device']}; {session.line(str(cfg.clock))}", highlight=False)
    session.write(cfg.out, {"model": str(cfg.model), "cost": cost.to_dict(), "generations": rows})
