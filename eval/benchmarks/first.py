"""`deliberate bench first`: the first answer of a fresh process, exact against dense.

A user's first call pays what later ones do not: heads and tables are built, estimates begin at
their priors. Every answer here is the first of a process of its own, which has loaded the model and
computed nothing. For each text two processes are started, one answers dense and one exact, in an
order that alternates, and the ratio of their times is one observation. Half of the texts are
questions, half are uniformly random tokens, on which no draft is ever right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from deliberate.api import checkpoint
from deliberate.data.sources import load_problems
from deliberate.eval.benchmarks.harness import Session, stop_if_inexact, table_console
from deliberate.eval.benchmarks.rivals import RivalProcess
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.statistics import ratio_of_sums
from deliberate.eval.tasks.prompts import prompt_encoder
from deliberate.utils.checks import all_at_least, one_of
from deliberate.utils.errors import DeliberateError

MODES = ("dense", "exact")
TEXTS = ("questions", "random")
PRECISIONS = ("float32", "bfloat16", "int8", "4 bit")


@dataclass
class Pairs:
    """First answers to the texts of one kind.

    Attributes:
        seconds: of each text, dense and exact, by the wall clock.
        own: the same by the processes' own time.
        same: texts to which both gave the same tokens.
    """

    seconds: list[tuple[float, float]] = field(default_factory=list)
    own: list[tuple[float, float]] = field(default_factory=list)
    same: int = 0

    def figures(self, seed: int) -> dict[str, Any]:
        """JSON-ready: medians, and all dense seconds over all exact ones with their interval."""
        found: dict[str, Any] = {"texts": len(self.seconds), "same": self.same}
        for name, pairs in (("wall", self.seconds), ("own", self.own)):
            dense, exact = np.asarray(pairs).T
            estimate = ratio_of_sums(dense, exact, seed=seed)
            interval = estimate.interval
            found[name] = {
                "dense_ms": 1e3 * float(np.median(dense)),
                "exact_ms": 1e3 * float(np.median(exact)),
                "ratio": estimate.value,
                "interval": None if interval is None else [interval.low, interval.high],
            }
        return found


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench first`` with overrides of `configs/bench_first.yaml`.

    Raises:
        DeliberateError: the configuration cannot work, a process fails, or exact mode's tokens
            differ from dense.
    """
    cfg = bench_config("bench_first", arguments, verbatim=("model", "out"))
    one_of("precision", cfg.precision, PRECISIONS)
    all_at_least(cfg, {"texts": 2, "answer_tokens": 2, "threads": 1, "random_tokens": 2})
    session = Session("first", arguments, 1)
    kinds = {name: Pairs() for name in TEXTS}
    every = [(name, ids) for pair in zip(*texts_of(cfg), strict=True) for name, ids in pair]
    for number, (name, ids) in enumerate(tqdm(every, desc="bench first", leave=False)):
        observe(cfg, ids, kinds[name], reverse=number // len(TEXTS) % 2 == 1)
    session.end()
    figures = {name: pairs.figures(cfg.seed) for name, pairs in kinds.items()}
    console = table_console(100)
    show(figures, console)
    console.print(session.line(), highlight=False)
    if cfg.out is not None:
        settings = {"settings": OmegaConf.to_container(cfg), "texts": figures}
        session.write(Path(str(cfg.out)), settings)
    for name, pairs in kinds.items():
        stop_if_inexact(pairs.same, len(pairs.seconds), f"{name}, first answers")


def texts_of(cfg: DictConfig) -> list[list[tuple[str, list[int]]]]:
    """As many prompts of GSM8K's test questions as of random tokens."""
    tokenizer = checkpoint.load_tokenizer(str(cfg.model))
    encoder = prompt_encoder(cfg, tokenizer, max_tokens=10**6)
    data = None if cfg.data.dir is None else str(cfg.data.dir)
    problems = load_problems("gsm8k", "test", data_dir=data, hub=cfg.data.hub)
    if len(problems) < cfg.texts:
        raise DeliberateError(f"texts={cfg.texts}: there are {len(problems)} questions")
    generator = np.random.default_rng(cfg.seed)
    asked = [list(encoder.prompt(problem.question)) for problem in problems[: cfg.texts]]
    size = len(tokenizer)
    drawn = [generator.integers(0, size, cfg.random_tokens).tolist() for _ in asked]
    return [
        [("questions", prompt) for prompt in asked],
        [("random", prompt) for prompt in drawn],
    ]


def observe(cfg: DictConfig, prompt: Sequence[int], pairs: Pairs, *, reverse: bool) -> None:
    """First answers to one text by two processes, both of which are there before either answers.

    Args:
        reverse: exact answers first.
    """
    made = {mode: RivalProcess(description(cfg, mode)) for mode in MODES}
    try:
        answers = {}
        for mode in reversed(MODES) if reverse else MODES:
            if made[mode].missing is not None:
                raise DeliberateError(f"bench first: {mode}: {made[mode].missing}")
            found = made[mode].ask(system=mode, prompt=list(prompt), new=int(cfg.answer_tokens))
            if "failed" in found:
                raise DeliberateError(f"bench first: {mode}: {found['failed']}")
            answers[mode] = found
    finally:
        for process in made.values():
            process.close()
    dense, exact = (answers[mode] for mode in MODES)
    pairs.seconds.append((dense["seconds"], exact["seconds"]))
    pairs.own.append((dense["own"], exact["own"]))
    pairs.same += dense["tokens"] == exact["tokens"]


def description(cfg: DictConfig, mode: str) -> dict[str, Any]:
    """What a process loads and answers by."""
    source = checkpoint.resolve(str(cfg.model))
    saved = checkpoint.read_adaptive_config(source)
    base = source if saved is None else saved.base
    return {
        "library": "ours",
        "systems": [mode],
        "model": str(cfg.model),
        "draft": None,
        "file": base if checkpoint.is_gguf(base) else None,
        "executor": str(cfg.executor),
        "precision": str(cfg.precision),
        "threads": int(cfg.threads),
    }


def show(figures: dict[str, Any], console: Console) -> None:
    """Prints the table."""
    table = Table(title="first answer of a fresh process, prompt included; dense / exact, 95 %")
    for column in ("texts", "clock", "dense ms", "exact ms", "ratio", "interval", "same"):
        table.add_column(column, justify="left" if column in ("texts", "clock") else "right")
    for name, found in figures.items():
        for clock in ("wall", "own"):
            row, interval = found[clock], found[clock]["interval"]
            table.add_row(
                name,
                clock,
                f"{row['dense_ms']:.0f}",
                f"{row['exact_ms']:.0f}",
                f"{row['ratio']:.3f}x",
                "-" if interval is None else "{:.3f}-{:.3f}".format(*interval),
                f"{found['same']} of {found['texts']}",
            )
    console.print(table)
