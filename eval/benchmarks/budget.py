"""`deliberate bench budget`: are latency budgets from the earliest exit's cost to dense met?

Every request is decoded at batch 1 under every budget and by every baseline before the next
request, in rotating order; time and accuracy of all of them are measured on all requests. Then a
stream of answers meets a machine that becomes slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from omegaconf import DictConfig, ListConfig, OmegaConf

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
    Variant,
    baselines,
    budget_variant,
    decode,
    earliest,
)
from deliberate.eval.benchmarks.harness import (
    CLOCKS,
    UNBOUNDED,
    Session,
    check_clock,
    encode_requests,
    grade_texts,
    interleaved,
    load_model,
)
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.report.detokenize import decode_text
from deliberate.eval.runner.model_names import model_name
from deliberate.eval.tasks.calibration_overlap import set_apart
from deliberate.eval.tasks.prompts import prompt_encoder
from deliberate.eval.tasks.registry import VERBATIM, command_task
from deliberate.eval.tasks.task import Task
from deliberate.policies.budget import LatencyBudget
from deliberate.utils.checks import all_at_least
from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.errors import DeliberateError

LEAST_BUDGETS = 2


class BudgetSweep:
    """A model, its requests, and the clock that times them.

    Raises:
        DeliberateError: no calibration, or one of another model; no request fits the context.
    """

    def __init__(self, cfg: DictConfig, model: AdaptiveModel, tokenizer: Any, task: Task) -> None:
        self.cfg, self.model, self.tokenizer = cfg, model, tokenizer
        self.clock = CLOCKS[cfg.clock]
        self.limit: int = task.max_new_tokens
        encoder = prompt_encoder(cfg, tokenizer, max_tokens=UNBOUNDED, template=task.template)
        context = model.backbone.max_positions
        self.every = encode_requests(task, encoder, context, warmup=cfg.warmup)
        self.task = task
        self.warming, self.requests = self.every[: cfg.warmup], self.every[cfg.warmup :]
        self.ends = list(end_tokens(model.base.generation_config, tokenizer))
        calibration = model.require_calibration()
        weights, exits = model.fingerprints()
        calibration.check(weights=weights, exits=exits)
        if cfg.refresh:
            cached_cost(
                model.backbone, model.reader(), model.exit_config, gate=model.gate, refresh=True
            )
        self.cost: CostModel = model.guarantees.cost(model)

    def answer(
        self, prompt: Sequence[int], variant: Variant, overheads: Overheads | None
    ) -> Answer | None:
        """One request by one variant."""
        return decode(
            self.model,
            prompt,
            variant,
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
        typical = sorted((r.prompt for r in self.requests), key=len)[len(self.requests) // 2]
        ends, factors, tokens = [], [], 1
        for variant, predicted in (
            (Variant("dense", "dense"), self.dense_seconds),
            (earliest(self.model), self.least_seconds),
        ):
            found = [(r.prompt, self.answer(r.prompt, variant, None)) for r in self.warming]
            taken = [(p, a) for p, a in found[1:] if a]  # the first pass in a process is slow
            factors.append(median(a.seconds / predicted(p, len(a.tokens)) for p, a in taken))
            if variant.kind == "dense":
                tokens = max(2, round(median(len(a.tokens) for _, a in taken)))
            ends.append(1e3 * factors[-1] * predicted(typical, tokens) / tokens)
        return min(ends), max(ends), factors[0], factors[1]

    def sweep(self, budgets: Sequence[float], machine: float, ends: tuple[float, float]) -> Sweep:
        """All variants on all requests."""
        budgeted = [budget_variant(ms) for ms in budgets]
        others = baselines(self.model, self.cfg.random, self.cfg.seed)
        variants = [*budgeted, *others]
        answers: dict[Variant, list[Answer | None]] = {variant: [] for variant in variants}
        overheads = Overheads()
        for turn, request, variant in interleaved(
            self.every, variants, warmup=self.cfg.warmup, title="bench budget"
        ):
            answer = self.answer(request.prompt, variant, overheads if turn.counted else None)
            if turn.counted:
                answers[variant].append(answer)
        right = self.grade(answers)
        done = {
            variant: ([a for a in answers[variant] if a is not None], right[variant])
            for variant in others
        }
        first = next(found for variant, (found, _) in done.items() if variant.kind == "fixed")

        def least_seconds(i: int, tokens: int) -> float:
            """By what the earliest exit took for this very request."""
            prompt, found = self.requests[i].prompt, first[i]
            predicted = self.least_seconds(prompt, len(found.tokens))
            return found.seconds / predicted * self.least_seconds(prompt, tokens)

        rows = [budget_row(one, answers[one], right[one], done, least_seconds) for one in budgeted]
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
            points=tuple(point(variant, *done[variant]) for variant in others),
            overhead_us=1e6 * overhead,
            overhead_share=1e3 * overhead / kept[0].point.ms_per_token if kept else 0.0,
        )

    def grade(
        self, answers: Mapping[Variant, Sequence[Answer | None]]
    ) -> dict[Variant, list[bool]]:
        """Whether each answer is right; a refused request is not."""
        texts = {
            variant: [None if a is None else decode_text(self.tokenizer, a.tokens) for a in own]
            for variant, own in answers.items()
        }
        problems = [request.problem for request in self.requests]
        return grade_texts(self.task, problems, texts, self.cfg.graders)

    def step(self, least_ms: float, *, real: bool) -> StepChange:
        """The machine becomes slower in the middle of a stream of answers.

        Args:
            least_ms: of the earliest exit, mean per token on the machine that is slowed.
        """
        step = self.cfg.step
        # Above what the slowed machine needs at least, with room to steer in.
        budget = LatencyBudget(ms_per_token=1.25 * step.factor * least_ms)
        prompts = [request.prompt for request in self.requests]
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
    session = Session("budget", arguments, cfg.threads)
    task = _task(cfg)
    model = load_model(cfg)
    task, _ = set_apart(task, model.calibration, lambda seen: _task(cfg, seen))
    bench = BudgetSweep(cfg, model, checkpoint.load_tokenizer(str(cfg.model)), task)
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
    session.end()
    facts = session.facts()
    shown = {
        "model": model_name(cfg.model),
        "task": task.name,
        "requests": len(bench.requests),
        "clock": str(cfg.clock),
        "threads": int(cfg.threads),
    }
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        **shown,
        "sweep": found.to_dict(),
        "steps": {name: _step_dict(step) for name, step in steps.items()},
        "config": OmegaConf.to_container(cfg, resolve=True),
    }
    session.write(out / "budget.json", record)
    shown |= facts | {"cpu": facts["environment"]["cpu"]}
    page = write_figures(out, found, steps, shown)
    show(found, steps, shown, page)


def check(cfg: DictConfig) -> None:
    """Raises unless every plain value of the configuration can be.

    Raises:
        DeliberateError: names the value.
    """
    least = {"requests": 2, "warmup": 2, "threads": 1, "graders.processes": 1}
    least |= {"step.before": 1, "step.after": 1, "step.window": 1}
    if not isinstance(cfg.budgets, ListConfig):
        least["budgets"] = LEAST_BUDGETS
    all_at_least(cfg, least)
    if cfg.step.window > cfg.step.after:
        raise DeliberateError(
            f"step.window={cfg.step.window} exceeds step.after={cfg.step.after} tokens"
        )
    if not isinstance(cfg.step.noise, int | float) or not cfg.step.noise >= 0:
        raise DeliberateError(f"step.noise={cfg.step.noise} must be at least 0")
    if not isinstance(cfg.step.factor, int | float) or not cfg.step.factor > 1:
        raise DeliberateError(f"step.factor={cfg.step.factor} must be above 1")
    check_clock(cfg)
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
