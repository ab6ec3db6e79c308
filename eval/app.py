"""The commands eval, demo and report: from a configuration to a folder of results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from tqdm import tqdm

from deliberate import storage
from deliberate.environment import describe, load_average
from deliberate.errors import DeliberateError
from deliberate.eval.apart import set_apart
from deliberate.eval.codec import encode
from deliberate.eval.graders import GraderPool
from deliberate.eval.outcomes import ProblemRecord
from deliberate.eval.promise_check import as_run_budget, not_covered
from deliberate.eval.report import write_report
from deliberate.eval.results import EvaluationResult, read_results, write_results
from deliberate.eval.runner import Departure, Runner, RunSettings, departures, model_info
from deliberate.eval.summary import DEFAULT_MODES, summarise
from deliberate.eval.tasks import Task, build_task
from deliberate.folders import output_folder
from deliberate.model import AdaptiveModel

PARTIAL_FILE = "problems.partial.jsonl"
DTYPES = ("float32", "bfloat16", "float16")
# A load above this before the run, or this far above the run's own threads after it, is somebody
# else's work on the same cores.
FOREIGN_LOAD = 0.75


class Interrupted(Exception):
    """The run was stopped from outside; the message says what was kept."""


@dataclass(frozen=True)
class Evaluation:
    """A finished run: where it was written and whether exact mode kept its promise."""

    result: EvaluationResult
    report: Path
    broken: list[Departure]


def evaluate(cfg: DictConfig, *, progress: bool = True) -> Evaluation:
    """Runs an evaluation and writes `results.json`, `problems.jsonl` and `report.html`.

    Whatever the folder held stays until the run is complete; meanwhile each finished problem is
    appended to `problems.partial.jsonl` there.

    Raises:
        DeliberateError: the configuration, the data or the model cannot work; nothing has been
            written then.
        Interrupted: Ctrl-C while problems were running.
    """
    settings = _settings(cfg)
    device = choose_device(cfg)
    out = output_folder(cfg.out)
    pool = GraderPool(cfg.graders.processes, time_limit=cfg.graders.time_limit)
    task_cfg: Any = OmegaConf.to_container(cfg.task, resolve=True)
    data_dir = None if cfg.data.dir is None else str(Path(str(cfg.data.dir)).expanduser())
    build = partial(
        build_task, task_cfg, seed=cfg.seed, limit=cfg.limit, data_dir=data_dir, hub=cfg.data.hub
    )
    task = build()
    model = AdaptiveModel.from_pretrained(
        str(cfg.model), dtype=cfg.dtype, executor=str(cfg.executor)
    ).to(device)
    if cfg.calibration is not None:
        model.set_calibration(Path(str(cfg.calibration)).expanduser())
    apart: list[str] = []
    if {"certified", "budget"} & set(settings.modes):
        task, apart = set_apart(task, model.calibration, lambda some: build(excluded=some))
    tokenizer = storage.load_tokenizer(str(cfg.model))
    runner = Runner(model, tokenizer, task, settings)
    with thread_count(cfg.threads), pool:
        before = load_average()
        environment = describe() | {
            "device": str(device),
            "dtype": str(cfg.dtype),
            "executor": model.executor,
        }
        warmup = runner.warm_up()
        records = _collect(runner, task, pool, out, progress=progress)
        load = {"before": before, "after": load_average()}
    broken = departures(records)
    config = _recorded_config(cfg, runner)
    name = Path(str(cfg.model)).name
    result = EvaluationResult(
        name=f"{name} on {task.name}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        task={
            "name": task.name,
            "split": task.split,
            "data_sha256": task.data_sha256,
            "problems": len(records),
        },
        model=model_info(model, name),
        config=config,
        config_sha256=_config_sha256(config),
        environment=environment,
        load={"before": load["before"], "after": load["after"]},
        warmup_seconds=warmup,
        modes=summarise(records, num_layers=model.backbone.num_layers),
        notes=[*_notes(runner, broken, load, cfg.threads), *apart],
        certified=runner.promises.certified_info(),
        budget=runner.promises.budget_info(),
    )
    write_results(out, result, records)
    path = write_report(out, [(result, records)])
    (out / PARTIAL_FILE).unlink(missing_ok=True)
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
    runner: Runner, task: Task, pool: GraderPool, out: Path, *, progress: bool
) -> list[ProblemRecord]:
    """All records, each appended to the partial file as soon as it is there."""
    records: list[ProblemRecord] = []
    out.mkdir(parents=True, exist_ok=True)
    partial = out / PARTIAL_FILE
    correct: dict[str, list[bool]] = {}
    bar = tqdm(total=len(task.problems), desc=task.name, disable=None if progress else True)
    try:
        with partial.open("w", encoding="utf-8") as file, bar:
            for record in runner.records(pool):
                file.write(encode(record) + "\n")
                file.flush()
                records.append(record)
                for mode, outcome in record.modes.items():
                    correct.setdefault(mode, []).append(outcome.correct)
                bar.set_postfix_str(
                    ", ".join(f"{m} {100 * sum(c) / len(c):.1f}%" for m, c in correct.items()),
                    refresh=False,
                )
                bar.update()
    except KeyboardInterrupt:
        if not records:
            partial.unlink(missing_ok=True)
            raise
        raise Interrupted(
            f"interrupted: {len(records)} of {len(task.problems)} problems are in {partial}; "
            "no report was written"
        ) from None
    return records


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


def _recorded_config(cfg: DictConfig, runner: Runner) -> dict[str, Any]:
    """The configuration with what was in force instead of "the model's own" and "auto"."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    exits = runner.model.exit_config
    if runner.settings.thresholds is not None:
        exits = exits.with_thresholds(runner.settings.thresholds)
    return config | {
        "modes": list(runner.settings.modes),
        "fidelity": None,
        "thresholds": list(exits.thresholds),
        "exit_settings": exits.to_dict(),
        "chat": "always" if runner.chat else "never",
    }


def _config_sha256(config: dict[str, Any]) -> str:
    """Hash of what determines the figures: where they are written does not."""
    hashed = {key: value for key, value in config.items() if key != "out"}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def _notes(
    runner: Runner, broken: Sequence[Departure], load: dict[str, Any], threads: int
) -> list[str]:
    notes = []
    if runner.unfit:
        notes.append(
            f"Prompts that fill the model's context: {len(runner.unfit)} of "
            f"{len(runner.task.problems)}. Nothing was generated for them, and they count as wrong "
            "in every mode."
        )
    if runner.cramped:
        notes.append(
            f"Prompts that leave less room in the context than max_new_tokens = "
            f"{runner.task.max_new_tokens}: {runner.cramped}. Their answers may be cut off."
        )
    notes += _promise_notes(runner)
    limit = runner.settings.transformers_limit
    if limit is not None and "transformers" in runner.settings.modes:
        notes.append(f"transformers ran on the first {limit} problems only.")
    if broken:
        notes.append(departure_text(broken))
    for when, own in (("before", 0), ("after", threads)):
        if load[when] and load[when][0] > own + FOREIGN_LOAD:
            notes.append(
                f"The machine was not idle: load {load['before'][0]} before the run, "
                f"{load['after'][0]} after it, with {threads} thread(s) of its own. Times are "
                "those of a shared machine."
            )
            break
    return notes


def _promise_notes(runner: Runner) -> list[str]:
    notes = []
    certified, promises = runner.promises.certified_info(), runner.promises
    if certified is not None:
        notes += not_covered(certified.departures)
    if certified is not None and certified.alarm:
        notes.append(
            f"The certificate expired during the run: {certified.disagreements} of "
            f"{certified.tokens} tokens seen again at full depth disagree, where it allows "
            f"{certified.limit:.2%}. Certified mode ran no problem after that."
        )
    if promises.refused:
        notes.append(
            f"The budget was refused before decoding on {promises.refused} of "
            f"{len(runner.task.problems)} problems, where nothing could have met it: they are in "
            "no figure of budget mode."
        )
    return notes


def departure_text(broken: Sequence[Departure]) -> str:
    """Where exact mode was not exact, in one sentence."""
    places = ", ".join(f"{d.problem} at token {d.position}" for d in broken[:3])
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return f"exact departs from dense in {places}{more}: its promise is broken."
