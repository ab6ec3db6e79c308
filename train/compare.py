"""One table over the runs of a sweep: every job, and seeds of the same settings together."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from deliberate.train.sweep import FAILURE_NAME, Failure
from deliberate.utils.files import write_text
from deliberate.utils.json_files import read
from deliberate.utils.training_record import RECORD_NAME, JobRecord

TABLE_NAME = "comparison.md"
DATA_NAME = "comparison.json"
_SEED = "seed="
# Of the records' last log lines, in this order where they are there.
_FIRST = ("loss", "speed_at_99")


@dataclass(frozen=True)
class Job:
    """One finished run of a sweep.

    Attributes:
        name: its folder in the sweep.
        settings: its overrides that differ between the jobs, the seed left out.
        seed: of the run.
        figures: of its last log line, and ``seconds``.
    """

    name: str
    settings: str
    seed: int
    figures: Mapping[str, float]


def read_jobs(sweep: Path) -> list[Job]:
    """The runs in a sweep's folder that have a record, in the order of their numbers."""
    found = [p for p in sweep.glob(f"*/{RECORD_NAME}") if p.parent.name.isdigit()]
    records = []
    for path in sorted(found, key=lambda p: int(p.parent.name)):
        records.append((path.parent.name, read(JobRecord, path, others="ignore", finite=False)))
    overrides = [set(record.overrides) for _, record in records]
    shared = set.intersection(*overrides) if overrides else set()
    jobs = []
    for (name, record), own in zip(records, overrides, strict=True):
        differing = [o for o in record.overrides if o in own - shared]
        settings = " ".join(o for o in differing if not o.startswith(_SEED))
        jobs.append(Job(name, settings or "(as it is)", record.seed, _last(record)))
    return jobs


def read_failures(sweep: Path) -> list[str]:
    """A line for each job that failed and was not run again since."""
    found = [p for p in sweep.glob(f"*/{FAILURE_NAME}") if p.parent.name.isdigit()]
    failures = [read(Failure, p) for p in sorted(found, key=lambda p: int(p.parent.name))]
    return [f"{failure.job}: {failure.error}" for failure in failures]


def _last(record: JobRecord) -> dict[str, float]:
    lines = [line for line in record.history if "loss" in line]
    figures: dict[str, float] = {"seconds": record.seconds}
    # Exits that were not trained at the last line keep their last figure.
    for line in lines:
        kept = {
            n: v
            for n, v in line.items()
            if ("/" in n or n in _FIRST) and isinstance(v, int | float)
        }
        figures |= {name: float(value) for name, value in kept.items()}
    return figures


def summarise(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """A row for each setting: number of seeds, mean and standard deviation of every figure."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.settings, []).append(job)
    rows = []
    for settings, members in groups.items():
        shared = set.intersection(*(set(job.figures) for job in members))
        means = {n: statistics.fmean(j.figures[n] for j in members) for n in sorted(shared)}
        spread = {
            n: statistics.stdev([j.figures[n] for j in members]) if len(members) > 1 else None
            for n in sorted(shared)
        }
        rows.append(
            {
                "settings": settings,
                "seeds": [job.seed for job in members],
                "mean": means,
                "standard_deviation": spread,
            }
        )
    return rows


def table(jobs: Sequence[Job]) -> str:
    """Markdown: one row per job, then one per setting with mean ± standard deviation over seeds."""
    names = sorted({name for job in jobs for name in job.figures})
    exits = [n for n in names if n.startswith(("loss/", "agree/")) and "hit" not in n]
    columns = [*(n for n in _FIRST if n in names), *exits, "seconds"]
    lines = [_line(["job", "settings", "seed", *columns]), _line(["---"] * (len(columns) + 3))]
    for job in jobs:
        cells = [_cell(job.figures.get(n)) for n in columns]
        lines.append(_line([job.name, job.settings, str(job.seed), *cells]))
    lines += ["", _line(["settings", "seeds", *columns]), _line(["---"] * (len(columns) + 2))]
    for row in summarise(jobs):
        cells = [
            _cell(row["mean"].get(n))
            + (
                f" ± {_cell(row['standard_deviation'][n])}"
                if len(row["seeds"]) > 1 and n in row["mean"]
                else ""
            )
            for n in columns
        ]
        lines.append(_line([row["settings"], str(len(row["seeds"])), *cells]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def write_comparison(sweep: Path) -> str | None:
    """Writes ``comparison.md`` and ``comparison.json`` into the sweep's folder; the table's text.

    Failed jobs are listed below it. None where no job has a record.
    """
    jobs, failed = read_jobs(sweep), read_failures(sweep)
    if not jobs and not failed:
        return None
    text = table(jobs) + "".join(f"\nfailed: {line}\n" for line in failed)
    write_text(sweep / TABLE_NAME, text)
    data = {
        "jobs": [vars(job) for job in jobs],
        "settings": summarise(jobs),
        "failed": failed,
    }
    write_text(sweep / DATA_NAME, json.dumps(data, indent=1) + "\n")
    return text


class CompareRuns(Callback):
    """Hydra's callback that ends a sweep with its table."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints and writes the table."""
        sweep = Path(config.hydra.sweep.dir)
        text = write_comparison(sweep)
        if text is not None:
            print(f"\n{text}\ncomparison: {sweep / TABLE_NAME}", flush=True)
