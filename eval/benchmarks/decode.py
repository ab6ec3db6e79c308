"""`deliberate bench decode`: whole generations timed side by side in one run.

Every prompt goes through every variant before the next prompt, in rotating order, so that a change
of the machine's speed hits all of them. Quoted are ratios of medians of the time per token. Three
suites: one prompt at a time, ragged batches, and prompts of uniformly random tokens, on which early
exits fail and must not cost anything either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.eval.benchmarks.decode_variants import Prompts, Variant, suite_prompts, variants
from deliberate.eval.benchmarks.harness import (
    Session,
    interleaved,
    load_model,
    stop_if_inexact,
    thresholds_of,
    timed,
)
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.benchmarks.widen import widen
from deliberate.eval.statistics import bootstrap_ratio_of_medians, percentiles
from deliberate.executors.quantization import Storage, as_storage
from deliberate.utils.checks import all_at_least, one_of
from deliberate.utils.errors import DeliberateError

SUITES = ("single", "batch", "adversarial")

# Ratios that are quoted of each suite: variant, against what.
PAIRS: Mapping[str, Sequence[tuple[str, str]]] = {
    "single": (
        ("dense", "transformers generate"),
        ("dense", "transformers forward loop"),
        ("exact", "dense"),
        ("exact", "best assistant_early_exit"),
        ("exact", "transformers generate"),
        ("threshold", "dense"),
        ("dense, int8", "transformers generate"),
        ("exact, int8", "dense, int8"),
    ),
    "batch": (
        ("dense", "transformers generate"),
        ("exact", "dense"),
        ("exact", "transformers generate"),
        ("threshold", "dense"),
    ),
    "adversarial": (("exact", "dense"), ("exact", "transformers forward loop")),
    # of `bench agreement`
    "agreement": tuple(
        (mode, slower)
        for mode in ("dense", "exact", "threshold", "threshold, all exits")
        for slower in ("dense", "transformers generate")
        if mode != slower
    ),
}


@dataclass
class Timing:
    """What one variant did over all prompts.

    Attributes:
        seconds_per_token: wall clock per generated token of a batch, prompt pass included.
        tokens: generated ids, one list per sequence.
        layers: layers run per token counted by the loop, one per sequence; empty for transformers.
        drafted, rejected: exact mode: drafts, and those that the full depth rejected.
    """

    seconds_per_token: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    layers: list[float] = field(default_factory=list)
    drafted: int = 0
    rejected: int = 0


def measure(
    runs: Mapping[str, Variant], batches: Sequence[Prompts], warmup: int, title: str
) -> dict[str, Timing]:
    """Times every variant on every batch; the first `warmup` batches are not counted."""
    timings = {name: Timing() for name in runs}
    for turn, prompts, name in interleaved(batches, list(runs), warmup=warmup, title=title):
        answers, seconds = timed(partial(runs[name], prompts))
        if not turn.counted:
            continue
        timing = timings[name]
        timing.seconds_per_token.append(seconds / max(1, sum(map(len, answers.tokens))))
        timing.tokens += answers.tokens
        for trace in answers.traces:
            timing.layers.append(trace.layers_per_token)
            timing.drafted += trace.drafted
            timing.rejected += trace.rejected
    return timings


@torch.inference_mode()
def full_depth_agreement(
    model: AdaptiveModel, batches: Sequence[Prompts], answers: Sequence[Sequence[int]]
) -> float:
    """Share of the tokens that the full depth would have chosen after the same text."""
    rows = [ids[keep.bool()] for p in batches for ids, keep in zip(p.ids, p.mask, strict=True)]
    agreed = total = 0
    for prompt, made in zip(rows, answers, strict=True):
        ids = torch.cat((prompt, torch.tensor(made))).unsqueeze(0).to(model.device)
        logits = model.base(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        agreed += int((logits.argmax(dim=-1).cpu() == torch.tensor(made)).sum())
        total += len(made)
    return agreed / total


def report(timings: Mapping[str, Timing], suite: str, seed: int) -> dict[str, Any]:
    """Figures of a suite, JSON-ready: per variant, and the ratios that are quoted."""
    dense = timings["dense"]
    rows: dict[str, Any] = {}
    for name, timing in timings.items():
        spread = percentiles([1000 * s for s in timing.seconds_per_token])
        rows[name] = {
            "ms_per_token": {"median": spread.median, "p90": spread.p90, "p99": spread.p99},
            "layers_per_token": sum(timing.layers) / len(timing.layers) if timing.layers else None,
            "identical_to_dense": sum(
                a == b for a, b in zip(timing.tokens, dense.tokens, strict=True)
            ),
            "sequences": len(timing.tokens),
            "tokens": sum(map(len, timing.tokens)),
            # in modes that verify nothing an early token is no draft
            "drafted": timing.drafted if name.startswith("exact") else 0,
            "rejected": timing.rejected,
        }
    assisted = [name for name in timings if name.startswith("assistant_early_exit")]
    ratios = []
    for fast, slow in PAIRS[suite]:
        if fast not in timings:
            continue
        if slow.startswith("best "):  # the strongest setting of the rival, not the first
            slow = min(assisted, key=lambda name: rows[name]["ms_per_token"]["median"])
        estimate = bootstrap_ratio_of_medians(
            timings[slow].seconds_per_token, timings[fast].seconds_per_token, seed=seed
        )
        interval = estimate.interval
        ratios.append(
            {
                "variant": fast,
                "against": slow,
                "speedup": estimate.value,
                "interval": None if interval is None else [interval.low, interval.high],
            }
        )
    return {"variants": rows, "ratios": ratios}


def show(suite: str, figures: Mapping[str, Any], console: Console) -> None:
    """Prints a suite as two tables."""
    table = Table(title=f"{suite}: time per generated token, prompt pass included (ms)")
    for column in ("variant", "median", "P90", "P99", "layers/token", "same as dense"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, row in figures["variants"].items():
        times, layers = row["ms_per_token"], row["layers_per_token"]
        table.add_row(
            name,
            *(f"{times[key]:.2f}" for key in ("median", "p90", "p99")),
            "-" if layers is None else f"{layers:.2f}",
            f"{row['identical_to_dense']} of {row['sequences']}",
        )
    console.print(table)
    table = Table(title=f"{suite}: ratios of medians (times faster), 95 % bootstrap interval")
    for column in ("variant", "against", "speedup", "interval"):
        table.add_column(column, justify="right" if column in ("speedup", "interval") else "left")
    for ratio in figures["ratios"]:
        table.add_row(
            ratio["variant"],
            ratio["against"],
            f"{ratio['speedup']:.2f}x",
            "-" if ratio["interval"] is None else "{:.2f}-{:.2f}".format(*ratio["interval"]),
        )
    console.print(table)
    if "threshold_agreement" in figures:
        console.print(
            f"threshold: {figures['threshold_agreement']:.2%} of its tokens are the full depth's "
            "choice after the same text"
        )


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench decode`` with overrides of `configs/bench.yaml`.

    Raises:
        DeliberateError: the configuration cannot work, or an exact variant's tokens differ from
            dense.
    """
    cfg = bench_config("bench", arguments, verbatim=("model", "out", "text"))
    suites = _suites(cfg)
    session = Session("decode", arguments, cfg.threads)
    model, small = _models(cfg)
    tokenizer = checkpoint.load_tokenizer(cfg.model)
    thresholds = thresholds_of(cfg)
    console = Console()
    figures: dict[str, Any] = {}
    for suite in suites:
        batches = suite_prompts(cfg, suite, tokenizer, model.backbone.vocab_size)
        batches = [Prompts(p.ids.to(model.device), p.mask.to(model.device)) for p in batches]
        runs = variants(model, cfg.max_new_tokens, thresholds, suite, small)
        timings = measure(runs, batches, cfg.warmup, f"bench {suite}")
        figures[suite] = report(timings, suite, cfg.seed)
        if suite == "single":
            figures[suite]["threshold_agreement"] = full_depth_agreement(
                model, batches[cfg.warmup :], timings["threshold"].tokens
            )
        show(suite, figures[suite], console)
    session.end()
    parameters = model.trainable_parameters()[1]
    size = f"{parameters:,} parameters"
    if cfg.widen != 1:
        size += f", {cfg.model} with every unit {cfg.widen} times: the same function"
    console.print(f"executor: {model.executor}; {size}", highlight=False)
    console.print(session.line(), highlight=False)
    exits = model.exit_config.to_dict()
    session.write(
        cfg.out,
        {
            "suites": figures,
            "model": str(cfg.model),
            "widen": cfg.widen,
            "weights": str(cfg.weights),
            "parameters": parameters,
            "executor": model.executor,
            "thresholds": exits["thresholds"] if thresholds is None else thresholds,
            "batch_size": cfg.batch_size,
        },
    )
    for suite, made in figures.items():
        exact = made["variants"]["exact"]
        what = f"sequences of the suite {suite}"
        stop_if_inexact(exact["identical_to_dense"], exact["sequences"], what)


def _models(cfg: DictConfig) -> tuple[AdaptiveModel, AdaptiveModel | None]:
    """The model under test, and where its executor can, the same with int8 weights."""
    model = load_model(cfg)
    small = None
    plain = as_storage(str(cfg.weights)) is Storage.NATIVE
    if cfg.widen != 1 and not plain:
        raise DeliberateError(f"widen={cfg.widen} takes weights=float, not {cfg.weights}")
    if model.executor.startswith("fused") and cfg.int8 and plain:
        small = AdaptiveModel.from_pretrained(cfg.model, executor="fused", weights="int8")
        small = small.to(model.device)
    if cfg.widen != 1:
        if small is not None:
            small = widen(small, cfg.widen, executor="fused", weights="int8").to(model.device)
        model = widen(model, cfg.widen, executor=cfg.executor).to(model.device)
    return model, small


def _suites(cfg: DictConfig) -> list[str]:
    suites = list(cfg.suites)
    for suite in suites:
        one_of("suites", suite, SUITES)
    if not suites:
        raise DeliberateError(f"suites is empty: name at least one of {', '.join(SUITES)}")
    all_at_least(cfg, {"batch_size": 2, "adversarial_tokens": 1, "max_new_tokens": 2})
    return suites
