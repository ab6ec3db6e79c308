"""Traces that a calibration works on: dense answers recorded just now, or a stored recording."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.collect import record_sequences
from deliberate.calibration.conditions import PROMPT_ENDS
from deliberate.calibration.exit_traces import Recording, join_recordings
from deliberate.calibration.fingerprint import base_sha256, exits_sha256
from deliberate.engine.spec import DecodingSpec
from deliberate.eval.calibrate.certify import Traces
from deliberate.eval.calibrate.progress import stage
from deliberate.eval.runner.batched import decode_answers
from deliberate.eval.runner.partial_file import AnswerLog, PartialFile
from deliberate.eval.tasks.calibration_overlap import QUESTIONS, question_keys
from deliberate.eval.tasks.prompts import PROMPT_TEXT, form_ends, prompt_encoder, run_conditions
from deliberate.eval.tasks.task import Task
from deliberate.kernels.backends import describe
from deliberate.policies.guarantee_settings import decoding_conditions
from deliberate.utils.errors import DeliberateError

RECORDING_NAME = "recording.npz"
PARTIAL_FILE = "answers.partial.jsonl"
# Where parts of an unfinished recording are, and their size in answers.
PARTS_FOLDER, PART_SEQUENCES = "recording-parts", 64
# Settings that say where things are and who helps, not what is decoded.
_INCIDENTAL = ("out", "data", "graders", "resume")


def open_partial(cfg: DictConfig, model: AdaptiveModel, task: Task, out: Path) -> PartialFile:
    """Where the answers of a calibration with these settings are kept until it is complete."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    settings = {key: value for key, value in config.items() if key not in _INCIDENTAL}
    settings |= {
        "weights": base_sha256(model),
        "exits": exits_sha256(model),
        "problems": task.data_sha256,
        "versions": describe()["versions"],
    }
    return PartialFile(out / PARTIAL_FILE, settings, cfg.resume)


def record_answers(
    cfg: DictConfig,
    model: AdaptiveModel,
    task: Task,
    out: Path,
    partial: PartialFile,
    *,
    progress: bool,
) -> Traces:
    """Full-depth answers to the task's problems, and their record at every exit, kept in `out`.

    Answers that `partial` holds are not decoded again, and a recording of this very run that `out`
    holds is not made again.
    """
    tokenizer = checkpoint.load_tokenizer(str(cfg.model))
    context = model.backbone.max_positions
    encoder = prompt_encoder(cfg, tokenizer, max_tokens=context or 1 << 30, template=task.template)
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
        log=AnswerLog(partial, "full depth"),
    )
    weights, exits = base_sha256(model), exits_sha256(model)
    limit = task.max_new_tokens
    conditions = run_conditions(
        encoder,
        task=task.name,
        max_new_tokens=limit,
        dtype=model.base.dtype,
        grading=task.style,
    )
    conditions |= decoding_conditions(model, DecodingSpec(), max_new_tokens=limit)
    conditions[PROMPT_ENDS] = form_ends(encoder, prompts)
    recording = _kept_recording(out, partial)
    if recording is None:
        meta = {
            "weights": weights,
            "exits": exits,
            "data": task.data_sha256,
            QUESTIONS: question_keys(task.problems),
            "run": partial.sha256,
            "task": task.name,
            "split": task.split,
            "conditions": conditions,
            "left_out": left_out,
            "seed": cfg.seed,
            "model": str(cfg.model),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": describe()["versions"],
        }
        with stage("what the exits say of them", len(prompts), progress) as bar:
            recording = _recorded(
                model,
                [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
                [len(prompt) for prompt in prompts],
                out / PARTS_FOLDER,
                run=partial.sha256,
                groups=[problem.subject or task.name for problem in task.problems],
                meta=meta,
                note=bar.done,
            )
        recording.save(out / RECORDING_NAME)
        shutil.rmtree(out / PARTS_FOLDER, ignore_errors=True)
    return Traces(
        recording,
        weights,
        exits,
        task.data_sha256,
        task,
        tuple(prompts),
        tuple(answers),
        conditions,
        partial,
    )


def _recorded(
    model: AdaptiveModel,
    sequences: Sequence[Sequence[int]],
    lengths: Sequence[int],
    parts: Path,
    *,
    run: str,
    groups: Sequence[str],
    meta: dict[str, Any],
    note: Callable[[int], None],
) -> Recording:
    """As `record_sequences`, in parts that a repeated run of the same hash need not record again.

    Args:
        parts: folder where they are kept.
        run: hash of the run's settings.
    """
    made, counts = [], []
    for start in range(0, len(sequences), PART_SEQUENCES):
        rows = slice(start, start + PART_SEQUENCES)
        count, path = len(sequences[rows]), parts / f"{start}.npz"
        part = _of_run(path, run)
        if part is None:
            part = record_sequences(
                model, sequences[rows], lengths[rows], meta={"run": run}, note=note
            )
            part.save(path)
        else:
            note(count)
        made.append(part)
        counts.append(count)
    return join_recordings(made, counts, meta=meta, groups=groups)


def _kept_recording(out: Path, partial: PartialFile) -> Recording | None:
    """The recording that an interrupted run with the same settings had finished, if it had."""
    return _of_run(out / RECORDING_NAME, partial.sha256) if partial.lines else None


def _of_run(path: Path, run: str) -> Recording | None:
    """The recording in a file, if a run of this hash wrote it."""
    if not path.is_file():
        return None
    try:
        found = Recording.load(path)
    except DeliberateError:
        return None
    return found if found.meta.get("run") == run else None


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
