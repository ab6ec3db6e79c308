"""`deliberate bench budget`: latency budgets from the earliest exit's cost to dense, held or not.

Every request is decoded at batch 1 under every budget and by every baseline before the next
request, in rotating order; time and accuracy of all of them are measured on all requests. Then a
stream of answers meets a machine that becomes slower.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from tqdm import tqdm

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.cost.measure import cached_cost
from deliberate.cost.model import CostModel
from deliberate.data import seeds
from deliberate.eval.benchmarks.budget_points import budget_row, point
from deliberate.eval.benchmarks.budget_result import Sweep
from deliberate.eval.benchmarks.budget_step import (
    SlowedClock,
    StepChange,
    WorkClock,
    busy_core,
    judge,
    stream,
)
from deliberate.eval.benchmarks.budget_tables import show, write_figures
from deliberate.eval.benchmarks.budget_variants import (
    Answer,
    Overheads,
    Way,
    baselines,
    budget_way,
    decode,
    earliest,
)
from deliberate.eval.benchmarks.cost import CLOCKS
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.grading.graders import GraderPool
from deliberate.eval.report.detokenize import decode_text
from deliberate.eval.runner.model_names import model_name
from deliberate.eval.tasks.calibration_overlap import set_apart
from deliberate.eval.tasks.prompts import asking_encoder
from deliberate.eval.tasks.registry import VERBATIM, command_task
from deliberate.eval.tasks.task import Task
from deliberate.kernels.backends import describe
from deliberate.policies.budget import LatencyBudget
from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.environment import load_average
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text

LEAST_BUDGETS = 2


class Bench:
    """A model, its requests, and the clock they are timed by.

    Raises:
        DeliberateError: no calibration, or one of another model; no request fits the context.
    """

    def __init__(self, cfg: DictConfig, model: AdaptiveModel, tokenizer: Any, task: Task) -> None:
        self.cfg, self.model, self.tokenizer = cfg, model, tokenizer
        self.clock: Callable[[], float] = CLOCKS[cfg.clock]
        self.limit: int = task.max_new_tokens
        room = (model.backbone.max_positions or 1 << 30) - self.limit
        encoder = asking_encoder(cfg, tokenizer, max_tokens=1 << 30, template=task.template)
        asked = [(p, tuple(encoder.prompt(p.question))) for p in task.problems]
        asked = [(problem, prompt) for problem, prompt in asked if len(prompt) <= room]
        if len(asked) <= cfg.warmup:
            raise DeliberateError(
                f"{len(asked)} requests leave room for task.max_new_tokens={self.limit} in the "
                f"context, and {cfg.warmup} of them warm up: raise requests or lower the limit"
            )
        self.task = task
        self.warming = asked[: cfg.warmup]
        self.asked = asked[cfg.warmup :]
        self.ends = list(end_tokens(model.base.generation_config, tokenizer))
        calibration = model.require_calibration()
        weights, exits = model.fingerprints()
        calibration.check(weights=weights, exits=exits)
        if cfg.refresh:
            cached_cost(
                model.backbone, model.reader(), model.exit_config, gate=model.gate, refresh=True
            )
        self.cost: CostModel = model.promises.cost(model)

    def answer(self, prompt: Sequence[int], way: Way, overheads: Overheads | None) -> Answer | None:
        """One request in one way."""
        return decode(
            self.model,
            prompt,
            way,
            max_new_tokens=self.limit,
            end_tokens=self.ends,
            clock=self.clock,
            overheads=overheads,
        )

    def least_seconds(self, prompt: Sequence[int], tokens: int) -> float:
        """What the earliest exit takes by the cost model."""
        context = len(prompt) + tokens / 2
        pending = self.model.exit_config.max_pending
        each = self.cost.least_seconds_per_token(pending, context)
        return self.cost.prompt_seconds(len(prompt)) + (tokens - 1) * each

    def dense_seconds(self, prompt: Sequence[int], tokens: int) -> float:
        """What full depth takes by the cost model."""
        each = self.cost.dense_seconds_per_token(len(prompt) + tokens / 2)
        return self.cost.prompt_seconds(len(prompt)) + (tokens - 1) * each

    def range_ms(self) -> tuple[float, float, float, float]:
        """Least and dense milliseconds per token of a typical request, prompt pass included, and
        measured over predicted time: at full depth, and at the earliest exit."""
        typical = sorted((prompt for _, prompt in self.asked), key=len)[len(self.asked) // 2]
        ends, factors, tokens = [], [], 1
        for way, predicted in (
            (Way("dense", "dense"), self.dense_seconds),
            (earliest(self.model), self.least_seconds),
        ):
            found = [(prompt, self.answer(prompt, way, None)) for _, prompt in self.warming]
            taken = [(p, a) for p, a in found[1:] if a]  # the first pass in a process is slow
            factors.append(median(a.seconds / predicted(p, len(a.tokens)) for p, a in taken))
            if way.kind == "dense":
                tokens = max(2, round(median(len(a.tokens) for _, a in taken)))
            ends.append(1e3 * factors[-1] * predicted(typical, tokens) / tokens)
        return min(ends), max(ends), factors[0], factors[1]

    def sweep(self, budgets: Sequence[float], machine: float, ends: tuple[float, float]) -> Sweep:
        """All ways on all requests."""
        asked_ways = [budget_way(ms) for ms in budgets]
        others = baselines(self.model, self.cfg.random, self.cfg.seed)
        ways = [*asked_ways, *others]
        answers: dict[Way, list[Answer | None]] = {way: [] for way in ways}
        overheads = Overheads()
        bar = tqdm(total=len(ways) * (len(self.warming) + len(self.asked)), desc="bench budget")
        with bar:
            for number, (_, prompt) in enumerate([*self.warming, *self.asked]):
                turn = number % len(ways)
                gc.collect()
                counted = number >= len(self.warming)
                for way in ways[turn:] + ways[:turn]:
                    answer = self.answer(prompt, way, overheads if counted else None)
                    if counted:
                        answers[way].append(answer)
                    bar.update()
        right = self.grade(answers)
        done = {way: ([a for a in answers[way] if a is not None], right[way]) for way in others}
        first = next(answers for way, (answers, _) in done.items() if way.kind == "fixed")

        def least_seconds(i: int, tokens: int) -> float:
            """By what the earliest exit took for this very request."""
            prompt, found = self.asked[i][1], first[i]
            predicted = self.least_seconds(prompt, len(found.tokens))
            return found.seconds / predicted * self.least_seconds(prompt, tokens)

        rows = [
            budget_row(way, answers[way], right[way], done, least_seconds) for way in asked_ways
        ]
        kept = [row for row in rows if row is not None]
        overhead = 0.0
        if kept:
            overhead = overheads.per_token(kept[0].point.tokens_per_request)
        return Sweep(
            least_ms=ends[0],
            dense_ms=ends[1],
            machine=machine,
            rows=tuple(kept),
            refused=tuple(ms for ms, row in zip(budgets, rows, strict=True) if row is None),
            points=tuple(point(way, *done[way]) for way in others),
            overhead_us=1e6 * overhead,
            overhead_share=1e3 * overhead / kept[0].point.ms_per_token if kept else 0.0,
        )

    def grade(self, answers: Mapping[Way, Sequence[Answer | None]]) -> dict[Way, list[bool]]:
        """Whether each answer is right; a refused request is not."""
        right: dict[Way, list[bool]] = {way: [] for way in answers}
        graders = self.cfg.graders
        with GraderPool(graders.processes, time_limit=graders.time_limit) as pool:
            for number, (problem, _) in enumerate(self.asked):
                given = [(way, answers[way][number]) for way in answers]
                texts = [decode_text(self.tokenizer, a.tokens) if a else "" for _, a in given]
                grades = self.task.grade(problem, texts, pool)
                for (way, answer), grade in zip(given, grades, strict=True):
                    right[way].append(answer is not None and grade.correct)
        return right

    def step(self, least_ms: float, *, real: bool) -> StepChange:
        """The machine becomes slower in the middle of a stream of answers.

        Args:
            least_ms: of the earliest exit, mean per token on the machine that is slowed.
        """
        step = self.cfg.step
        # Above what the slowed machine needs at least, with room to steer in.
        budget = LatencyBudget(ms_per_token=1.25 * step.factor * least_ms)
        prompts = [prompt for _, prompt in self.asked]
        settings: dict[str, Any] = {
            "before": step.before,
            "after": step.after,
            "max_new_tokens": self.limit,
            "end_tokens": self.ends,
        }
        if real:
            with busy_core() as start:
                tokens = stream(
                    self.model, prompts, budget, clock=time.perf_counter, change=start, **settings
                )
        else:
            machine = WorkClock(self.cost, noise=step.noise, seed=self.cfg.seed)
            clock = SlowedClock(machine)
            tokens = stream(
                self.model,
                prompts,
                budget,
                clock=clock,
                change=lambda: clock.slow(step.factor),
                machine=machine,
                **settings,
            )
        return judge(
            tokens,
            budget,
            before=step.before,
            factor=step.factor,
            window=step.window,
            known=not real,
        )


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench budget`` with overrides of `configs/bench_budget.yaml`.

    Raises:
        DeliberateError: the configuration cannot work, or the model has no calibration.
    """
    cfg = bench_config(
        "bench_budget", arguments, verbatim=(*VERBATIM, "calibration"), folder=True, required=True
    )
    check(cfg)
    torch.set_num_threads(cfg.threads)
    task = _task(cfg)
    model = AdaptiveModel.from_pretrained(str(cfg.model), executor=str(cfg.executor))
    if torch.cuda.is_available():
        model = model.to("cuda")
    if cfg.calibration is not None:
        model.set_calibration(Path(str(cfg.calibration)).expanduser())
    task, _ = set_apart(task, model.calibration, lambda some: _task(cfg, some))
    before = load_average()
    bench = Bench(cfg, model, checkpoint.load_tokenizer(str(cfg.model)), task)
    least, dense, machine, slower = bench.range_ms()
    budgets = (
        [float(ms) for ms in cfg.budgets]
        if isinstance(cfg.budgets, ListConfig)
        else np.geomspace(least, dense, cfg.budgets).tolist()
    )
    found = bench.sweep(budgets, machine, (least, dense))
    steps = {"simulated": bench.step(least / slower, real=False)}
    if cfg.step.real:
        steps["real"] = bench.step(least, real=True)
    environment = describe()
    facts = {
        "model": model_name(cfg.model),
        "task": task.name,
        "requests": len(bench.asked),
        "clock": str(cfg.clock),
        "threads": int(cfg.threads),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "load": {"before": before, "after": load_average()},
    }
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    raw = {
        **facts,
        "sweep": found.to_dict(),
        "steps": {name: _step_dict(step) for name, step in steps.items()},
        "config": OmegaConf.to_container(cfg, resolve=True),
        "environment": environment,
    }
    write_text(out / "budget.json", json.dumps(raw, indent=1, allow_nan=False) + "\n")
    page = write_figures(out, found, steps, facts | {"cpu": environment["cpu"]})
    show(found, steps, facts, page)


def check(cfg: DictConfig) -> None:
    """Raises unless every plain value of the configuration can be.

    Raises:
        DeliberateError: names the value.
    """
    whole = {
        "requests": (cfg.requests, 2),
        "warmup": (cfg.warmup, 2),
        "threads": (cfg.threads, 1),
        "step.before": (cfg.step.before, 1),
        "step.after": (cfg.step.after, 1),
        "step.window": (cfg.step.window, 1),
        "graders.processes": (cfg.graders.processes, 1),
    }
    if not isinstance(cfg.budgets, ListConfig):
        whole["budgets"] = (cfg.budgets, LEAST_BUDGETS)
    for name, (value, least) in whole.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DeliberateError(f"{name}={value} must be a whole number of at least {least}")
    if cfg.step.window > cfg.step.after:
        raise DeliberateError(
            f"step.window={cfg.step.window} exceeds step.after={cfg.step.after} tokens"
        )
    if not isinstance(cfg.step.noise, int | float) or not cfg.step.noise >= 0:
        raise DeliberateError(f"step.noise={cfg.step.noise} must be at least 0")
    if not isinstance(cfg.step.factor, int | float) or not cfg.step.factor > 1:
        raise DeliberateError(f"step.factor={cfg.step.factor} must be above 1")
    if cfg.clock not in CLOCKS:
        raise DeliberateError(f"clock={cfg.clock} is unknown; it is one of {', '.join(CLOCKS)}")
    if not isinstance(cfg.random, ListConfig):
        raise DeliberateError(f"random={cfg.random} must be a list: random=[0.9,0.5,0.1]")
    for probability in cfg.random:
        if not isinstance(probability, float) or not 0.0 < probability < 1.0:
            raise DeliberateError(f"random: probability {probability} is outside (0, 1)")
    if isinstance(cfg.budgets, ListConfig):
        budgets = [LatencyBudget(ms_per_token=ms) for ms in cfg.budgets]
        if not budgets:
            raise DeliberateError("budgets=[] is empty: a number of budgets, or a list of ms")


def _task(cfg: DictConfig, excluded: Callable[[str], bool] | None = None) -> Task:
    """Requests and those that warm up; problems that nothing else draws."""
    count = cfg.requests + cfg.warmup
    return command_task(cfg, use=seeds.BUDGET_BENCHMARK, size=count, excluded=excluded)


def _step_dict(step: StepChange) -> dict[str, Any]:
    """JSON-ready, with the tokens as three lists."""
    raw = {name: value for name, value in asdict(step).items() if name != "tokens"}
    return raw | {
        "recovered": step.recovered,
        "ms": [round(1e3 * token.seconds, 4) for token in step.tokens],
        "planned_ms": [round(1e3 * token.planned, 4) for token in step.tokens],
        "speed": [round(token.speed, 4) for token in step.tokens],
    }
