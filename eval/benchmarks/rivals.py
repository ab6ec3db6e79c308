"""`deliberate bench rivals`: one model, ours and what people use today, on the same weights.

Every library at every precision and number of threads has a process of its own, which is loaded
before anything is measured. All of them answer a prompt before the next prompt, in rotating order,
each once with all tokens and once with one, so that decoding alone is known; then a long prompt's
pass is timed in the same way. A rival that is not there or fails is named.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from deliberate.api import checkpoint
from deliberate.data.sources import load_problems
from deliberate.eval.benchmarks.harness import Session, interleaved, stop_if_inexact, table_console
from deliberate.eval.benchmarks.rival_figures import Answers, Variant, picture, report, show
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.tasks.prompts import prompt_encoder
from deliberate.utils.checks import all_at_least, one_of
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text
from deliberate.utils.json_files import parse_json

# Systems of each library, and the precisions at which it has the model's weights.
SYSTEMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "dense": ("ours", ("float32", "bfloat16", "int8", "4 bit")),
    "exact lookup": ("ours", ("float32", "bfloat16", "int8", "4 bit")),
    "exact layer": ("ours", ("float32", "bfloat16", "int8", "4 bit")),
    "exact int4": ("ours", ("float32", "bfloat16", "int8")),
    "transformers": ("transformers", ("float32", "bfloat16")),
    "transformers lookup": ("transformers", ("float32", "bfloat16")),
    "transformers early exit": ("transformers", ("float32", "bfloat16")),
    "llama.cpp": ("llama.cpp", ("4 bit",)),
    "llama.cpp lookup": ("llama.cpp", ("4 bit",)),
}
PRECISIONS = ("float32", "bfloat16", "int8", "4 bit")
_ROOM = 64


class Rival(Protocol):
    """Answers requests of `deliberate.eval.benchmarks.rival_process`."""

    missing: str | None

    def ask(self, **request: Any) -> dict[str, Any]: ...

    def close(self) -> None: ...


class RivalProcess:
    """A process of its own, whose threads do not spin between its turns for long.

    Attributes:
        missing: why there is none, in one line; None where it is ready.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        threads = str(given["threads"])
        environment = os.environ | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
        }
        # A rival has its library's own way to wait: asleep at once, llama.cpp's threads take 3.5
        # times as long here with two. Our kernels have threads of their own.
        environment.pop("OMP_WAIT_POLICY", None)
        if given["library"] == "ours":
            environment["OMP_WAIT_POLICY"] = "passive"
        self._process = subprocess.Popen(
            [sys.executable, "-m", rival_module(), json.dumps(dict(given))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.missing: str | None = None
        self.missing = self._read().get("missing")

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer to one request; ``failed`` where it has none."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            return {"failed": f"its process ended with status {self._process.wait()}"}
        found = self._read()
        return {"failed": found["missing"]} if "missing" in found else found

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            return {"missing": f"its process ended with status {self._process.wait()}"}
        found: dict[str, Any] = parse_json(line, "a rival's process", finite=False)
        return found


def rival_module() -> str:
    """The module that a rival's process runs."""
    return "deliberate.eval.benchmarks.rival_process"


@dataclass
class Field:
    """The rivals of a run.

    Attributes:
        of: the rival of each variant.
        absent: why variants are not measured, by name.
    """

    of: dict[Variant, Rival] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def close(self) -> None:
        for rival in {id(one): one for one in self.of.values()}.values():
            rival.close()


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench rivals`` with overrides of `configs/bench_rivals.yaml`.

    Raises:
        DeliberateError: the configuration cannot work, nothing can be measured, or exact mode's
            tokens differ from dense.
    """
    cfg = bench_config("bench_rivals", arguments, verbatim=("model", "draft", "out"), folder=True)
    _check(cfg)
    session = Session("rivals", arguments, 1)
    prompts, long = prompts_of(cfg)
    rivals = start(cfg, max(map(len, [*prompts, long])))
    try:
        if not rivals.of:
            raise DeliberateError("no rival can run: " + "; ".join(rivals.absent.values()))
        answers = measure(rivals, prompts, long, cfg)
    finally:
        rivals.close()
    session.end()
    figures = report(answers, rivals.absent, cfg.seed)
    console = table_console(140)
    show(figures, console)
    console.print(session.line(), highlight=False)
    if cfg.out is not None:
        folder = Path(str(cfg.out))
        session.write(folder / "rivals.json", {"settings": OmegaConf.to_container(cfg), **figures})
        write_text(folder / "rivals.svg", picture(figures) + "\n")
    for row in figures["variants"]:
        if row["system"].startswith("exact") and row.get("same_as") == "dense":
            name = f"prompts by {row['variant']}"
            stop_if_inexact(row["same"], row["prompts"], name)


def start(cfg: DictConfig, longest: int) -> Field:
    """Starts and loads the processes of all variants, one after another."""
    source = checkpoint.resolve(str(cfg.model))
    file = source if checkpoint.is_gguf(source) else None
    found = Field()
    for threads in cfg.threads:
        for precision in cfg.precisions:
            groups: dict[str, list[str]] = {}
            for system in cfg.systems:
                library, has = SYSTEMS[system]
                if system == "exact layer" and cfg.draft is None:
                    found.absent[system] = f"{system}: draft=null"
                elif precision not in has:
                    pass
                elif library == "llama.cpp":  # its lookup belongs to the loaded model
                    groups[system] = [system]
                else:
                    groups.setdefault(library, []).append(system)
            for systems in groups.values():
                rival = RivalProcess(
                    {
                        "library": SYSTEMS[systems[0]][0],
                        "systems": systems,
                        "model": str(cfg.model),
                        "draft": None if cfg.draft is None else str(cfg.draft),
                        "file": file,
                        "executor": str(cfg.executor),
                        "rotate": bool(cfg.rotate),
                        "precision": precision,
                        "threads": int(threads),
                        "context": longest + cfg.answer_tokens + _ROOM,
                        "lookup_tokens": cfg.lookup_tokens,
                        "early_exit_layer": cfg.early_exit_layer,
                    }
                )
                if rival.missing is not None:
                    for system in systems:
                        found.absent[system] = f"{system} is left out: {rival.missing}"
                    rival.close()
                    continue
                for system in systems:
                    found.of[Variant(system, str(precision), int(threads))] = rival
    return found


def measure(
    rivals: Field, prompts: Sequence[Sequence[int]], long: Sequence[int], cfg: DictConfig
) -> dict[Variant, Answers]:
    """All prompts by all variants, then the long one; a variant that failed is not asked again."""
    made = {variant: Answers() for variant in rivals.of}
    every = [(prompt, int(cfg.answer_tokens)) for prompt in prompts]
    for turn, (prompt, new), variant in interleaved(
        every, list(made), warmup=cfg.warmup, title="bench rivals"
    ):
        own = made[variant]
        if own.failure is None:
            found = rivals.of[variant].ask(system=variant.system, prompt=list(prompt), new=new)
            own.add(found, new, counted=turn.counted)
        if own.failure is None:
            found = rivals.of[variant].ask(system=variant.system, prompt=list(prompt), new=1)
            own.add_first(found, counted=turn.counted)
    rounds = [long] * (1 + cfg.prefill_rounds)
    for turn, prompt, variant in interleaved(rounds, list(made), warmup=1, title="prompt pass"):
        own = made[variant]
        if own.failure is None and variant.system in ("dense", "transformers", "llama.cpp"):
            found = rivals.of[variant].ask(system=variant.system, prompt=list(prompt), new=1)
            own.add_prefill(found, counted=turn.counted)
    for variant, own in made.items():
        if own.failure is None:
            found = rivals.of[variant].ask(memory=True)
            own.memory = found["bytes"] - found["before"]
    return made


def prompts_of(cfg: DictConfig) -> tuple[list[list[int]], list[int]]:
    """Prompts of GSM8K's test questions, and one of `prefill_tokens` tokens of their text."""
    tokenizer = checkpoint.load_tokenizer(str(cfg.model))
    encoder = prompt_encoder(cfg, tokenizer, max_tokens=10**6)
    data = None if cfg.data.dir is None else str(cfg.data.dir)
    problems = load_problems("gsm8k", "test", data_dir=data, hub=cfg.data.hub)
    count = cfg.prompts + cfg.warmup
    if len(problems) < count:
        raise DeliberateError(
            f"prompts={cfg.prompts} and warmup={cfg.warmup}: there are {len(problems)} questions"
        )
    prompts = [list(encoder.prompt(problem.question)) for problem in problems[:count]]
    long: list[int] = []
    for problem in problems:
        if len(long) >= cfg.prefill_tokens:
            break
        long += encoder.prompt(problem.question)
    return prompts, long[: cfg.prefill_tokens]


def _check(cfg: DictConfig) -> None:
    for name, known in (("systems", SYSTEMS), ("precisions", PRECISIONS)):
        for value in cfg[name]:
            one_of(name, value, known)
    for name in ("systems", "precisions", "threads"):
        if not cfg[name] or len(set(cfg[name])) < len(cfg[name]):
            raise DeliberateError(f"{name}={list(cfg[name])} must name at least one, each once")
    if cfg.rotate and set(cfg.systems) - {"dense", "exact lookup", "exact int4"}:
        raise DeliberateError(
            "rotate=true is of our own dense, exact lookup and exact int4: give systems=[...] of "
            "these"
        )
    if cfg.rotate and "4 bit" in cfg.precisions:
        raise DeliberateError("rotate=true turns float weights: leave 4 bit out of precisions")
    for threads in cfg.threads:
        if type(threads) is not int or threads < 1:
            raise DeliberateError(f"threads={threads} must be a whole number of at least 1")
    least = {"prompts": 1, "warmup": 0, "answer_tokens": 2, "prefill_tokens": 1}
    all_at_least(cfg, least | {"prefill_rounds": 1, "lookup_tokens": 1})
