"""One session on a CUDA machine: tests, kernel and decoding benchmarks, one record to keep.

``make gpu`` or ``python -m deliberate.kernels.tools.gpu_session``. Each step is a process with its
own time limit, so that the whole ends in under nine minutes; a step that fails, runs over or lacks
a package is recorded as such and the next one runs. Written: ``OUT/gpu-DATE.json`` and
``OUT/gpu-DATE.md``. ``--smollm2 FOLDER`` (or DELIBERATE_SMOLLM2) adds the steps of a real model
(`deliberate.kernels.tools.real_steps`), ``--steps NAME,NAME`` chooses among all.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deliberate.kernels.tools.real_steps import VARIABLE, Step, real_steps
from deliberate.utils.command_errors import one_line_errors
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import read_json

TAIL_LINES = 12
# Of what a step printed, kept in the JSON: enough for the tracebacks of several tests.
OUTPUT_CHARACTERS = 40_000
# Test files, below tests/, that run compiled kernels and captured graphs on a GPU. Those of the C++
# kernels (test_native*) need none.
TESTS = ("kernels/test_[!n]*.py", "executors/test_fused_cuda*.py")
# A few of them, to try the script without a GPU.
FEW_TESTS = ("kernels/test_kernel_registry.py", "kernels/test_add_rmsnorm.py")


@dataclass(frozen=True)
class Outcome:
    """What a step did.

    Attributes:
        result: "ok", "failed (status)", "over time" or "skipped".
        seconds: it took.
        tail: its last lines, or why it was skipped.
        output: the end of everything it printed.
    """

    name: str
    result: str
    seconds: float
    tail: str
    output: str = ""


def steps(scratch: Path, tests: Sequence[str], *, toy: bool = False) -> tuple[Step, ...]:
    """The session's steps; figures are left in ``scratch``. Limits sum to under nine minutes.

    Args:
        toy: sizes that show that the script works, for a machine without a GPU.
    """
    python = sys.executable
    workers: tuple[str, ...] = (
        ("-n", "8") if not toy and importlib.util.find_spec("xdist") is not None else ()
    )
    kernels: tuple[str, ...] = ("--tiles", "--seconds", "130")
    decode: tuple[str, ...] = ("--size", "0.5b", "--seconds", "80")
    bundled: tuple[str, ...] = ("prompts=12", "warmup=2")
    if toy:
        kernels = ("--model", "tiny", "--samples", "2", "--seconds", "30")
        decode = ("--size", "tiny", "--tokens", "9", "--prompt", "8", "--rounds", "2")
        bundled = ("prompts=2", "warmup=1", "max_new_tokens=16", "suites=[single]")
    bundled += (f"out={scratch / 'bundled.json'}",)
    return (
        Step(
            "tests",
            (python, "-m", "pytest", "-p", "no:cacheprovider", "-q", *workers, *tests),
            190,
            ("pytest", "hypothesis"),
        ),
        Step(
            "kernel benchmark",
            (
                python,
                "-m",
                "deliberate.kernels.tools.bench",
                *kernels,
                "--out",
                str(scratch / "kernels"),
            ),
            150,
        ),
        Step(
            "decoding benchmark",
            (
                python,
                "-m",
                "deliberate.kernels.tools.decode_bench",
                *decode,
                "--out",
                str(scratch / "decode"),
            ),
            120,
            ("transformers", "scipy"),
        ),
        Step(
            "bundled model",
            (
                python,
                "-c",
                "from deliberate.cli.app import main; main()",
                "bench",
                "decode",
                *bundled,
            ),
            70,
            ("hydra", "omegaconf", "typer", "reasoning_gym"),
        ),
    )


def chosen_steps(every: Sequence[Step], names: str | None) -> tuple[Step, ...]:
    """The steps that are named, in the session's order; all of them for None.

    Raises:
        DeliberateError: a name that no step has.
    """
    if names is None:
        return tuple(every)
    wanted = [name.strip() for name in names.split(",")]
    known = [step.name for step in every]
    for name in wanted:
        if name not in known:
            raise DeliberateError(f"--steps {name!r} is unknown: one of {', '.join(known)}")
    return tuple(step for step in every if step.name in wanted)


def find_tests(patterns: Sequence[str], folder: Path) -> list[str]:
    """The test files below `folder` that the patterns name.

    Raises:
        DeliberateError: a pattern names none: pytest would then run every test there is.
    """
    found: list[str] = []
    for pattern in patterns:
        paths = sorted(folder.glob(pattern))
        if not paths:
            raise DeliberateError(
                f"no {folder / pattern}: run from the project's folder, or give --tests FILE ..."
            )
        found += map(str, paths)
    return found


def missing(step: Step) -> list[str]:
    """Packages that a step needs and this Python lacks."""
    return [name for name in step.needs if importlib.util.find_spec(name) is None]


def run(step: Step) -> Outcome:
    """Runs a step, shows what it prints, and keeps the last lines."""
    lacking = missing(step)
    if lacking:
        reason = f"needs {', '.join(lacking)}, which this Python lacks"
        print(f"== {step.name}: skipped: {reason}", flush=True)
        return Outcome(step.name, "skipped", 0.0, reason)
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
    seconds = round(time.monotonic() - began, 1)
    return Outcome(step.name, result, seconds, tail, output[-OUTPUT_CHARACTERS:])


def _saved(path: Path) -> Any:
    """What a step's bench saved; its error where a step was cut off while it wrote."""
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except DeliberateError as error:
        return {"error": str(error)}


def record(outcomes: Sequence[Outcome], scratch: Path, device: str) -> tuple[dict[str, Any], str]:
    """(figures for JSON, Markdown) of a session whose steps left their files in ``scratch``."""
    figures: dict[str, Any] = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": device,
        "steps": [asdict(one) for one in outcomes],
    }
    for name in ("decode", "kernels", "bundled"):
        path = scratch / f"{name}.json"
        figures[name] = _saved(path)
    text = [f"# GPU session, {device}, {figures['created']}", ""]
    text += ["| step | result | seconds | last line |", "|---|---|---|---|"]
    for one in outcomes:
        last = one.tail.splitlines()[-1].replace("|", "/") if one.tail else ""
        text.append(f"| {one.name} | {one.result} | {one.seconds} | {last} |")
    for name, suite in (figures["bundled"] or {}).get("suites", {}).items():
        text += ["", f"## Bundled model, {name}, ms per token", ""]
        text += ["| variant | median | P90 |", "|---|---|---|"]
        for variant, row in suite["variants"].items():
            spread = row["ms_per_token"]
            text.append(f"| {variant} | {spread['median']:.2f} | {spread['p90']:.2f} |")
    for name in ("decode", "kernels"):
        written = scratch / f"{name}.md"
        if written.is_file():
            whole = "\n" + written.read_text(encoding="utf-8")
            text += ["", whole.replace("\n## ", "\n### ").replace("\n# ", "\n## ").strip()]
    return figures, "\n".join(text) + "\n"


def main(given: Sequence[str] | None = None) -> int:
    """Runs the session; status 1 where a step did not end well, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reports"), help="folder to write to")
    parser.add_argument("--tests", nargs="*", default=None, help="test files of the kernels")
    parser.add_argument(
        "--without-gpu", action="store_true", help="try the script on a CPU, with toy sizes"
    )
    parser.add_argument("--steps", help="names of the steps to run, with commas; default all")
    parser.add_argument(
        "--smollm2",
        type=Path,
        default=os.environ.get(VARIABLE),
        help="folder of SmolLM2-135M-Instruct: adds its steps",
    )
    parser.add_argument("--draft", type=Path, help="folder of its draft layer; default the bundled")
    parser.add_argument("--questions", type=Path, help="JSON list that text is written for")
    parser.add_argument("--prompts", type=Path, help="JSON list of questions that are timed")
    arguments = parser.parse_args(given)
    if not torch.cuda.is_available() and not arguments.without_gpu:
        print(
            "no CUDA device: `make gpu` is for a machine with one; `make test` runs the same "
            "kernels in the interpreter, `python -m deliberate.kernels.tools.bench` measures "
            "this CPU",
            file=sys.stderr,
        )
        return 2
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    tests = arguments.tests
    toy = arguments.without_gpu
    if tests is None:
        tests = find_tests(FEW_TESTS if arguments.without_gpu else TESTS, Path("tests"))
    from deliberate.utils.files import write_text

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        every = steps(scratch, tests, toy=toy)
        if arguments.smollm2 is not None:
            every += real_steps(
                arguments.smollm2, arguments.out, draft=arguments.draft,
                questions=arguments.questions, prompts=arguments.prompts, toy=toy,
            )  # fmt: skip
        outcomes = [run(step) for step in chosen_steps(every, arguments.steps)]
        figures, text = record(outcomes, scratch, device)
    name = "gpu-" + time.strftime("%Y-%m-%d-%H%M")
    write_text(arguments.out / f"{name}.json", json.dumps(figures, indent=1) + "\n")
    write_text(arguments.out / f"{name}.md", text)
    print(text)
    return 0 if all(one.result in ("ok", "skipped") for one in outcomes) else 1


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
