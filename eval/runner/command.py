"""The commands eval, demo and report: from a configuration to a folder of results."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import DictConfig, ListConfig
from tqdm import tqdm

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.eval.grading.graders import GraderPool
from deliberate.eval.report.page import write_report
from deliberate.eval.runner.departures import departure_text, departures, with_gaps
from deliberate.eval.runner.guarantee_check import as_run_budget
from deliberate.eval.runner.outcomes import Departure, ProblemRecord
from deliberate.eval.runner.partial_file import PartialFile, check_resume
from deliberate.eval.runner.results import (
    PARTIAL_FILE,
    EvaluationResult,
    read_results,
    write_results,
)
from deliberate.eval.runner.run_record import RunRecord, take_up
from deliberate.eval.runner.runner import Runner, RunSettings
from deliberate.eval.runner.summary import DEFAULT_MODES
from deliberate.eval.tasks.calibration_overlap import set_apart
from deliberate.eval.tasks.registry import command_task
from deliberate.utils.environment import load_average
from deliberate.utils.errors import DeliberateError, Interrupted
from deliberate.utils.folders import output_folder

__all__ = ["Interrupted", "departure_text", "evaluate", "rebuild_report"]

PARTIAL_REPORT = "report.partial.html"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Evaluation:
    """A finished run: where it was written and whether exact mode met its guarantee."""

    result: EvaluationResult
    report: Path
    broken: list[Departure]


def evaluate(cfg: DictConfig, *, progress: bool = True) -> Evaluation:
    """Runs an evaluation and writes `results.json`, `problems.jsonl` and `report.html`.

    Whatever the folder held stays until the run is complete; meanwhile each finished problem is
    appended to `problems.partial.jsonl` there, and a run with the same settings goes on from it.

    Raises:
        DeliberateError: the configuration, the data or the model cannot work; nothing has been
            written then.
        Interrupted: Ctrl-C while problems were running; `report.partial.html` shows those done.
    """
    settings = _settings(cfg)
    check_resume(cfg.resume)
    device = choose_device(cfg)
    out = output_folder(cfg.out)
    pool = GraderPool(cfg.graders.processes, time_limit=cfg.graders.time_limit)
    task = command_task(cfg)
    model = AdaptiveModel.from_pretrained(
        str(cfg.model), dtype=cfg.dtype, executor=str(cfg.executor), weights=str(cfg.weights)
    ).to(device)
    if cfg.calibration is not None:
        model.set_calibration(Path(str(cfg.calibration)).expanduser())
    apart: list[str] = []
    if {"certified", "budget"} & set(settings.modes):
        task, apart = set_apart(
            task, model.calibration, lambda some: command_task(cfg, excluded=some)
        )
    tokenizer = checkpoint.load_tokenizer(str(cfg.model))
    runner = Runner(model, tokenizer, task, settings)
    with thread_count(cfg.threads), pool:
        made = RunRecord(cfg, runner, device, apart)
        made.warmup_seconds = runner.warm_up()
        with PartialFile(out / PARTIAL_FILE, made.identity(), cfg.resume) as partial:
            records = _collect(runner, pool, partial, made, out, progress=progress)
            made.load["after"] = load_average()
            broken = with_gaps(runner, records, departures(records))
            result = made.result(records, broken)
            write_results(out, result, records)
            path = write_report(out, [(result, records)])
            partial.remove()
    (out / PARTIAL_REPORT).unlink(missing_ok=True)
    return Evaluation(result, path, broken)


def rebuild_report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the report of one run in place, or the comparison of several.

    Raises:
        DeliberateError: a folder without results, or with damaged ones.
    """
    runs = [read_results(folder) for folder in folders]
    if len(runs) == 1:
        return write_report(output_folder(out or folders[0]), runs)
    names = [result.name for result, _ in runs]
    if len(set(names)) < len(names):
        runs = [
            (replace(result, name=f"{result.name} ({folder})"), records)
            for (result, records), folder in zip(runs, folders, strict=True)
        ]
    return write_report(output_folder(out or "reports/compare"), runs)


def _collect(
    runner: Runner,
    pool: GraderPool,
    partial: PartialFile,
    made: RunRecord,
    out: Path,
    *,
    progress: bool,
) -> list[ProblemRecord]:
    """All records, each appended to the partial file as soon as it is there."""
    records = take_up(partial, runner, made)
    count = len(runner.task.problems)
    if partial.notice:
        print(partial.notice, file=sys.stderr)
    if records:
        print(f"going on after {len(records)} of {count} problems", file=sys.stderr)
    correct: dict[str, list[bool]] = {}
    hidden = None if progress else True
    bar = tqdm(total=count, initial=len(records), desc=runner.task.name, disable=hidden)
    for record in records:
        _tell(correct, record)
    partial.append({"session": made.session()})
    try:
        with bar:
            for record in runner.records(pool, list(records)):
                partial.append({"record": record} | runner.guarantees.state())
                records.append(record)
                made.sessions[-1].problems += 1
                bar.set_postfix_str(_tell(correct, record), refresh=False)
                bar.update()
    except KeyboardInterrupt:
        if not records:
            partial.remove()
            raise
        made.load["after"] = load_average()
        result = made.result(records, departures(records), stopped=True)
        page = write_report(out, [(result, records)], name=PARTIAL_REPORT)
        raise Interrupted(
            f"interrupted: {len(records)} of {count} problems are in {partial.path}, and the same "
            f"command goes on from there; a report of them: {page}"
        ) from None
    order = {problem.id: place for place, problem in enumerate(runner.task.problems)}
    return sorted(records, key=lambda record: order[record.id])


def _tell(correct: dict[str, list[bool]], record: ProblemRecord) -> str:
    """Accuracy so far, with this record counted."""
    for mode, outcome in record.modes.items():
        correct.setdefault(mode, []).append(outcome.correct)
    return ", ".join(f"{m} {100 * sum(c) / len(c):.1f}%" for m, c in correct.items())


def _settings(cfg: DictConfig) -> RunSettings:
    """The checked run settings; every other plain value of the configuration is checked too."""
    whole = {"threads": cfg.threads, "graders.processes": cfg.graders.processes}
    if cfg.limit is not None:
        whole["limit"] = cfg.limit
    for name, value in whole.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DeliberateError(f"{name}={value} must be a whole number of at least 1")
    if not isinstance(cfg.graders.time_limit, int | float) or cfg.graders.time_limit <= 0:
        raise DeliberateError(
            f"graders.time_limit={cfg.graders.time_limit} must be above 0 seconds"
        )
    if cfg.dtype not in DTYPES:
        raise DeliberateError(f"dtype={cfg.dtype} is not one of {', '.join(DTYPES)}")
    name = "modes" if cfg.fidelity is None else "fidelity"
    if cfg.fidelity is not None and tuple(cfg.modes) != DEFAULT_MODES:
        raise DeliberateError("modes and fidelity are two names of one setting: give one of them")
    modes = cfg[name]
    if not isinstance(modes, ListConfig):
        raise DeliberateError(f"{name}={modes} must be a list: {name}=[dense,exact]")
    thresholds = cfg.thresholds
    if isinstance(thresholds, ListConfig):
        thresholds = tuple(thresholds)
    for value in thresholds if isinstance(thresholds, tuple) else (thresholds,):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise DeliberateError(
                f"thresholds={cfg.thresholds} must be a number in (0, 1], or a list of them"
            )
    return RunSettings(
        modes=tuple(str(mode) for mode in modes),
        thresholds=thresholds,
        warmup=cfg.warmup,
        transformers_limit=cfg.transformers_limit,
        risk=str(cfg.risk),
        epsilon=cfg.epsilon,
        delta=cfg.delta,
        budget=as_run_budget(
            cfg.budget.ms_per_token, cfg.budget.deadline_ms, cfg.budget.tier, cfg.budget.tiers
        ),
        chat=str(cfg.chat),
        system=None if cfg.system is None else str(cfg.system),
        strict=cfg.strict,
        max_running=cfg.max_running,
    )


def choose_device(cfg: DictConfig) -> torch.device:
    name = str(cfg.device)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeliberateError(f"device={name} is not one of auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeliberateError(
            f"device={name}: this machine has {torch.cuda.device_count()} CUDA device(s)"
        )
    return device


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
