"""Traces that a calibration works on: dense answers recorded just now, or a stored recording."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from omegaconf import DictConfig

from deliberate import storage
from deliberate.environment import describe
from deliberate.errors import DeliberateError
from deliberate.eval.apart import QUESTIONS, question_keys
from deliberate.eval.asking import PROMPT_TEXT, asking_encoder, run_conditions
from deliberate.eval.batched import decode_answers
from deliberate.eval.certify import Traces
from deliberate.eval.tasks import Task
from deliberate.fingerprint import base_sha256, exits_sha256
from deliberate.model import AdaptiveModel
from deliberate.recorder import record_sequences
from deliberate.recording import Recording

RECORDING_NAME = "recording.npz"


def record_answers(
    cfg: DictConfig, model: AdaptiveModel, task: Task, out: Path, *, progress: bool
) -> Traces:
    """Dense answers to the task's problems, and what the exits say of them; kept in `out`."""
    tokenizer = storage.load_tokenizer(str(cfg.model))
    context = model.backbone.max_positions
    encoder = asking_encoder(cfg, tokenizer, max_tokens=context or 1 << 30, template=task.template)
    prompts = [tuple(encoder.prompt(problem.question)) for problem in task.problems]
    room = (context or 1 << 30) - task.max_new_tokens
    fitting = [row for row, prompt in enumerate(prompts) if len(prompt) <= room]
    if not fitting:
        raise DeliberateError(
            f"no problem of {task.name!r} leaves room for task.max_new_tokens="
            f"{task.max_new_tokens} in the context of {context}: lower it"
        )
    left_out = len(prompts) - len(fitting)
    task = replace(task, problems=tuple(task.problems[row] for row in fitting))
    prompts = [prompts[row] for row in fitting]
    answers = decode_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens=task.max_new_tokens,
        batch=cfg.batch,
        title="dense answers" if progress else None,
    )
    weights, exits = base_sha256(model), exits_sha256(model)
    conditions = run_conditions(
        encoder, task=task.name, max_new_tokens=task.max_new_tokens, dtype=model.base.dtype
    )
    recording = record_sequences(
        model,
        [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
        [len(prompt) for prompt in prompts],
        groups=[problem.subject or task.name for problem in task.problems],
        meta={
            "weights": weights,
            "exits": exits,
            "data": task.data_sha256,
            QUESTIONS: question_keys(task.problems),
            "task": task.name,
            "split": task.split,
            "conditions": conditions,
            "left_out": left_out,
            "seed": cfg.seed,
            "model": str(cfg.model),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": describe()["versions"],
        },
    )
    out.mkdir(parents=True, exist_ok=True)
    recording.save(out / RECORDING_NAME)
    return Traces(
        recording,
        weights,
        exits,
        task.data_sha256,
        task,
        tuple(prompts),
        tuple(answers),
        conditions,
    )


def stored_answers(recording: Recording, model: AdaptiveModel | None) -> Traces:
    """A stored recording's traces, if they are the model's."""
    meta = recording.meta
    weights, exits = str(meta.get("weights", "")), str(meta.get("exits", ""))
    if model is not None:
        for name, stated, loaded in (
            ("weights", weights, base_sha256(model)),
            ("exits", exits, exits_sha256(model)),
        ):
            if stated != loaded:
                raise DeliberateError(
                    f"the recording is of other {name} ({stated[:12] or 'none'} stated, "
                    f"{loaded[:12]} loaded): record again, or use costs=layers without the model"
                )
    # The recording says how its questions were put; the settings of this command had no part in it.
    unknown = {"task": meta.get("task"), PROMPT_TEXT: None, "max_new_tokens": None, "dtype": None}
    conditions = meta.get("conditions", unknown)
    if not isinstance(conditions, dict):
        raise DeliberateError("the recording's conditions are no object: record again")
    return Traces(recording, weights, exits, str(meta.get("data", "")), conditions=conditions)
