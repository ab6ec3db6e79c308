"""Certificates of a calibration run: which losses are tested, at which lambdas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.certificate import (
    Certificate,
    Risk,
    Tested,
    Testing,
    accuracy_losses,
    fixed_sequence,
    token_losses,
    upper_bound,
)
from deliberate.calibration.conditions import conditions_sha256
from deliberate.calibration.exit_traces import Recording
from deliberate.calibration.stopping_policy import PolicyTable
from deliberate.eval.grading.graders import GraderPool
from deliberate.eval.report.detokenize import decode_text
from deliberate.eval.runner.answer_notes import says_nothing
from deliberate.eval.runner.batched import decode_answers
from deliberate.eval.runner.partial_file import AnswerLog, PartialFile
from deliberate.eval.tasks.task import Task

# Lambdas tried for accuracy: this many expected disagreements per answer, per unit of epsilon. An
# answer without a disagreement is the dense answer, so below about 1 a lambda is safe.
_DISAGREEMENTS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Traces:
    """A recording with what belongs to it.

    Attributes:
        recording: of all problems.
        weights, exits, data: SHA-256 of the base weights, the exits and the problems.
        task, prompts, answers: problems, token ids of the prompts, and dense answers; only where
            they were decoded just now.
        partial: where answers are kept that a repeated run need not decode again.
        conditions: task, prompt form, length limit, executor and so on of the answers.
    """

    recording: Recording
    weights: str
    exits: str
    data: str
    task: Task | None = None
    prompts: tuple[tuple[int, ...], ...] = ()
    answers: tuple[tuple[int, ...], ...] = ()
    conditions: dict[str, Any] = field(default_factory=dict)
    partial: PartialFile | None = None


def certify(
    risk: Risk,
    cfg: DictConfig,
    model: AdaptiveModel | None,
    policy: PolicyTable,
    held: Recording,
    traces: Traces,
    rows: NDArray[np.int64],
    *,
    notes: list[str],
    progress: bool,
) -> tuple[Testing, Certificate | None]:
    """Tests the policy's lambdas on problems it was not fitted on; a certificate if any passes.

    Args:
        risk: `ACCURACY` needs the model, and traces with task and answers.
        cfg: of `deliberate calibrate`.
        policy: fitted on other problems.
        held: recording of the testing problems.
        traces: of all problems.
        rows: which of them test.
        notes: gets a sentence where the certificate says little.
    """
    lambdas: Sequence[float] = policy.lambdas
    losses: Callable[[float], NDArray[np.float64]]
    if risk is Risk.TOKEN:

        def losses(lambda_: float) -> NDArray[np.float64]:
            return token_losses(held, policy.thresholds(lambda_))
    else:
        assert model is not None
        lambdas = accuracy_lambdas(policy, len(traces.recording) / len(traces.prompts), cfg.epsilon)
        losses = _AccuracyLosses(cfg, model, policy, traces, rows, progress)
    if all(math.isinf(lambda_) for lambda_ in policy.lambdas):
        # No exit pays here: the only member is full depth, which loses nothing by definition.
        only = Tested(math.inf, held.num_sequences, 0.0, 0.0, True)
        testing = Testing((only,), cfg.epsilon, cfg.delta)
    else:
        testing = fixed_sequence(lambdas, losses, risk, epsilon=cfg.epsilon, delta=cfg.delta)
    if isinstance(losses, _AccuracyLosses):
        note = says_nothing(sum(losses.solved_by_dense()), len(rows), cfg.epsilon)
        notes += [] if note is None else [note]
    passed = testing.certified
    if passed is None:
        return testing, None
    thresholds = policy.thresholds(passed.lambda_)
    limit = float(cfg.epsilon)
    if risk is Risk.ACCURACY and not math.isinf(
        passed.lambda_
    ):  # what agreement was like when accuracy was judged
        limit = upper_bound(token_losses(held, thresholds), cfg.delta)
    conditions = _conditions(risk, traces)
    return testing, Certificate(
        risk=risk,
        epsilon=cfg.epsilon,
        delta=cfg.delta,
        n=passed.n,
        observed=passed.mean,
        lambda_=passed.lambda_,
        thresholds=thresholds,
        disagreement=limit,
        weights=traces.weights,
        exits=traces.exits,
        policy=policy.sha256,
        data=traces.data,
        conditions=conditions,
        conditions_sha256=conditions_sha256(conditions),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        # Agreement was recorded with the gate's own threshold, whole answers with lambda's.
        gate_threshold=policy.gate_threshold(passed.lambda_) if risk is Risk.ACCURACY else None,
    )


def _conditions(risk: Risk, traces: Traces) -> dict[str, Any]:
    """What the losses depend on: whole answers are decoded, agreement of tokens is recorded."""
    conditions = dict(traces.conditions) | {"kv_mode": "defer"}
    if risk is Risk.TOKEN:
        conditions.pop("max_pending", None)
    return conditions


def accuracy_lambdas(policy: PolicyTable, tokens_per_answer: float, epsilon: float) -> list[float]:
    """A few lambdas worth decoding whole answers at, chosen from expected disagreements alone."""
    wanted = [min(1.0, share * epsilon / tokens_per_answer) for share in _DISAGREEMENTS]
    found = {policy.lambda_for_risk(risk) for risk in wanted}
    return sorted(lambda_ for lambda_ in found if not math.isinf(lambda_))


class _AccuracyLosses:
    """Loss of each testing problem at a lambda: the policy decodes it and the answer is graded."""

    def __init__(
        self,
        cfg: DictConfig,
        model: AdaptiveModel,
        policy: PolicyTable,
        traces: Traces,
        rows: NDArray[np.int64],
        progress: bool,
    ) -> None:
        assert traces.task is not None
        self._cfg, self._model, self._policy = cfg, model, policy
        self._task, self._progress, self._partial = traces.task, progress, traces.partial
        self._tokenizer = checkpoint.load_tokenizer(str(cfg.model))
        self._problems = [traces.task.problems[row] for row in rows]
        self._prompts = [traces.prompts[row] for row in rows]
        self._dense = [traces.answers[row] for row in rows]
        self._solved: list[bool] | None = None

    def __call__(self, lambda_: float) -> NDArray[np.float64]:
        thresholds, gate_threshold = (
            self._policy.thresholds(lambda_),
            self._policy.gate_threshold(lambda_),
        )
        log = None
        if self._partial is not None:
            log = AnswerLog(self._partial, f"thresholds {list(thresholds)} band {gate_threshold}")
        answers = decode_answers(
            self._model,
            self._tokenizer,
            self._prompts,
            max_new_tokens=self._task.max_new_tokens,
            batch=self._cfg.batch,
            thresholds=thresholds,
            gate_threshold=gate_threshold,
            log=log,
            title=f"accuracy at lambda {lambda_:.3g}" if self._progress else None,
        )
        return accuracy_losses(np.asarray(self.solved_by_dense()), np.asarray(self._right(answers)))

    def solved_by_dense(self) -> list[bool]:
        """Whether dense solves each testing problem; graded once."""
        if self._solved is None:
            self._solved = self._right(self._dense)
        return self._solved

    def _right(self, answers: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each answer, given as token ids, is correct."""
        right, graders = [], self._cfg.graders
        with GraderPool(graders.processes, time_limit=graders.time_limit) as pool:
            for problem, ids in zip(self._problems, answers, strict=True):
                texts = [decode_text(self._tokenizer, list(ids))]
                right.append(self._task.grade(problem, texts, pool)[0].correct)
        return right
