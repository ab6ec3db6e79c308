"""`deliberate bench decode`: whole generations timed side by side in one run.

Every prompt goes through every variant before the next prompt, in rotating order, so that a change
of the machine's speed hits all of them. Quoted are ratios of medians of the time per token.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from deliberate import storage
from deliberate.configuration import compose
from deliberate.environment import describe, load_average
from deliberate.errors import DeliberateError
from deliberate.eval.statistics import bootstrap_ratio_of_medians, percentiles
from deliberate.model import AdaptiveModel
from deliberate.train.batches import Encoder
from deliberate.train.words import word_problems

# One variant: prompt ids [1, n] -> generated ids, and the trace where it has one.
Variant = Callable[[Tensor], tuple[list[int], Any]]


@dataclass
class Timing:
    """What one variant did over all prompts.

    Attributes:
        seconds_per_token: wall clock per generated token, prompt pass included, one per prompt.
        tokens: generated ids, one list per prompt.
        layers: layers run per token counted by the loop, one per prompt; empty for transformers.
        acceptance: drafts accepted and drafted, exact mode only.
    """

    seconds_per_token: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    layers: list[float] = field(default_factory=list)
    drafted: int = 0
    rejected: int = 0


def variants(model: AdaptiveModel, limit: int, thresholds: Any) -> dict[str, Variant]:
    """Every way to decode the same greedy answer (`threshold` may differ), by name."""
    base: Any = model.base
    pad = base.generation_config.pad_token_id or 0
    greedy = {"max_new_tokens": limit, "do_sample": False, "pad_token_id": pad}

    def ours(fidelity: str) -> Variant:
        def run(ids: Tensor) -> tuple[list[int], Any]:
            out = model.generate(
                ids,
                max_new_tokens=limit,
                fidelity=fidelity,
                thresholds=thresholds,
                return_dict_in_generate=True,
            )
            return out.trace.tokens, out.trace

        return run

    def stock(**settings: Any) -> Variant:
        def run(ids: Tensor) -> tuple[list[int], Any]:
            mask = torch.ones_like(ids)
            out = base.generate(input_ids=ids, attention_mask=mask, **greedy, **settings)
            return out[0, ids.shape[1] :].tolist(), None

        return run

    made: dict[str, Variant] = {
        "transformers generate": stock(),
        "transformers forward loop": lambda ids: (_forward_loop(base, ids, limit), None),
        "dense": ours("dense"),
        "exact": ours("exact"),
        "threshold": ours("threshold"),
    }
    for layer in model.exit_config.layers:
        made[f"assistant_early_exit={layer}"] = stock(assistant_early_exit=layer)
    return made


@torch.inference_mode()
def _forward_loop(base: Any, ids: Tensor, limit: int) -> list[int]:
    """The leanest greedy loop over the stock model's own forward and DynamicCache."""
    end = base.generation_config.eos_token_id
    ends = set(end) if isinstance(end, list) else {end}
    cache = DynamicCache(config=base.config)
    made: list[int] = []
    while len(made) < limit:
        out = base(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        made.append(int(out.logits[0, -1].argmax()))
        if made[-1] in ends:
            break
        ids = torch.tensor([[made[-1]]], device=base.device)
    return made


def prompts_of(cfg: DictConfig, tokenizer: Any) -> list[Tensor]:
    """Prompt ids ``[1, n]``: fresh word problems, or the lines of a text file."""
    if cfg.prompts < 2:
        raise DeliberateError(f"prompts={cfg.prompts} must be at least 2: a median needs several")
    encoder = Encoder(tokenizer, max_tokens=10**6)
    count = cfg.prompts + cfg.warmup
    if cfg.text is None:
        low, high = cfg.steps
        made = word_problems("test", size=count, seed=cfg.seed + 1_000_003, steps=(low, high))
        return [torch.tensor([encoder.prompt(problem.question)]) for problem in made]
    path = Path(cfg.text)
    if not path.is_file():
        raise DeliberateError(f"text={cfg.text} is not a file: one prompt a line is needed")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < count:
        raise DeliberateError(
            f"text={cfg.text} has {len(lines)} prompts; prompts + warmup = {count} are needed"
        )
    return [torch.tensor([tokenizer.encode(line)]) for line in lines[:count]]


def measure(
    runs: Mapping[str, Variant], prompts: Sequence[Tensor], warmup: int
) -> dict[str, Timing]:
    """Times every variant on every prompt; the first `warmup` prompts are not counted."""
    timings = {name: Timing() for name in runs}
    names = list(runs)
    for index, ids in enumerate(tqdm(prompts, desc="bench decode", leave=False)):
        turn = index % len(names)
        gc.collect()
        for name in names[turn:] + names[:turn]:
            _synchronise()
            began = time.perf_counter()
            tokens, trace = runs[name](ids)
            _synchronise()
            seconds = time.perf_counter() - began
            if index < warmup:
                continue
            timing = timings[name]
            timing.seconds_per_token.append(seconds / max(1, len(tokens)))
            timing.tokens.append(tokens)
            if trace is not None:
                timing.layers.append(trace.layers_per_token)
                timing.drafted += trace.drafted
                timing.rejected += trace.rejected
    return timings


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(timings: Mapping[str, Timing], seed: int) -> dict[str, Any]:
    """Figures of a run, JSON-ready: per variant, and the ratios that are quoted."""
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
            "prompts": len(timing.tokens),
            "tokens": sum(map(len, timing.tokens)),
            "drafted": timing.drafted,
            "rejected": timing.rejected,
        }
    assisted = [name for name in timings if name.startswith("assistant_early_exit")]
    # The strongest setting of the rival, not the first.
    best = min(assisted, key=lambda name: rows[name]["ms_per_token"]["median"])
    pairs = [
        ("dense", "transformers generate"),
        ("dense", "transformers forward loop"),
        ("exact", "dense"),
        ("exact", best),
        ("exact", "transformers generate"),
        ("threshold", "dense"),
    ]
    ratios = []
    for fast, slow in pairs:
        estimate = bootstrap_ratio_of_medians(
            timings[slow].seconds_per_token, timings[fast].seconds_per_token, seed=seed
        )
        ratios.append(
            {
                "variant": fast,
                "against": slow,
                "speedup": estimate.value,
                "interval": None
                if estimate.interval is None
                else [estimate.interval.low, estimate.interval.high],
            }
        )
    return {"variants": rows, "ratios": ratios}


def show(figures: Mapping[str, Any], console: Console) -> None:
    """Prints the run as two tables."""
    table = Table(title="time per generated token, prompt pass included (ms)")
    for column in ("variant", "median", "P90", "P99", "layers/token", "same tokens as dense"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, row in figures["variants"].items():
        times, layers = row["ms_per_token"], row["layers_per_token"]
        table.add_row(
            name,
            *(f"{times[key]:.2f}" for key in ("median", "p90", "p99")),
            "-" if layers is None else f"{layers:.2f}",
            f"{row['identical_to_dense']} of {row['prompts']}",
        )
    console.print(table)
    table = Table(title="ratios of medians (how many times faster), 95 % bootstrap interval")
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


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench decode`` with overrides of `configs/bench.yaml`.

    Raises:
        DeliberateError: an exact variant's tokens differ from dense (a broken promise), or the
            configuration cannot work.
    """
    if not arguments or arguments[0] != "decode":
        given = arguments[0] if arguments else "nothing"
        raise DeliberateError(f"bench does not know {given!r}: use `bench decode [key=value ...]`")
    cfg = compose("bench", arguments[1:], verbatim=("model", "out", "text"))
    torch.set_num_threads(cfg.threads)
    model = AdaptiveModel.from_pretrained(cfg.model)
    tokenizer = storage.load_tokenizer(cfg.model)
    thresholds = cfg.thresholds
    if thresholds is not None and not isinstance(thresholds, int | float):
        thresholds = tuple(thresholds)
    runs = variants(model, cfg.max_new_tokens, thresholds)
    before = load_average()
    timings = measure(runs, prompts_of(cfg, tokenizer), cfg.warmup)
    figures = report(timings, cfg.seed) | {
        "model": str(cfg.model),
        "thresholds": list(model.exit_config.thresholds) if thresholds is None else thresholds,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "environment": describe(),
        "load": {"before": before, "after": load_average()},
    }
    console = Console()
    show(figures, console)
    console.print(
        f"{figures['environment']['cpu']}, {cfg.threads} thread(s), torch {torch.__version__}; "
        f"load {before} before, {figures['load']['after']} after",
        highlight=False,
    )
    if cfg.out is not None:
        storage.write_text(Path(cfg.out), json.dumps(figures, indent=1) + "\n")
    exact = figures["variants"]["exact"]
    if exact["identical_to_dense"] != exact["prompts"]:
        raise DeliberateError(
            f"exact differs from dense on {exact['prompts'] - exact['identical_to_dense']} of "
            f"{exact['prompts']} prompts: a near-tie in the logits, or a bug"
        )
