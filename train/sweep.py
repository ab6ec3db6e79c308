"""A sweep's folder: it is not overwritten, the same command resumes it, failed jobs are named."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from deliberate.train.overrides import settings_of
from deliberate.train.resume import CHANGED, check_same_run, is_free
from deliberate.utils.errors import DeliberateError
from deliberate.utils.file_lock import LOCK_NAME
from deliberate.utils.files import write_text
from deliberate.utils.json_files import read
from deliberate.utils.training_record import RECORD_NAME

SWEEP_NAME = "sweep.json"
FAILURE_NAME = "failed.json"


@dataclass(frozen=True)
class Plan:
    """Content of ``sweep.json``: the overrides of the command, sorted."""

    overrides: list[str]


@dataclass(frozen=True)
class Failure:
    """Content of ``failed.json`` in a job's folder.

    Attributes:
        job: its number and settings.
        overrides: all of them.
        error: the first line of the error.
    """

    job: str
    overrides: list[str]
    error: str


@dataclass(frozen=True)
class Progress:
    """How many steps a run has done, by its `run.json`."""

    steps: int
    interrupted: bool


def begin(folder: Path, arguments: Sequence[str], resume: bool | str) -> None:
    """Refuses a folder with another sweep; else records this one in ``sweep.json``.

    Args:
        resume: False for a new sweep, True for the same one, ``changed`` for any.

    Raises:
        DeliberateError: the folder holds a sweep, and `resume` does not fit.
    """
    if folder.exists() and not folder.is_dir():
        raise DeliberateError(f"output_dir={folder} is a file: give a folder")
    wanted = sorted(text for text in settings_of(arguments) if not is_free(_key(text)))
    path = folder / SWEEP_NAME
    jobs = [p for p in folder.glob("*") if p.is_dir() and p.name.isdigit()]
    # A sweep of which no job started to train may be corrected and started again.
    started = any(p.name not in (FAILURE_NAME, LOCK_NAME) for job in jobs for p in job.iterdir())
    if not started:
        for job in jobs:
            (job / FAILURE_NAME).unlink(missing_ok=True)
    elif not resume:
        raise DeliberateError(
            f"output_dir={folder} already holds a sweep: add resume=true to resume it, or "
            "choose another"
        )
    elif resume is True and path.exists():
        before = read(Plan, path).overrides
        if before != wanted:
            raise DeliberateError(
                f"output_dir={folder} holds another sweep ({' '.join(before)}): give those "
                "settings, choose another output_dir, or say resume=changed"
            )
    write_text(path, json.dumps({"overrides": wanted}, indent=1) + "\n")


def finished(cfg: DictConfig) -> bool:
    """Whether a job's folder holds its whole run already.

    Raises:
        DeliberateError: it holds a run of other settings.
    """
    folder = Path(cfg.output_dir)
    if not (folder / RECORD_NAME).is_file():
        return False
    record = read(Progress, folder / RECORD_NAME, others="ignore", finite=False)
    done = not record.interrupted and record.steps >= cfg.trainer.max_steps
    return done and cfg.resume != CHANGED and not check_same_run(cfg, folder)


@dataclass
class Jobs:
    """Runs the jobs of a sweep; a job that fails does not end the others.

    Attributes:
        swept: keys of the settings that differ between the jobs, which name them.
        failed: a line for each failed job.
        count: jobs so far.
    """

    swept: frozenset[str] = frozenset()
    failed: list[str] = field(default_factory=list)
    count: int = 0

    def run(self, cfg: DictConfig, overrides: Sequence[str], work: Callable[[], object]) -> object:
        """The result of `work`, or None where the job was finished before, or failed."""
        folder = Path(cfg.output_dir)
        own = [text for text in overrides if text.partition("=")[0] in self.swept]
        name = f"job {folder.name} ({' '.join(own) or 'as it is'})"
        self.count += 1
        print(f"\n{name}", flush=True)
        try:
            if cfg.resume and finished(cfg):
                print(f"job {folder.name} is finished: skipped", flush=True)
                return None
            result = work()
        except Exception as error:
            if not isinstance(error, DeliberateError):
                traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            kind = "" if isinstance(error, DeliberateError) else f"{type(error).__name__}: "
            text = kind + lines[0]
            print(f"error: {name}: {text}", file=sys.stderr, flush=True)
            self.failed.append(f"{name}: {text}")
            failure = Failure(name, list(overrides), text)
            write_text(folder / FAILURE_NAME, json.dumps(vars(failure), indent=1) + "\n")
            return None
        (folder / FAILURE_NAME).unlink(missing_ok=True)
        return result

    def check(self, folder: Path) -> None:
        """Ends a sweep.

        Raises:
            DeliberateError: jobs failed; the line names them.
        """
        if self.failed:
            raise DeliberateError(
                f"{len(self.failed)} of {self.count} jobs failed in {folder}: "
                f"{'; '.join(self.failed)}; the same command with resume=true tries them again"
            )


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
