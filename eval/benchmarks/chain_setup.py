"""What every benchmark of chains needs: model, tags, requests, runner, equality of answers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.data.problem import Problem
from deliberate.data.prompts import Encoder
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.spec import DecodingSpec
from deliberate.eval.benchmarks.harness import CLOCKS, UNBOUNDED, load_model
from deliberate.eval.benchmarks.recording import Recording
from deliberate.eval.benchmarks.settings import mapped
from deliberate.eval.grading.answers import extract_answer
from deliberate.eval.grading.equality import same_answer
from deliberate.eval.tasks.prompts import prompt_encoder, run_conditions
from deliberate.eval.tasks.registry import command_task
from deliberate.eval.tasks.task import Task
from deliberate.reasoning.chain_output import ChainTokens
from deliberate.reasoning.chain_recorder import RecordProbes, measure_costs, recorded
from deliberate.reasoning.chain_runner import ChainRunner
from deliberate.reasoning.marks import ReasoningMarks, blank_tokens, marks_of, utf8_ends
from deliberate.reasoning.recorded_chains import (
    ChainCosts,
    ChainSet,
    ProbePlaces,
    RecordingHeader,
)
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.stop_policy import StopPolicy
from deliberate.reasoning.token_budget import BudgetSettings
from deliberate.utils.end_tokens import end_tokens

_BLOCK = 16


def answers_of(task: Task, before: str) -> Callable[[str], str]:
    """The final answer in a text, by the task's style; empty: none.

    Args:
        task: says how answers are marked.
        before: text that a probe's answer follows, so that it is marked too.
    """

    def answer_of(text: str) -> str:
        marked = extract_answer(text, task.style)
        return marked or (extract_answer(before + text, task.style) if text.strip() else "") or ""

    return answer_of


@dataclass(frozen=True, eq=False)
class ChainSetup:
    """A model that writes chains, and the problems that it is asked.

    Attributes:
        cfg: with ``model``, ``task``, tags and limits, as in `configs/bench_chains.yaml`.
        model, tokenizer: loaded.
        marks: around the reasoning.
        task: the problems and how they are graded.
        encoder: of questions.
        runner: of chains, in an engine whose cache is in blocks.
        answer_of: the final answer in the text of an answer or probe.
    """

    cfg: DictConfig
    model: AdaptiveModel
    tokenizer: Any
    marks: ReasoningMarks
    task: Task
    encoder: Encoder
    runner: ChainRunner
    answer_of: Callable[[str], str]

    @property
    def fidelity(self) -> str:
        """By which chains are decoded: ``dense`` where it is not configured."""
        return str(self.cfg.get("fidelity") or "dense")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def request(
        self,
        problem: Problem,
        policy: StopPolicy | None = None,
        *,
        seed: int | None = None,
        spec: DecodingSpec | None = None,
    ) -> ChainRequest:
        """One chain of a problem; greedy without a seed, decoded as configured without a spec."""
        return ChainRequest(
            self.encoder.prompt(problem.question),
            BudgetSettings(self.task.max_new_tokens, answer=self.cfg.answer_tokens),
            policy,
            spec or DecodingSpec(fidelity=self.fidelity),  # type: ignore[arg-type]
            None if seed is None else sampler(float(self.cfg.temperature), seed),
        )

    def reasoning(self, tokens: Sequence[int]) -> list[int]:
        """Ids between the tags of an output."""
        return ChainTokens(self.marks, tokens).reasoning

    def right(self, answer: str, problem: Problem) -> bool:
        """Whether an answer is the reference's."""
        return bool(answer) and same_answer(answer, problem.answer)

    def conditions(self) -> dict[str, Any]:
        """What chains depend on besides model, policy and problems."""
        sampling = "greedy" if self.cfg.samples == 1 else f"temperature {self.cfg.temperature:g}"
        return run_conditions(
            self.encoder,
            task=self.task.name,
            max_new_tokens=self.task.max_new_tokens,
            dtype=self.model.base.dtype,
            grading=self.task.style,
        ) | {
            "sampling": sampling,
            "fidelity": "dense" if self.fidelity == "exact" else self.fidelity,
            "handover": list(self.marks.handover),
            "answer_tokens": int(self.cfg.answer_tokens),
        }


def sampler(temperature: float, seed: int) -> Callable[[int], TokenChooser]:
    """A chain's sampling: every stretch draws noise of its own."""
    from transformers import TemperatureLogitsWarper

    def at(start: int) -> TokenChooser:
        warp = TemperatureLogitsWarper(temperature)
        return TokenChooser((warp,), sample=True, seed=seed * 1_000_003 + start)

    return at


def runner_of(
    model: AdaptiveModel, tokenizer: Any, marks: ReasoningMarks, rows: int, tokens: int
) -> ChainRunner:
    """A runner of chains in an engine whose cache in blocks holds so many tokens.

    Raises:
        DeliberateError: a model whose executor has no cache in blocks.
    """
    backbone = model.backbone_for(2)
    cache = backbone.new_block_cache(-(-tokens // _BLOCK), block_size=_BLOCK, max_rows=rows)
    return ChainRunner(
        model.engine(max_running=rows, cache=cache),
        marks,
        tokenizer.decode,
        end_tokens=end_tokens(model.base.generation_config, tokenizer),
        ends=utf8_ends(tokenizer),
        blank=blank_tokens(tokenizer),
    )


def chain_setup(cfg: DictConfig) -> ChainSetup:
    """Model, task and runner of a command's configuration.

    Raises:
        DeliberateError: settings that cannot work, or a model whose executor has no cache in
            blocks.
    """
    model = load_model(cfg)
    tokenizer = checkpoint.load_tokenizer(str(cfg.model))
    task = command_task(cfg)
    encoder = prompt_encoder(cfg, tokenizer, max_tokens=UNBOUNDED, template=task.template)
    prompts = [encoder.prompt(problem.question) for problem in task.problems]
    marks = marks_of(
        tokenizer,
        open_tag=None if cfg.open_tag in (None, "null") else cfg.open_tag,
        close_tag=cfg.close_tag,
        answer=cfg.answer,
        prompt=tokenizer.decode(prompts[0]),
    )
    rows = cfg.batch + 1
    longest = max(map(len, prompts)) + task.max_new_tokens + len(marks.handover) + 64
    # The second half keeps beginnings for reuse.
    runner = runner_of(model, tokenizer, marks, rows, 2 * rows * longest)
    # In a model without tags the mark of the answer is the closing tag itself.
    answer_of = answers_of(task, f"{cfg.close_tag}{cfg.answer}")
    return ChainSetup(cfg, model, tokenizer, marks, task, encoder, runner, answer_of)


def record_chains(
    setup: ChainSetup, places: ProbePlaces, *, samples: int = 1, folder: Path | None = None
) -> ChainSet:
    """Records chains of all problems with probes, and measures what tokens and probes cost.

    Args:
        places: of the probes.
        samples: chains of each problem; one is greedy.
        folder: where chains are saved while they are recorded: a recording of the same settings
            that was broken off goes on.
    """
    cfg, problems = setup.cfg, setup.task.problems
    jobs = [(problem, sample) for problem in problems for sample in range(samples)]

    def request(number: int) -> ChainRequest:
        problem, _ = jobs[number]
        seed = None if samples == 1 else cfg.seed + 7919 * (number + 1)
        return setup.request(problem, seed=seed)

    weights, exits = setup.model.fingerprints()
    header = RecordingHeader(
        model=str(cfg.model),
        weights=weights,
        exits=exits,
        data=setup.task.data_sha256,
        conditions=setup.conditions(),
        places=places,
        fidelity=setup.fidelity,
    )
    settings = {"seed": cfg.seed, "samples": samples, "problems": [one.id for one in problems]}
    with Recording(folder, header, settings) as recording:
        if cfg.timed and recording.header.costs is None:
            alone = [functools.partial(request, n) for n in range(min(len(jobs), cfg.timed + 1))]
            clock = CLOCKS[cfg.clock]
            recording.measured(measure_costs(setup.runner, alone, places, setup.encode, clock))
        begun = range(len(recording.chains), len(jobs), cfg.batch)
        for first in tqdm(begun, desc="recording chains", leave=False):
            numbers = range(first, min(len(jobs), first + cfg.batch))
            requests = [request(n) for n in numbers]
            results = setup.runner.run(requests)
            probes = RecordProbes(places, setup.encode)
            setup.runner.probe(
                requests, results, probes.due, places.answer_tokens, in_flight=int(cfg.batch)
            )
            recording.add(
                [
                    recorded(
                        jobs[number][0].id,
                        result,
                        setup.reasoning(result.tokens),
                        setup.answer_of,
                        expected=jobs[number][0].answer,
                        sample=jobs[number][1],
                    )
                    for number, result in zip(numbers, results, strict=True)
                ]
            )
        return recording.complete()


def places_of(cfg: DictConfig) -> ProbePlaces:
    """``cfg.places``."""
    return ProbePlaces(**mapped(cfg, "places"))


def costs_text(costs: ChainCosts | None) -> str:
    """The costs in words."""
    if costs is None:
        return "costs were not measured: a token counts 1, probes their tokens"
    parts = {name: 1e3 * value for name, value in asdict(costs).items() if value}
    return "ms: " + ", ".join(f"{value:.3g} a {name}" for name, value in parts.items())
