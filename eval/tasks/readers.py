"""Where a task's problems come from: the readers that a task's YAML names.

A reader is a function of the task's settings and a `ReadRequest` that yields `Problem`s in the
order in which they are run. ``reader:`` of a task's YAML is a name of `READERS`, or the dotted path
of a function in an importable module (``my_package.my_module.read``).
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deliberate.data import seeds
from deliberate.data.chains import chain_problems
from deliberate.data.problem import Problem
from deliberate.data.sources import (
    EVALUATION_ONLY,
    data_root,
    file_rows,
    hub_rows,
    load_problems,
    load_reasoning_gym,
)
from deliberate.data.word_problems import MAX_STEPS, MIN_STEPS, split_of, word_problems
from deliberate.utils.checks import at_least
from deliberate.utils.errors import DeliberateError

DATA_SETS = ("gsm8k", "math", "math500")
TRAIN_ONLY = ("mawps", "asdiv_a")
COLUMNS = ("question", "answer", "id", "solution", "difficulty", "subject")
_REQUIRED = COLUMNS[:2]
COMMON_SETTINGS = (
    "name",
    "reader",
    "source",
    "split",
    "size",
    "calibration",
    "prompt",
    "style",
    "mark",
    "max_new_tokens",
)
"""Settings of every task, whatever its reader."""
# Items of a reasoning-gym set tried for each problem that is wanted, before it counts as exhausted.
_GYM_TRIES = 64


@dataclass(frozen=True)
class ReadRequest:
    """What a command wants of a reader.

    Attributes:
        seed: draws generated problems and shuffles fixed ones.
        wanted: how many problems the command takes; None: all that there are.
        use: the command's entry in `deliberate.data.seeds`.
        data_dir: folder of data sets, None for ``$DELIBERATE_DATA``.
        hub: ``owner/name[:config]`` to read from instead of the folder.
        task_dir: folder of the task's YAML; None for a built-in task.
        excluded: whether a question must not be used.
    """

    seed: int = 0
    wanted: int | None = None
    use: str = seeds.EVALUATION
    data_dir: str | None = None
    hub: str | None = None
    task_dir: str | None = None
    excluded: Callable[[str], bool] = lambda question: False


Read = Callable[[Mapping[str, Any], ReadRequest], Iterable[Problem]]


@dataclass(frozen=True)
class Reader:
    """A reader and what a command has to know of it.

    Attributes:
        read: yields the problems.
        settings: what it reads of the task beside `COMMON_SETTINGS`; None: it may read any.
        generated: it draws ``task.size`` problems from a seed; otherwise the set is fixed.
        own_score: answers are graded by the data set's own scorer.
    """

    read: Read
    settings: tuple[str, ...] | None = None
    generated: bool = False
    own_score: bool = False


def find_reader(name: str) -> Reader:
    """The reader of this name or dotted path.

    Raises:
        DeliberateError: no such name, module or function.
    """
    if name in READERS:
        return READERS[name]
    module, dot, function = name.rpartition(".")
    problem = "is unknown"
    if dot:
        try:
            found = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            problem = f"cannot be imported: {error}"
        else:
            if isinstance(found, Reader):
                return found
            if callable(found):
                return Reader(found)
            problem = "is not a function"
    raise DeliberateError(
        f"task.reader={name!r} {problem}: use one of {', '.join(READERS)}, or the dotted path of a "
        "function (settings, request) that yields problems"
    )


def check_settings(settings: Mapping[str, Any], reader: Reader) -> None:
    """Refuses a setting of a task that its reader does not read.

    Raises:
        DeliberateError: names it and those that there are.
    """
    if reader.settings is None:
        return
    known = sorted({*COMMON_SETTINGS, *reader.settings})
    for name in settings:
        if name not in known:
            raise DeliberateError(
                f"task.{name} is read by nothing: the settings of task {settings['name']!r} are "
                f"{', '.join(known)}"
            )


def refuse_training_set(name: str, trained: str | None) -> None:
    """Raises for a data set that has a train split only, and a model that was trained on problems.

    Args:
        trained: the mark that the model's checkpoint says it was trained on; None of a stock model.
    """
    if name in TRAIN_ONLY and trained is not None:
        raise DeliberateError(
            f"task {name!r} is refused: it has a train split only, and the model was trained on "
            f"problems, perhaps on these; use one of {', '.join(DATA_SETS)}"
        )


def read_data_set(settings: Mapping[str, Any], request: ReadRequest) -> Iterator[Problem]:
    """``task.source``: GSM8K, MATH, MATH-500, or, of stock models, MAWPS or ASDiv; shuffled.

    The shuffle makes the first problems a fair sample of a file that is sorted by subject.
    """
    source = str(settings["source"])
    if source not in (*DATA_SETS, *TRAIN_ONLY):
        known = ", ".join((*DATA_SETS, *TRAIN_ONLY))
        raise DeliberateError(f"task.source={source!r} is not one of {known}")
    split = str(settings["split"])
    problems = load_problems(source, split, data_dir=request.data_dir, hub=request.hub)
    random.Random(f"order:{request.seed}").shuffle(problems)
    yield from problems


def read_json_lines(settings: Mapping[str, Any], request: ReadRequest) -> Iterator[Problem]:
    """``task.path``: a file of JSON lines (``{split}`` is filled in), or the hub; shuffled.

    ``task.columns`` maps `COLUMNS` to the keys of a row; question and answer are required. Of an
    answer that holds ``####`` only what follows counts, and the whole becomes the solution.
    """
    name, split = str(settings["name"]), str(settings.get("split") or "test")
    columns = dict(settings.get("columns") or {})
    for column in columns:
        if column not in COLUMNS:
            raise DeliberateError(f"task.columns: {column!r} is not one of {', '.join(COLUMNS)}")
    keys = {column: str(columns.get(column, column)) for column in COLUMNS}
    if request.hub is not None:
        rows = hub_rows(name, split, request.hub)
    else:
        rows = file_rows(_task_file(name, settings.get("path"), split, request))
    problems = [_problem(name, split, n, row, where, keys) for n, (where, row) in enumerate(rows)]
    random.Random(f"order:{request.seed}").shuffle(problems)
    yield from problems


def _task_file(name: str, path: Any, split: str, request: ReadRequest) -> Path:
    """An absolute path as it is; a relative one lies beside the task's YAML or in the data folder.

    Raises:
        DeliberateError: no path, or no such file.
    """
    if not path:
        raise DeliberateError(f"task.path has no value: task {name!r} needs a file of JSON lines")
    given = Path(str(path).replace("{split}", split)).expanduser()
    places = [given]
    if not given.is_absolute():
        places = [] if request.task_dir is None else [Path(request.task_dir) / given]
        if request.data_dir is not None or not places:
            places.append(data_root(name, str(given), request.data_dir) / given)
    for place in places:
        if place.is_file():
            return place
    raise DeliberateError(f"task.path={path}: there is no file {' or '.join(map(str, places))}")


def _problem(
    name: str,
    split: str,
    number: int,
    row: Mapping[str, Any],
    where: str,
    keys: Mapping[str, str],
) -> Problem:
    for column in _REQUIRED:
        if not str(row.get(keys[column]) or "").strip():
            raise DeliberateError(
                f"{where} has no {keys[column]!r}, the {column}: set task.columns.{column} to one "
                f"of {', '.join(map(str, row)) or 'none'}"
            )
    answer, solution = str(row[keys["answer"]]), row.get(keys["solution"])
    if "####" in answer:
        solution, answer = solution or answer, answer.rsplit("####", 1)[1]
    difficulty, subject = row.get(keys["difficulty"]), row.get(keys["subject"])
    if difficulty is not None and (isinstance(difficulty, bool) or not isinstance(difficulty, int)):
        raise DeliberateError(f"{where}: difficulty {difficulty!r} must be a whole number or null")
    return Problem(
        id=str(row.get(keys["id"]) or f"{name}/{split}/{number}"),
        question=str(row[keys["question"]]).strip(),
        answer=answer.strip(),
        solution=None if solution is None else str(solution),
        source=name,
        difficulty=difficulty,
        subject=None if subject is None else str(subject),
        metadata={"split": split},
    )


def read_word_problems(settings: Mapping[str, Any], request: ReadRequest) -> Iterator[Problem]:
    """Problems of the project's grammar, test split, with ``task.steps`` evenly mixed."""
    return _read_grammar(word_problems, settings, request)


def read_chains(settings: Mapping[str, Any], request: ReadRequest) -> Iterator[Problem]:
    """The same problems with chains of reasoning as their solutions."""
    return _read_grammar(chain_problems, settings, request)


def _read_grammar(
    grammar: Callable[..., Iterator[Problem]], settings: Mapping[str, Any], request: ReadRequest
) -> Iterator[Problem]:
    steps = list(settings["steps"])
    if len(steps) != 2 or not all(isinstance(s, int) for s in steps):
        raise DeliberateError(f"task.steps={steps} must be two whole numbers, [least, most]")
    low, high = steps
    if not MIN_STEPS <= low <= high <= MAX_STEPS:
        raise DeliberateError(f"task.steps={steps} must rise within {MIN_STEPS}..{MAX_STEPS}")
    seed = seeds.WORD_PROBLEMS[request.use].of(request.seed, f"{request.use} on word problems")
    # More than `size`, since excluded questions are replaced; drawn only as far as they are used.
    yield from grammar("test", size=2 * settings["size"] + 1000, seed=seed, steps=(low, high))


def read_reasoning_gym(settings: Mapping[str, Any], request: ReadRequest) -> list[Problem]:
    """Distinct problems of the test side of the reasoning-gym set ``task.dataset``."""
    if settings["dataset"] is None:
        raise DeliberateError("task.dataset has no value: name a reasoning-gym data set")
    name, params = str(settings["dataset"]), settings["params"] or {}
    size = request.wanted or settings["size"]
    ranges = seeds.REASONING_GYM.get(request.use, seeds.REASONING_GYM[seeds.EVALUATION])
    seed = ranges.of(request.seed, f"{request.use} on a reasoning-gym set")
    found: dict[str, Problem] = {}
    first, end = seed * seeds.GYM_STRIDE, (seed + 1) * seeds.GYM_STRIDE
    start = first
    # Nothing trains on the evaluation-only sets, so both sides of the split will do.
    every = name in EVALUATION_ONLY
    while start < end:
        block = min(end - start, max(16, (size - len(found)) * (1 if every else 9)))
        for problem in load_reasoning_gym(name, size=block, seed=start, **params):
            if request.excluded(problem.question):
                continue
            if every or split_of(problem.question) == "test":
                found.setdefault(problem.question, problem)
        if len(found) >= size:
            return list(found.values())[:size]
        start += block
        if start - first > _GYM_TRIES * size + 1024:
            break
    raise DeliberateError(
        f"reasoning_gym/{name} gives only {len(found)} distinct test problems: lower task.size="
        f"{size}, or change task.params"
    )


def check_size(settings: Mapping[str, Any]) -> int | None:
    """``task.size``, where the task has one: how many problems it draws or takes."""
    size = settings.get("size")
    return None if size is None else at_least("task.size", size, 1)


READERS: dict[str, Reader] = {
    "data_set": Reader(read_data_set, ()),
    "json_lines": Reader(read_json_lines, ("path", "columns")),
    "word_problems": Reader(read_word_problems, ("steps",), generated=True),
    "chains": Reader(read_chains, ("steps",), generated=True),
    "reasoning_gym": Reader(
        read_reasoning_gym, ("dataset", "params"), generated=True, own_score=True
    ),
}
