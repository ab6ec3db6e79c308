"""One session on a CUDA machine: kernel tests, kernel benchmark, decoding benchmark, one record.

``make gpu`` or ``python -m deliberate.kernels.gpu_session``. Each step is a process with its own
time limit, so that the whole ends in under nine minutes; a step that fails or runs over is recorded
as such and the next one runs. Written: ``OUT/gpu-DATE.json`` and ``OUT/gpu-DATE.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

TAIL_LINES = 12


@dataclass(frozen=True)
class Step:
    """A command and the seconds it may take."""

    name: str
    command: tuple[str, ...]
    limit: float


@dataclass(frozen=True)
class Outcome:
    """What a step did: "ok", "failed (status)" or "over time", its seconds and last lines."""

    name: str
    result: str
    seconds: float
    tail: str


def steps(scratch: Path, tests: Sequence[str]) -> tuple[Step, ...]:
    """The session's steps; figures are left in ``scratch``. Limits sum to under nine minutes."""
    python = sys.executable
    decode = ("bench", "decode", "prompts=12", "warmup=2", f"out={scratch / 'decode.json'}")
    return (
        Step("kernel tests", (python, "-m", "pytest", "-p", "no:cacheprovider", *tests), 240),
        Step(
            "kernel benchmark",
            (
                python,
                "-m",
                "deliberate.kernels.bench",
                "--tiles",
                "--out",
                str(scratch / "kernels"),
            ),
            170,
        ),
        Step(
            "decoding benchmark",
            (python, "-c", "from deliberate.cli import main; main()", *decode),
            110,
        ),
    )


def run(step: Step) -> Outcome:
    """Runs a step, shows what it prints, and keeps the last lines."""
    print(f"== {step.name} (at most {step.limit:.0f} s)", flush=True)
    began = time.monotonic()
    try:
        done = subprocess.run(
            step.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=step.limit,
        )
        output = done.stdout
        result = "ok" if done.returncode == 0 else f"failed ({done.returncode})"
    except subprocess.TimeoutExpired as error:
        given = error.stdout or b""
        output = given.decode(errors="replace") if isinstance(given, bytes) else given
        result = "over time"
    print(output, flush=True)
    tail = "\n".join(output.strip().splitlines()[-TAIL_LINES:])
    return Outcome(step.name, result, round(time.monotonic() - began, 1), tail)


def record(outcomes: Sequence[Outcome], scratch: Path, device: str) -> tuple[dict[str, Any], str]:
    """(figures for JSON, Markdown) of a session whose steps left their files in ``scratch``."""
    figures: dict[str, Any] = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": device,
        "steps": [asdict(one) for one in outcomes],
    }
    for name in ("kernels", "decode"):
        path = scratch / f"{name}.json"
        figures[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    text = [f"# GPU session, {device}, {figures['created']}", ""]
    text += ["| step | result | seconds | last line |", "|---|---|---|---|"]
    for one in outcomes:
        last = one.tail.splitlines()[-1].replace("|", "/") if one.tail else ""
        text.append(f"| {one.name} | {one.result} | {one.seconds} | {last} |")
    if figures["decode"] is not None:
        text += ["", "## Decoding, ms per token", "", "| variant | median | P90 |", "|---|---|---|"]
        for name, row in figures["decode"].get("variants", {}).items():
            spread = row["ms_per_token"]
            text.append(f"| {name} | {spread['median']:.2f} | {spread['p90']:.2f} |")
    written = scratch / "kernels.md"
    if written.is_file():
        text += ["", written.read_text(encoding="utf-8").replace("\n# ", "\n## ").strip()]
    return figures, "\n".join(text) + "\n"


def main(given: Sequence[str] | None = None) -> int:
    """Runs the session; status 1 where a step did not end well, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reports"), help="folder to write to")
    parser.add_argument("--tests", nargs="*", default=None, help="test files of the kernels")
    parser.add_argument("--without-gpu", action="store_true", help="try the script on a CPU")
    arguments = parser.parse_args(given)
    if not torch.cuda.is_available() and not arguments.without_gpu:
        print(
            "no CUDA device: `make gpu` is for a machine with one; `make test` runs the same "
            "kernels in the interpreter, `python -m deliberate.kernels.bench` measures this CPU",
            file=sys.stderr,
        )
        return 2
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    tests = arguments.tests
    if tests is None:
        tests = [str(path) for path in sorted(Path("tests").glob("test_kernel_*.py"))]
    from deliberate.storage import write_text

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        outcomes = [run(step) for step in steps(scratch, tests)]
        figures, text = record(outcomes, scratch, device)
    name = "gpu-" + time.strftime("%Y-%m-%d-%H%M")
    write_text(arguments.out / f"{name}.json", json.dumps(figures, indent=1) + "\n")
    write_text(arguments.out / f"{name}.md", text)
    print(text)
    return 0 if all(one.result == "ok" for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
