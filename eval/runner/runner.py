"""Runs every mode on the same problems, interleaved, and records what each of them did.

Greedy, batch 1. The modes take turns problem by problem in a rotating order, so that drift of the
machine and warm caches meet all of them alike. The clock covers the whole call of `generate`, with
the device synchronised; grading and decoding to text come after it. Where accuracies are wanted
rather than times, each mode has an engine that decodes several problems at a time
(`deliberate.eval.runner.together`).
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from deliberate.api.model import AdaptiveModel
from deliberate.config import Fidelity
from deliberate.data.word_problems import MAX_STEPS
from deliberate.engine.spec import DecodingSpec
from deliberate.eval.grading.graders import GraderPool
from deliberate.eval.report.detokenize import decode_text, split_text
from deliberate.eval.runner.decoded import Decoded
from deliberate.eval.runner.guarantee_check import GuaranteeCheck
from deliberate.eval.runner.outcomes import ModeOutcome, ProblemRecord
from deliberate.eval.runner.results import ModelInfo
from deliberate.eval.runner.settings import RunSettings
from deliberate.eval.runner.together import decode_together
from deliberate.eval.tasks.prompts import question_encoder, run_conditions
from deliberate.eval.tasks.task import Task, Verdict
from deliberate.policies.guarantee_settings import decoding_conditions
from deliberate.utils.devices import synchronize
from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.energy import EnergyMeter
from deliberate.utils.errors import DeliberateError
from deliberate.utils.garbage import quiet_collector
from deliberate.utils.hashing import tensors_sha256


class FirstTokenClock(BaseStreamer):
    """Notes when the first token arrives; the same for transformers' loop and ours."""

    def __init__(self) -> None:
        self.first: float | None = None
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self.first is None:
            if self._prompt_seen:
                self.first = time.perf_counter()
            self._prompt_seen = True

    def end(self) -> None:
        pass


class Runner:
    """One model on one task.

    Attributes:
        unfit: ids of the problems whose prompt fills the model's context: nothing is generated
            for them, and they count as answered wrongly in every mode.
        chat: whether questions are put in the tokenizer's chat template, as training puts them.
        cramped: how many problems have less room than the task's `max_new_tokens`.
        guarantees: certificate and budget of the run.

    Raises:
        DeliberateError: thresholds the exits cannot have, no prompt that fits the context, or a
            guarantee that cannot be given.
    """

    def __init__(
        self, model: AdaptiveModel, tokenizer: Any, task: Task, settings: RunSettings
    ) -> None:
        self.model, self.tokenizer, self.task, self.settings = model, tokenizer, task, settings
        self.energy = EnergyMeter(gpus=int(model.device.type == "cuda"))
        self._context = model.backbone.max_positions
        if settings.thresholds is not None:
            model.exit_config.with_thresholds(settings.thresholds)
        encoder = question_encoder(
            tokenizer,
            chat=settings.chat,
            system=settings.system,
            max_tokens=self._context or sys.maxsize,
            template=task.template,
        )
        self.chat = encoder.chat
        self._prompts = [encoder.prompt(problem.question) for problem in task.problems]
        rooms = [self._room(prompt) for prompt in self._prompts]
        self.unfit = [p.id for p, room in zip(task.problems, rooms, strict=True) if room < 1]
        self.cramped = sum(1 <= room < task.max_new_tokens for room in rooms)
        if len(self.unfit) == len(task.problems):
            raise DeliberateError(
                f"no problem of {task.name!r} fits the model's context of {self._context} tokens: "
                f"the shortest prompt has {min(map(len, self._prompts))}"
            )
        self._end = list(end_tokens(model.base.generation_config, tokenizer))
        self.guarantees = GuaranteeCheck(
            model,
            certificate=settings.certificate,
            budget=settings.budget,
            conditions=run_conditions(
                encoder,
                task=task.name,
                max_new_tokens=task.max_new_tokens,
                dtype=model.base.dtype,
                grading=task.style,
            )
            | decoding_conditions(model, DecodingSpec(), max_new_tokens=task.max_new_tokens),
            tokenizer=tokenizer,
        )

    def warm_up(self) -> float:
        """Decodes the first problems that fit in every mode; returns the seconds that it took.

        Raises:
            DeliberateError: nothing can meet the budget.
        """
        began = time.perf_counter()
        fitting = [prompt for prompt in self._prompts if self._room(prompt) > 0]
        self.guarantees.before(list(map(len, fitting)), self.task.max_new_tokens)
        with plain_greedy(self.model, self._end):
            for prompt in fitting[: self.settings.warmup]:
                for mode in self.settings.modes:
                    if self._keeps(mode, prompt):
                        self.decode(prompt, mode)
        self.guarantees.refused = 0
        return time.perf_counter() - began

    def records(
        self, pool: GraderPool, done: Collection[ProblemRecord] = ()
    ) -> Iterator[ProblemRecord]:
        """Runs the problems, yielding each as it is done and graded: in order where one is decoded
        at a time, and in the order in which they end where several are.

        Args:
            done: records of an earlier part of the same run: these problems are left out.
        """
        known = {record.id for record in done}
        if "budget" in self.settings.modes:
            self.guarantees.refused += sum("budget" not in record.modes for record in done)
        left = [i for i, problem in enumerate(self.task.problems) if problem.id not in known]
        with quiet_collector(), plain_greedy(self.model, self._end):
            several = self.settings.max_running is not None
            for record in self._together(left, pool) if several else self._in_turn(left, pool):
                yield record
                gc.collect()

    def decode(self, prompt: Sequence[int], mode: str) -> Decoded:
        """One timed generation from prompt ids."""
        model = self.model
        ids = torch.tensor([list(prompt)], device=model.device)
        mask = torch.ones_like(ids)
        length = self._length(prompt)
        clock = FirstTokenClock()
        trace = report = None
        synchronize(self.model.device)
        energy = self.energy.joules()
        began = time.perf_counter()
        if mode == "transformers":
            # The baseline gets inference mode too, which its own `no_grad` does not give it.
            with torch.inference_mode():
                sequences = model.base.generate(  # type: ignore[operator]
                    input_ids=ids, attention_mask=mask, max_new_tokens=length, streamer=clock
                )
        else:
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=length,
                streamer=clock,
                return_dict_in_generate=True,
                **{"fidelity": mode, **self._how(mode)},
            )
            sequences, trace, report = output.sequences, output.trace, output.budget
        synchronize(self.model.device)
        ended = time.perf_counter()
        taken = self.energy.joules()
        first = ended if clock.first is None else clock.first
        tokens = sequences[0, len(prompt) :].tolist()
        joules = None if taken is None or energy is None else taken - energy
        return Decoded(tokens, ended - began, first - began, trace, report, joules)

    def dense_scores(self, problem: str, position: int) -> Tensor:
        """Dense's logits ``[V]`` (float32) of the token at `position` of its answer."""
        places = [index for index, one in enumerate(self.task.problems) if one.id == problem]
        with plain_greedy(self.model, self._end):
            output = self.model.generate(
                input_ids=torch.tensor([list(self._prompts[places[0]])], device=self.model.device),
                max_new_tokens=position + 1,
                fidelity="dense",
                output_scores=True,
                return_dict_in_generate=True,
            )
        return output.scores[position][0]

    def _how(self, mode: str) -> Mapping[str, Any]:
        """What `generate` is given, the fidelity included where it is not the mode's name."""
        settings = self.settings
        if mode == "certified":
            return self.guarantees.certified_settings()
        if mode == "budget":
            return {"latency_budget": settings.budget}
        if mode == "exact":
            return {"thresholds": settings.thresholds, "strict": settings.strict}
        return {} if mode == "dense" else {"thresholds": settings.thresholds}

    def _keeps(self, mode: str, prompt: Sequence[int]) -> bool:
        """Whether the mode can give its guarantee for this prompt."""
        if mode == "certified":
            return not self.guarantees.expired
        return mode != "budget" or self.guarantees.possible(len(prompt), self._length(prompt))

    def _in_turn(self, places: Sequence[int], pool: GraderPool) -> Iterator[ProblemRecord]:
        """Without those where no mode can run: a certificate expired, or a budget is too small."""
        for index in places:
            prompt = self._prompts[index]
            fits = self._room(prompt) > 0
            modes = [
                mode
                for mode in self.settings.modes
                if (mode != "transformers" or self._stock_runs(index))
                and (not fits or self._keeps(mode, prompt))
            ]
            # The grammar's steps come round every six problems: without the second term a number
            # of steps would always meet the same order of modes.
            turn = (index + index // MAX_STEPS) % max(1, len(modes))
            done = {m: self.decode(prompt, m) for m in modes[turn:] + modes[:turn] if fits}
            if modes:
                yield self._record(index, {mode: done.get(mode) for mode in modes}, pool)

    def _together(self, places: Sequence[int], pool: GraderPool) -> Iterator[ProblemRecord]:
        """Several at a time, by engines."""
        settings = self.settings
        fitting = [index for index in places if self._room(self._prompts[index]) > 0]
        for index in sorted(set(places) - set(fitting)):
            yield self._record(index, dict.fromkeys(settings.modes), pool)
        specs = {
            mode: DecodingSpec(
                fidelity=Fidelity(mode),
                thresholds=None if mode == "dense" else settings.thresholds,
            )
            for mode in settings.modes
        }
        prompts = {index: self._prompts[index] for index in fitting}
        for index, done in decode_together(
            self.model,
            prompts,
            specs,
            lengths={index: self._length(prompt) for index, prompt in prompts.items()},
            end_tokens=self._end,
            max_running=settings.max_running or 1,
        ):
            yield self._record(index, done, pool)

    def _record(
        self, index: int, done: Mapping[str, Decoded | None], pool: GraderPool
    ) -> ProblemRecord:
        """What each mode answered, in the modes' order; None where the prompt does not fit."""
        problem = self.task.problems[index]
        made = {mode: one for mode, one in done.items() if one is not None}
        texts = [decode_text(self.tokenizer, one.tokens) for one in made.values()]
        verdicts = self.task.verdicts(problem, texts, pool)
        outcomes = {
            mode: self._outcome(mode, one, text, verdict)
            for (mode, one), text, verdict in zip(made.items(), texts, verdicts, strict=True)
        }
        return ProblemRecord(
            id=problem.id,
            question=problem.question,
            answer=problem.answer,
            source=problem.source,
            difficulty=problem.difficulty,
            subject=problem.subject,
            prompt_tokens=len(self._prompts[index]),
            modes={mode: outcomes.get(mode) or _unanswered() for mode in done},
        )

    def _outcome(self, mode: str, done: Decoded, text: str, verdict: Verdict) -> ModeOutcome:
        trace = done.trace
        confidences = [] if trace is None else [r.confidence for r in trace.records]
        if any(c != c for c in confidences):  # NaN: dense evaluates no exit
            confidences = []
        return ModeOutcome(
            text=text,
            predicted=verdict.grade.predicted,
            correct=verdict.grade.correct,
            strict=verdict.strict,
            flexible=verdict.flexible,
            tokens=done.tokens,
            pieces=split_text(self.tokenizer, done.tokens),
            exit_layers=[] if trace is None else trace.exit_layers,
            confidences=confidences,
            seconds=done.seconds,
            prefill_seconds=done.prefill_seconds,
            joules=done.joules,
            layer_passes=0 if trace is None else sum(trace.layer_calls),
            layer_positions=0 if trace is None else sum(trace.layer_positions),
            # certified and budget may decode by exact mode, whose every token is verified; what
            # was rejected was a draft in any case
            drafted=trace.drafted if trace and (trace.verified or trace.rejected) else 0,
            rejected=0 if trace is None else trace.rejected,
            finish="stop" if done.tokens and done.tokens[-1] in self._end else "length",
            budget=(
                None
                if done.budget is None or trace is None
                else self.guarantees.outcome(done.budget, trace, done.seconds)
            ),
            rounds=(
                None
                if trace is None or self.model.gate is None
                else [record.rounds for record in trace.records]
            ),
        )

    def _stock_runs(self, index: int) -> bool:
        limit = self.settings.transformers_limit
        return limit is None or index < limit

    def _room(self, prompt: Sequence[int]) -> int:
        return self.task.max_new_tokens if self._context is None else self._context - len(prompt)

    def _length(self, prompt: Sequence[int]) -> int:
        return min(self.task.max_new_tokens, self._room(prompt))


def model_info(model: AdaptiveModel, name: str) -> ModelInfo:
    """What results say about the model."""
    return {
        "name": name,
        "sha256": weights_sha256(model),
        "architecture": type(model.base).__name__,
        "num_layers": model.backbone.num_layers,
        "exits": list(model.exit_config.layers),
        "parameters": model.trainable_parameters()[1],
    }


def weights_sha256(model: AdaptiveModel) -> str:
    """Hash of every weight and buffer of the base model and the exits, by name."""
    return tensors_sha256(model.state_dict())


@contextlib.contextmanager
def plain_greedy(model: AdaptiveModel, end: Sequence[int]) -> Iterator[None]:
    """Replaces the checkpoint's own generation settings (sampling, penalties) by plain greedy.

    transformers takes from them whatever a call leaves out, so they would differ between modes.
    """
    before = model.base.generation_config
    model.base.generation_config = GenerationConfig(
        do_sample=False, use_cache=True, eos_token_id=list(end), pad_token_id=end[0]
    )
    try:
        yield
    finally:
        model.base.generation_config = before


def _unanswered() -> ModeOutcome:
    """The outcome of a problem that does not fit: no token, no time worth counting."""
    return ModeOutcome(
        text="",
        predicted=None,
        correct=False,
        strict=False,
        flexible=False,
        tokens=[],
        pieces=[],
        exit_layers=[],
        confidences=[],
        seconds=1e-9,
        prefill_seconds=1e-9,
        layer_passes=0,
        layer_positions=0,
        finish="length",
    )
