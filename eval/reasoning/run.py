"""`deliberate eval reasoning=[...] samples=[...]`: rules for the reasoning on the same problems."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from tqdm import tqdm
from transformers import TemperatureLogitsWarper

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.api.reasoner import Reasoner
from deliberate.config import Fidelity
from deliberate.data.problem import Problem
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.spec import DecodingSpec
from deliberate.eval.benchmarks.chain_setup import answers_of
from deliberate.eval.benchmarks.harness import UNBOUNDED, Session, table_console
from deliberate.eval.grading.equality import same_answer
from deliberate.eval.reasoning.figures import Row, Shown, Summary, summarize
from deliberate.eval.reasoning.page import page, record, show
from deliberate.eval.reasoning.variants import FIDELITIES, Variant, control_of, variants
from deliberate.eval.tasks.prompts import prompt_encoder, run_conditions
from deliberate.eval.tasks.registry import command_task
from deliberate.utils.checks import one_of
from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text
from deliberate.utils.typed_text import typed_text

WIDTH = 200
_SEEDS_APART = 1_000_003
_BESIDE = 32


class Bench:
    """Answers problems by variants, one problem at a time.

    Args:
        cfg: of `configs/eval.yaml`.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.task = command_task(cfg)
        self.model = AdaptiveModel.from_pretrained(
            str(cfg.model), dtype=cfg.dtype, executor=str(cfg.executor), weights=str(cfg.weights)
        ).eval()
        self.tokenizer = checkpoint.load_tokenizer(str(cfg.model))
        self.encoder = prompt_encoder(
            cfg, self.tokenizer, max_tokens=UNBOUNDED, template=self.task.template
        )
        self.spec = DecodingSpec(fidelity=fidelity_of(cfg), thresholds=cfg.thresholds)
        self._reasoners: dict[str, Reasoner] = {}
        prompts = [len(self.encoder.prompt(one.question)) for one in self.task.problems]
        self._longest = max(prompts) + self.task.max_new_tokens + _BESIDE

    def reasoner(self, variant: Variant) -> Reasoner:
        """The engine and policies of a variant."""
        if variant.name not in self._reasoners:
            self._reasoners[variant.name] = Reasoner(
                self.model,
                self.tokenizer,
                replace(variant.settings, same=same_answer),
                end_tokens=end_tokens(self.model.base.generation_config, self.tokenizer),
                longest=self._longest,
                running=1 if variant.votes is None else 8,
                conditions=run_conditions(
                    self.encoder,
                    task=self.task.name,
                    max_new_tokens=self.task.max_new_tokens,
                    dtype=self.model.base.dtype,
                    grading=self.task.style,
                ),
            )
        return self._reasoners[variant.name]

    def answer(self, variant: Variant, problem: Problem, number: int) -> Row:
        """One problem by one variant."""
        reasoner, limit = self.reasoner(variant), self.task.max_new_tokens
        prompt = self.encoder.prompt(problem.question)
        spec = self.spec
        if variant.fidelity is not None:
            spec = replace(spec, fidelity=Fidelity(variant.fidelity))
        answer_of = answers_of(self.task, reasoner.lead_in.lstrip("\n"))
        began = time.perf_counter()
        if variant.votes is None:
            chains = reasoner.run([prompt], limit, spec=spec)
            answer = answer_of(chains[0].answer)
            seconds = time.perf_counter() - began
        else:
            vote = reasoner.vote(
                prompt,
                limit,
                variant.votes,
                _sampling(float(self.cfg.temperature), int(self.cfg.seed) + number * 64),
                spec=spec,
                answer_of=lambda chain: answer_of(chain.answer),
            )
            seconds = time.perf_counter() - began
            chains, answer = vote.chains, vote.answer
        first = chains[0]
        probes = []
        for one in first.probes:
            said = answer_of(one.answer)
            probes.append(Shown(one.at, said, _right(said, problem)))
        return Row(
            problem=problem.id,
            answer=answer,
            right=_right(answer, problem),
            reasoning_tokens=sum(chain.reasoning_tokens + chain.rolled_back for chain in chains),
            tokens=sum(len(chain.tokens) + chain.rolled_back for chain in chains),
            probe_tokens=sum(chain.probe_tokens for chain in chains),
            chains=len(chains),
            seconds=seconds,
            stopped=first.stopped,
            probes=tuple(probes),
            length=first.reasoning_tokens,
        )

    def rows(self, chosen: Sequence[Variant], label: str) -> dict[str, list[Row]]:
        """Every problem by every variant before the next problem, in rotating order."""
        for variant in chosen:  # the first passes of a process are slow: not counted
            for number, problem in enumerate(self.task.problems[: self.cfg.warmup]):
                self.answer(variant, problem, number)
        made: dict[str, list[Row]] = {variant.name: [] for variant in chosen}
        for number, problem in enumerate(tqdm(self.task.problems, desc=label, leave=False)):
            shift = number % len(chosen)
            for variant in (*chosen[shift:], *chosen[:shift]):
                made[variant.name].append(self.answer(variant, problem, number))
        return made


def fidelity_of(cfg: DictConfig) -> Any:
    """How the chains are decoded: ``cfg.fidelity``, dense by default.

    Raises:
        DeliberateError: several, or one that chains cannot have.
    """
    given = cfg.fidelity
    if OmegaConf.is_list(given) and len(given) == 1:
        given = given[0]
    if given is None:
        return "dense"
    if OmegaConf.is_list(given):
        raise DeliberateError(
            f"fidelity={list(given)} with reasoning or samples: give one of dense, exact, threshold"
        )
    one_of("fidelity", given, FIDELITIES)
    return given


def _sampling(temperature: float, seed: int) -> Any:
    def at(chain: int, start: int) -> TokenChooser:
        warp = TemperatureLogitsWarper(temperature)
        return TokenChooser((warp,), sample=True, seed=(seed + chain) * _SEEDS_APART + start)

    return at


def _right(answer: str, problem: Problem) -> bool:
    return bool(answer) and same_answer(answer, problem.answer)


def chosen_variants(cfg: DictConfig) -> list[Variant]:
    """``cfg.reasoning`` with ``cfg.samples``."""

    def listed(value: Any, otherwise: list[Any]) -> list[Any]:
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        if plain is None:
            return otherwise
        return plain if isinstance(plain, list) else [plain]

    tags = [typed_text(str(tag)) for tag in listed(cfg.reasoning_tags, [])]
    if tags and len(tags) != 2:
        raise DeliberateError(f"reasoning_tags={tags}: give an opening and a closing tag")
    return variants(listed(cfg.reasoning, ["none"]), listed(cfg.samples, [1]), tags or None)


def evaluate(cfg: DictConfig, arguments: Sequence[str] = ()) -> tuple[list[Summary], Path]:
    """Runs the evaluation, prints its table and writes `report.html` and `reasoning.json`.

    Raises:
        DeliberateError: settings, a model or data that cannot work.
    """
    chosen = chosen_variants(cfg)
    if not cfg.temperature > 0:
        raise DeliberateError(f"temperature={cfg.temperature} must be above 0: chains are sampled")
    session = Session("reasoning", arguments, cfg.threads)
    bench = Bench(cfg)
    made = bench.rows(chosen, "reasoning")
    controls = {}
    for variant in chosen[1:]:
        rows = made[variant.name]
        chains = sum(row.chains for row in rows)
        tokens = sum(row.reasoning_tokens for row in rows) / chains
        control = control_of(variant, tokens, chains / len(rows))
        if control is not None and cfg.controls:
            controls[variant.name] = control
    others = bench.rows([chosen[0], *controls.values()], "controls") if controls else {}
    session.end()
    baseline = made[chosen[0].name]
    summaries = []
    for variant in chosen:
        own = controls.get(variant.name)
        pair = None if own is None else (own.name, others[own.name])
        rows = made[variant.name]
        summaries.append(summarize(variant.name, rows, baseline, control=pair))
    # Controls ran beside the baseline once more, so that their time has the same load.
    for name, control in controls.items():
        again = others[chosen[0].name]
        summaries.append(summarize(control.name, others[control.name], again, control_of=name))
    console = table_console(WIDTH)
    show(summaries, console)
    line = session.line()
    console.print(line, highlight=False)
    folder = Path(str(cfg.out))
    title = f"Reasoning: {cfg.model} on {bench.task.name}, {len(baseline)} problems"
    facts: dict[str, Any] = {
        "settings": OmegaConf.to_container(cfg, resolve=True)
    } | session.facts()
    facts["command"] = shlex.join(["deliberate", "eval", *arguments])
    text = json.dumps(record(summaries, facts), indent=2)
    write_text(folder / "reasoning.json", text + "\n")
    write_text(folder / "report.html", page(title, summaries, [facts["command"], line]))
    report = folder / "report.html"
    Console(highlight=False).print(f"report: {report}", markup=False, soft_wrap=True)
    return summaries, folder / "report.html"


def without_reasoning(cfg: DictConfig) -> bool:
    """Whether an evaluation compares modes of decoding, and no rules for the reasoning."""
    return cfg.reasoning is None and cfg.samples is None
