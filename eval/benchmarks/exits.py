"""`deliberate bench exits`: how good each exit is where every token is chosen there.

The model cut off after the exit, so to speak: the prompt goes through all layers and gives the
first token, every later token is the exit's, and no layer above it is run. Answers are greedy and
decoded in batches; time has no part in these figures. With a baseline, the state before training,
both answer the same problems and are compared pair by pair.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.table import Table

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.data.prompts import Encoder
from deliberate.eval.benchmarks.harness import UNBOUNDED, Session, table_console
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.grading.graders import GraderPool
from deliberate.eval.report import numbers
from deliberate.eval.report.detokenize import decode_text
from deliberate.eval.runner.batched import decode_answers
from deliberate.eval.runner.command import DTYPES, choose_device
from deliberate.eval.statistics import (
    Interval,
    PairedAccuracy,
    paired_accuracy,
    wilson_interval,
)
from deliberate.eval.tasks.prompts import prompt_encoder
from deliberate.eval.tasks.registry import VERBATIM, command_task
from deliberate.eval.tasks.task import Task
from deliberate.utils.checks import all_at_least, one_of
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text
from deliberate.utils.json_files import build, read, read_text


@dataclass(frozen=True)
class DepthAccuracy:
    """Answers with every token chosen after `layer` layers.

    Attributes:
        truncated: answers that met the length limit.
        versus_last: against the model's own last layer; None for that itself.
        versus_baseline: against the baseline at the same depth, where there is one.
    """

    layer: int
    total: int
    correct: int
    interval: Interval
    tokens: int
    truncated: int
    versus_last: PairedAccuracy | None
    versus_baseline: PairedAccuracy | None


@dataclass(frozen=True)
class Answered:
    """Answers of one model at one depth."""

    texts: tuple[str, ...]
    correct: tuple[bool, ...]
    tokens: int
    truncated: int


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench exits`` with overrides of `configs/bench_exits.yaml`.

    Raises:
        DeliberateError: settings that cannot work; nothing has been written then.
    """
    cfg = bench_config("bench_exits", arguments, verbatim=(*VERBATIM, "baseline"))
    _check(cfg)
    device = choose_device(cfg)
    session = Session("exits", arguments, cfg.threads)
    task = command_task(cfg)
    found: dict[str, dict[int, Answered]] = {}
    names = {"model": str(cfg.model)}
    if cfg.baseline is not None and str(cfg.baseline).endswith(".json"):
        found["baseline"] = earlier(Path(str(cfg.baseline)).expanduser(), task)
    elif cfg.baseline is not None:
        names = {"baseline": str(cfg.baseline)} | names
    models = {
        label: AdaptiveModel.from_pretrained(name, dtype=cfg.dtype, executor=str(cfg.executor)).to(
            device
        )
        for label, name in names.items()
    }
    depths = {label: _depths(cfg, model, names[label]) for label, model in models.items()}
    pool = GraderPool(cfg.graders.processes, time_limit=cfg.graders.time_limit)
    with pool:
        for label, model in models.items():
            tokenizer = checkpoint.load_tokenizer(names[label])
            encoder = prompt_encoder(cfg, tokenizer, max_tokens=UNBOUNDED, template=task.template)
            found[label] = {
                layer: answer(model, encoder, task, layer, pool, batch=cfg.batch)
                for layer in depths[label]
            }
    session.end()
    names = {label: str(cfg[label]) for label in found}
    rows = {
        label: summarise(own, found.get("baseline") if label == "model" else None)
        for label, own in found.items()
    }
    for label, name in names.items():
        _show(f"{label}: {name} on {len(task.problems)} of {task.name}", rows[label])
    if cfg.out is not None:
        _write(cfg, session, task, names, rows, found)


def answer(
    model: AdaptiveModel, encoder: Encoder, task: Task, layer: int, pool: GraderPool, *, batch: int
) -> Answered:
    """Greedy answers with every token but the first chosen after `layer` layers, and their grades.

    A problem whose prompt fills the context counts as answered wrongly.

    Args:
        layer: an exit of the model, or its number of layers.
    """
    prompts = [tuple(encoder.prompt(problem.question)) for problem in task.problems]
    context = model.backbone.max_positions or UNBOUNDED
    fitting = [row for row, prompt in enumerate(prompts) if len(prompt) < context]
    exits = model.exit_config
    thresholds = None
    if layer != model.backbone.num_layers:
        thresholds = [0.0 if own == layer else math.inf for own in exits.layers]
    # Nothing is to be forced through the layers above: as many may wait as are generated.
    model.set_exit_config(dataclasses.replace(exits, max_pending=task.max_new_tokens))
    try:
        made = decode_answers(
            model,
            encoder.tokenizer,
            [prompts[row] for row in fitting],
            max_new_tokens=task.max_new_tokens,
            batch=batch,
            thresholds=thresholds,
            title=f"{task.name}, layer {layer}",
        )
    finally:
        model.set_exit_config(exits)
    texts = [""] * len(prompts)
    for row, tokens in zip(fitting, made, strict=True):
        texts[row] = decode_text(encoder.tokenizer, tokens)
    correct = [
        task.grade(problem, [text], pool)[0].correct
        for problem, text in zip(task.problems, texts, strict=True)
    ]
    return Answered(
        texts=tuple(texts),
        correct=tuple(correct),
        tokens=sum(map(len, made)),
        truncated=sum(len(tokens) == task.max_new_tokens for tokens in made),
    )


@dataclass(frozen=True)
class _SavedDepth:
    layer: int
    tokens: int
    truncated: int


@dataclass(frozen=True)
class _SavedModel:
    depths: tuple[_SavedDepth, ...]


@dataclass(frozen=True)
class _SavedModels:
    model: _SavedModel


@dataclass(frozen=True)
class _Saved:
    """The part of an earlier run's file that a comparison needs."""

    models: _SavedModels


@dataclass(frozen=True)
class _SavedAnswer:
    text: str
    correct: bool


@dataclass(frozen=True)
class _SavedRow:
    """A line of the file beside it: answers of ``model`` by layer."""

    id: str
    model: Mapping[str, _SavedAnswer]


def earlier(path: Path, task: Task) -> dict[int, Answered]:
    """The model's answers that an earlier run wrote, if it answered the same problems.

    Args:
        path: the ``out`` of that run.

    Raises:
        DeliberateError: files that are missing, are not of this command, or of other problems.
    """
    try:
        depths = read(_Saved, path, others="ignore").models.model.depths
        beside = path.with_suffix(".jsonl")
        rows = {}
        for number, line in enumerate(read_text(beside).splitlines(), start=1):
            row = build(_SavedRow, line, f"{beside} line {number}", others="ignore")
            rows[row.id] = row.model
            for depth in depths:
                if str(depth.layer) not in row.model:
                    raise DeliberateError(f"{beside} line {number}: no answer at {depth.layer}")
    except DeliberateError as error:
        raise DeliberateError(
            f"baseline={path} was not written by bench exits, or is damaged: {error}"
        ) from None
    if [*rows] != [problem.id for problem in task.problems]:
        raise DeliberateError(
            f"baseline={path} answers other problems: give the same task, seed and limit"
        )
    return {
        depth.layer: Answered(
            texts=tuple(row[str(depth.layer)].text for row in rows.values()),
            correct=tuple(row[str(depth.layer)].correct for row in rows.values()),
            tokens=depth.tokens,
            truncated=depth.truncated,
        )
        for depth in depths
    }


def summarise(
    own: Mapping[int, Answered], baseline: Mapping[int, Answered] | None
) -> tuple[DepthAccuracy, ...]:
    """Accuracy of every depth, against the deepest one and against a baseline."""
    last = max(own)
    rows = []
    for layer, answered in sorted(own.items()):
        other = None if baseline is None else baseline.get(layer)
        rows.append(
            DepthAccuracy(
                layer=layer,
                total=len(answered.correct),
                correct=sum(answered.correct),
                interval=wilson_interval(sum(answered.correct), len(answered.correct)),
                tokens=answered.tokens,
                truncated=answered.truncated,
                versus_last=None if layer == last else paired(answered, own[last]),
                versus_baseline=None if other is None else paired(answered, other),
            )
        )
    return tuple(rows)


def paired(one: Answered, other: Answered) -> PairedAccuracy:
    """The difference of two accuracies on the same problems."""
    return paired_accuracy(one.correct, other.correct)


def _depths(cfg: DictConfig, model: AdaptiveModel, name: str) -> list[int]:
    """Exit layers to choose at, then the last layer."""
    exits = model.exit_config.layers
    wanted = list(exits) if cfg.layers is None else list(cfg.layers)
    for layer in wanted:
        if layer not in exits:
            raise DeliberateError(
                f"layers={wanted}: {name} has no exit after layer {layer}, only after "
                f"{', '.join(map(str, exits))}"
            )
    return [*wanted, model.backbone.num_layers]


def _check(cfg: DictConfig) -> None:
    all_at_least(cfg, {"batch": 1, "threads": 1, "graders.processes": 1})
    if cfg.layers is not None and not isinstance(cfg.layers, ListConfig):
        raise DeliberateError(f"layers={cfg.layers} must be a list of exit layers: layers=[2,4]")
    one_of("dtype", cfg.dtype, DTYPES)


def _show(title: str, rows: Sequence[DepthAccuracy]) -> None:
    console = table_console(140)
    table = Table(title=title, title_justify="left")
    heads = ("layers", "correct", "accuracy [95 %]", "tokens", "cut off", "points over the last")
    compares = any(row.versus_baseline is not None for row in rows)
    for head in (*heads, *(("points over the baseline",) if compares else ())):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        cells = [
            str(row.layer),
            f"{row.correct} of {row.total}",
            f"{numbers.percent(row.correct / row.total)} {numbers.percent_interval(row.interval)}",
            f"{row.tokens / row.total:.0f}",
            str(row.truncated),
            _points(row.versus_last),
        ]
        table.add_row(*cells, *([_points(row.versus_baseline)] if compares else []))
    console.print(table)


def _points(found: PairedAccuracy | None) -> str:
    if found is None:
        return "–"
    return (
        f"{numbers.signed_points(found.difference)} {numbers.points_interval(found.interval)}, "
        f"{numbers.p_value(found.mcnemar.p)}"
    )


def _write(
    cfg: DictConfig,
    session: Session,
    task: Task,
    names: Mapping[str, str],
    rows: Mapping[str, Sequence[DepthAccuracy]],
    found: Mapping[str, Mapping[int, Answered]],
) -> None:
    out = Path(str(cfg.out)).expanduser()
    record = {
        "task": {"name": task.name, "split": task.split, "data_sha256": task.data_sha256},
        "problems": len(task.problems),
        "models": {
            label: {"name": name, "depths": [asdict(row) for row in rows[label]]}
            for label, name in names.items()
        },
        "config": OmegaConf.to_container(cfg, resolve=True),
    }
    lines = []
    for row, problem in enumerate(task.problems):
        answers = {
            label: {
                str(layer): {"text": one.texts[row], "correct": one.correct[row]}
                for layer, one in own.items()
            }
            for label, own in found.items()
        }
        line = {"id": problem.id, "answer": problem.answer} | answers
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(out.with_suffix(".jsonl"), "".join(lines))
    session.write(out, record)
