"""An evaluation run as it is recorded: its identity, its sessions, its result and notes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from deliberate.eval.runner.answer_notes import answer_notes
from deliberate.eval.runner.departures import departure_text
from deliberate.eval.runner.guarantee_check import not_covered
from deliberate.eval.runner.model_names import model_name
from deliberate.eval.runner.outcomes import Departure, ProblemRecord
from deliberate.eval.runner.partial_file import PartialFile
from deliberate.eval.runner.results import EvaluationResult
from deliberate.eval.runner.runner import Runner, model_info
from deliberate.eval.runner.summary import summarise
from deliberate.kernels.backends import describe
from deliberate.utils.environment import load_average
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hashing import json_sha256
from deliberate.utils.json_records import decode, encode

# A load above this before the run, or this far above the run's own threads after it, is somebody
# else's work on the same cores.
FOREIGN_LOAD = 0.75
# Settings that say where data and results are, or how many help with them, not what is measured.
_INCIDENTAL = ("out", "data", "graders")
# What a certificate and a budget depend on.
_CALIBRATED = ("certified", "budget")


@dataclass
class Session:
    """A stretch of a run that was not interrupted.

    Attributes:
        began: ISO time.
        problems: done in it.
        load: of the machine when it began.
    """

    began: str
    problems: int = 0
    load: Any = None


class RunRecord:
    """What is recorded of a run besides its problems.

    Args:
        cfg: of `deliberate eval`.
        runner: with model and task.
        device: of the model.
        apart: notes on problems that were passed over.

    Attributes:
        load: of the machine, before and after.
        warmup_seconds: of this session.
        sessions: of the run, this one last.
    """

    def __init__(
        self,
        cfg: DictConfig,
        runner: Runner,
        device: torch.device,
        apart: Sequence[str] = (),
    ) -> None:
        self._apart = list(apart)
        self._runner, self._threads = runner, int(cfg.threads)
        self._name = model_name(cfg.model)
        self._model = model_info(runner.model, self._name)
        self._config = _recorded_config(cfg, runner)
        self._environment = describe() | {
            "device": str(device),
            "dtype": str(cfg.dtype),
            "executor": runner.model.executor,
        }
        self.load: dict[str, Any] = {"before": load_average(), "after": None}
        self.warmup_seconds = 0.0
        self.sessions = [Session(_now())]

    def identity(self) -> dict[str, Any]:
        """All that the records of the run depend on: equal for two halves of one run."""
        model = self._runner.model
        calibrated = set(_CALIBRATED) & set(self._runner.settings.modes)
        calibration = model.calibration if calibrated else None
        facts = ("cpu", "device", "executor", "versions")
        return {
            **{key: value for key, value in self._config.items() if key not in _INCIDENTAL},
            "sha256": self._model["sha256"],
            "calibration": None if calibration is None else json_sha256(calibration.to_dict()),
            "problems": self._runner.task.data_sha256,
            **{f"environment.{name}": self._environment.get(name) for name in facts},
        }

    def session(self) -> dict[str, Any]:
        """This session, for the partial file."""
        return {"began": self.sessions[-1].began, "load": self.load["before"]}

    def result(
        self,
        records: Sequence[ProblemRecord],
        broken: Sequence[Departure],
        *,
        stopped: bool = False,
    ) -> EvaluationResult:
        """The run as `results.json` has it; one that was `stopped` says that it is partial."""
        runner = self._runner
        notes = _notes(runner, broken, self.load, self._threads)
        if stopped:
            notes.insert(
                0,
                f"Partial: {len(records)} of {len(runner.task.problems)} problems, the first of "
                "the run; it was stopped and can go on.",
            )
        modes = summarise(records, num_layers=runner.model.backbone.num_layers)
        certified = runner.guarantees.certified_info()
        notes += self._session_notes() + self._weights_notes() + self._apart
        notes += answer_notes(modes, runner.task, certified)
        return EvaluationResult(
            name=f"{self._name} on {runner.task.name}" + (" (partial)" if stopped else ""),
            created=_now(),
            task={
                "name": runner.task.name,
                "split": runner.task.split,
                "data_sha256": runner.task.data_sha256,
                "problems": len(records),
            },
            model=self._model,
            config=self._config,
            config_sha256=_config_sha256(self._config),
            environment=self._environment,
            load={"before": self.load["before"], "after": self.load["after"]},
            warmup_seconds=self.warmup_seconds,
            modes=modes,
            notes=notes,
            certified=certified,
            budget=runner.guarantees.budget_info(),
            departures=list(broken) or None,
        )

    def _weights_notes(self) -> list[str]:
        """That the slow baseline computes otherwise, where its tokens are bound to differ."""
        weights = str(self._config.get("weights", "float"))
        if weights in ("float", "native") or "transformers" not in self._runner.settings.modes:
            return []
        return [
            f"weights={weights} are rounded for this project's kernels, which every mode but "
            "transformers' own runs by: its tokens can differ from those of dense."
        ]

    def _session_notes(self) -> list[str]:
        done = [session for session in self.sessions if session.problems]
        if len(done) < 2:
            return []
        parts = "; ".join(
            f"{session.problems} problems from {session.began}"
            + ("" if not session.load else f" at load {session.load[0]}")
            for session in done
        )
        return [
            f"The run was interrupted and went on: {parts}. Modes are compared within each "
            "problem; estimates of exact mode and of the budget's controller began anew."
        ]


def take_up(partial: PartialFile, runner: Runner, made: RunRecord) -> list[ProblemRecord]:
    """The records of earlier sessions; their state and the sessions are taken over too.

    Raises:
        DeliberateError: the file is damaged.
    """
    records: list[ProblemRecord] = []
    sessions: list[Session] = []
    state: dict[str, Any] = {}
    for number, line in enumerate(partial.lines, start=2):
        where = f"{partial.path} line {number}"
        if "session" in line:
            began = line["session"]
            if not isinstance(began, Mapping) or not isinstance(began.get("began"), str):
                raise DeliberateError(f"{where} is damaged: resume=false starts anew")
            sessions.append(Session(began["began"], load=began.get("load")))
        elif "record" in line and sessions:
            records.append(decode(ProblemRecord, encode(line["record"]), where))
            sessions[-1].problems += 1
            state = {key: value for key, value in line.items() if key != "record"}
        else:
            raise DeliberateError(f"{where} is damaged: resume=false starts anew")
    known = {problem.id for problem in runner.task.problems}
    if len({record.id for record in records} & known) < len(records):
        raise DeliberateError(f"{partial.path} holds other problems: resume=false starts anew")
    runner.guarantees.restore(state)
    made.sessions = [*sessions, *made.sessions]
    return records


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _recorded_config(cfg: DictConfig, runner: Runner) -> dict[str, Any]:
    """The configuration with what was in force instead of "the model's own" and "auto"."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    exits = runner.model.exit_config
    if runner.settings.thresholds is not None:
        exits = exits.with_thresholds(runner.settings.thresholds)
    del config["resume"]  # how the run came about is in its notes
    return config | {
        "modes": list(runner.settings.modes),
        "fidelity": None,
        "thresholds": exits.to_dict()["thresholds"],
        "exit_settings": exits.to_dict(),
        "chat": "always" if runner.chat else "never",
        "task": config["task"] | {"style": runner.task.style},
    }


def _config_sha256(config: dict[str, Any]) -> str:
    """Hash of what determines the figures: where they are written does not."""
    hashed = {key: value for key, value in config.items() if key != "out"}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def _notes(
    runner: Runner, broken: Sequence[Departure], load: dict[str, Any], threads: int
) -> list[str]:
    notes: list[str] = []
    if runner.unfit:
        notes.append(
            f"Prompts that fill the model's context: {len(runner.unfit)} of "
            f"{len(runner.task.problems)}. Nothing was generated for them, and they count as wrong "
            "in every mode."
        )
    if runner.cramped:
        notes.append(
            f"Prompts with less room behind them in the context than max_new_tokens = "
            f"{runner.task.max_new_tokens}: {runner.cramped}. Their answers may be cut off."
        )
    notes += _guarantee_notes(runner)
    if runner.settings.max_running is not None:
        notes.append(
            f"Each mode decoded {runner.settings.max_running} problems at a time: a time is an "
            "answer's share of the passes that it was in, and a speed is one of throughput."
        )
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


def _guarantee_notes(runner: Runner) -> list[str]:
    notes = []
    certified, guarantees = runner.guarantees.certified_info(), runner.guarantees
    if certified is not None:
        notes += not_covered(certified.departures)
    if certified is not None and certified.alarm:
        notes.append(
            f"The certificate expired during the run: {certified.disagreements} of "
            f"{certified.tokens} tokens re-evaluated at full depth disagree, where it allows "
            f"{certified.limit:.2%}. Certified mode ran no problem after that."
        )
    if guarantees.refused:
        notes.append(
            f"The budget was refused before decoding on {guarantees.refused} of "
            f"{len(runner.task.problems)} problems, where nothing could have met it: they are in "
            "no figure of budget mode."
        )
    return notes
