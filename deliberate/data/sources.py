"""Data sets as lists of `Problem`: a local folder of JSON lines, the hub, or reasoning-gym.

Local layout, ``<data_dir>/<name>/<split>.jsonl``, one JSON object a line with ``question`` and
``answer`` and optionally ``id, solution, subject, level, equation, numbers``. Rows in the form the
hub has (GSM8K's ``answer`` ending in ``#### x``, MATH's ``problem``/``type``/``"Level 3"``) are
read the same way, from either place.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from deliberate.data.problem import Problem, last_boxed
from deliberate.installation import install_extra
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import parse_json

_log = logging.getLogger(__name__)

DATA_VARIABLE = "DELIBERATE_DATA"
SOURCES = ("gsm8k", "math", "math500", "mawps", "asdiv_a")
EVALUATION_ONLY = frozenset({"gsm_symbolic"})
"""Never trained on: all templates of gsm_symbolic are rewritten GSM8K test problems."""

NO_SINGLE_ANSWER = "(scored by the data set)"

_HUB_CONFIG = {"gsm8k": "main"}
_ANNOTATION = re.compile(r"<<[^<>]*>>")
_MAPPED = frozenset({"id", "unique_id", "question", "problem", "answer", "solution", "subject",
                     "type", "level", "source"})  # fmt: skip


def load_problems(
    name: str,
    split: str,
    *,
    data_dir: str | Path | None = None,
    hub: str | None = None,
    limit: int | None = None,
) -> list[Problem]:
    """Read one split of a data set, in file order.

    Args:
        name: one of `SOURCES`; it decides how a row is read.
        split: name of the file without ``.jsonl``, or of the hub's split.
        data_dir: the folder; without it the environment variable ``DELIBERATE_DATA``.
        hub: ``owner/name`` or ``owner/name:config``; when given, `datasets` loads it and no
            folder is read.
        limit: only the first so many problems.

    Raises:
        DeliberateError: unknown name, no folder, missing file, broken line, row without a
            question or an answer, unreachable hub; the message names what was found.
    """
    if name not in SOURCES:
        raise DeliberateError(f"unknown data set {name!r}: one of {', '.join(SOURCES)}")
    if limit is not None and limit < 1:
        raise DeliberateError(f"limit={limit}: at least 1 problem is needed, or None for all")
    if hub is not None:
        rows = hub_rows(name, split, hub)
    else:
        rows = file_rows(_split_file(name, split, data_dir))
    read = (
        problem_from_row(name, split, number, row, where)
        for number, (where, row) in enumerate(rows)
        if not (name == "math" and _has_empty_box(row, where))
    )
    problems = list(itertools.islice(read, limit))
    if not problems:
        raise DeliberateError(f"{name}/{split} of {hub or data_dir or DATA_VARIABLE} has no rows")
    return problems


def data_root(name: str, wanted: str, data_dir: str | Path | None) -> Path:
    """The data folder: the argument, else the environment variable ``DELIBERATE_DATA``.

    Raises:
        DeliberateError: neither is given, or the folder does not exist.
    """
    given = data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE)
    if not given:
        raise DeliberateError(
            f"no data folder for {name!r}: set data.dir=FOLDER (or {DATA_VARIABLE}=FOLDER) to a "
            f"folder with {wanted}, or give a hub name such as "
            f"{'openai/gsm8k' if name == 'gsm8k' else 'owner/name'} (data.hub=...)"
        )
    root = Path(given)
    if not root.is_dir():
        raise DeliberateError(f"data folder {str(root)!r} does not exist")
    return root


def _split_file(name: str, split: str, data_dir: str | Path | None) -> Path:
    root = data_root(name, f"{name}/{split}.jsonl", data_dir)
    path = root / name / f"{split}.jsonl"
    if path.is_file():
        return path
    there = sorted(f"{p.parent.name}/{p.stem}" for p in root.glob("*/*.jsonl"))
    raise DeliberateError(
        f"no {name}/{split}.jsonl in {str(root)!r}: there is {', '.join(there) or 'no */*.jsonl'}"
    )


def file_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Objects of a file of JSON lines, each with its place (``file:line``) for messages."""
    # A byte that is not UTF-8 becomes one that JSON text cannot be encoded with.
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = parse_json(line, where)
            except DeliberateError as error:
                raise DeliberateError(f"{error}: {line.strip()[:60]!r}") from None
            if not isinstance(row, dict):
                raise DeliberateError(f"{where} is a {type(row).__name__}: an object is needed")
            yield where, row


def hub_rows(name: str, split: str, hub: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a data set on the hub (``owner/name[:config]``), each with its place."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise DeliberateError(
            f"hub={hub!r} needs the package `datasets`: {install_extra('hub')}"
        ) from None
    repository, _, config = hub.partition(":")
    config = config or _HUB_CONFIG.get(name, "")
    try:
        dataset = load_dataset(repository, config or None, split=split)
    except Exception as error:  # datasets, its HTTP client and its parsers raise many types
        reason = str(error).strip().split("\n")[0][:200]
        raise DeliberateError(
            f"cannot load {repository!r} (config {config or 'default'}, split {split}) from the "
            f"hub: {type(error).__name__}: {reason}"
        ) from None
    for number, row in enumerate(dataset):
        yield f"{hub} {split} row {number}", row


def _has_empty_box(row: Mapping[str, Any], where: str) -> bool:
    """Two rows of the published MATH train split end in ``\\boxed{}``: left out, and logged."""
    empty = not row.get("answer") and last_boxed(str(row.get("solution") or "")) == ""
    if empty:
        _log.warning("%s left out: its solution ends in an empty \\boxed{}", where)
    return empty


def problem_from_row(
    name: str, split: str, number: int, row: Mapping[str, Any], where: str
) -> Problem:
    """One raw row (local or hub form) as a `Problem`; ``where`` names it in error messages."""
    question = _text(row, ("question", "problem"), where)
    solution = row.get("solution") or None
    difficulty: int | None = None
    if name == "gsm8k":
        answer, solution, difficulty = _read_gsm8k(_text(row, ("answer",), where), solution, where)
    elif name in ("math", "math500"):
        boxed = last_boxed(solution or "")
        answer = str(row.get("answer") or "").strip() or boxed or ""
        if not answer:
            raise DeliberateError(f"{where} has neither an 'answer' nor a \\boxed{{}} solution")
        level = re.search(r"[1-5]", str(row.get("level")))
        difficulty = int(level.group()) if level else None
    else:
        answer = plain_number(_text(row, ("answer",), where))
        solution, difficulty = solve_prefix(
            str(row.get("equation") or ""), str(row.get("numbers") or ""), answer
        )
    metadata = {key: value for key, value in row.items() if key not in _MAPPED}
    return Problem(
        id=str(row.get("id") or row.get("unique_id") or f"{name}/{split}/{number}"),
        question=question.strip(),
        answer=answer,
        solution=solution,
        source=name,
        difficulty=difficulty,
        subject=row.get("subject") or row.get("type") or None,
        metadata={**metadata, "split": split},
    )


def _text(row: Mapping[str, Any], keys: Sequence[str], where: str) -> str:
    for key in keys:
        value = row.get(key)
        if value is not None and str(value).strip():
            return str(value)
    raise DeliberateError(
        f"{where} has no {' or '.join(map(repr, keys))}: its filled keys are "
        f"{', '.join(sorted(k for k, v in row.items() if v not in (None, ''))) or 'none'}"
    )


def _read_gsm8k(
    answer: str, solution: str | None, where: str
) -> tuple[str, str | None, int | None]:
    if "####" in answer:  # the original form: the solution with its last line "#### x"
        solution = answer
        answer = answer.rsplit("####", 1)[1]
    answer = answer.strip().replace(",", "")
    if not answer:
        raise DeliberateError(f"{where} has nothing after its last '####'")
    if solution is None:
        return answer, None, None
    steps = len(_ANNOTATION.findall(solution))
    body = _ANNOTATION.sub("", solution).rsplit("####", 1)[0].rstrip()
    return answer, f"{body}\n#### {answer}", steps or None  # a few rows carry no annotations at all


def plain_number(text: str) -> str:
    """``504.0`` as ``504``, ``2.30`` as ``2.3``; anything that is no plain decimal unchanged."""
    text = text.strip()
    if re.fullmatch(r"-?\d+\.\d+", text):
        return text.rstrip("0").rstrip(".")
    return text


def solve_prefix(equation: str, numbers: str, answer: str) -> tuple[str, int | None]:
    """Steps of a prefix equation over ``number0 number1 ...`` and the count of its operators.

    ``("* number0 number1", "56.0 9.0", "504")`` gives ``("56 * 9 = 504\\n#### 504", 1)``. Where
    the equation does not evaluate to the answer (relative tolerance 1e-9: several references are
    rounded, and a wrong step would be taught), the solution is ``#### answer`` alone, steps None.
    """
    values, lines = numbers.split(), []
    tokens = iter(equation.split())

    def walk() -> Fraction:
        token = next(tokens)
        if token in ("+", "-", "*", "/"):
            left, right = walk(), walk()
            if token == "/":
                value = left / right
            else:
                value = left + right if token == "+" else left * right
                value = left - right if token == "-" else value
            lines.append(f"{_decimal(left)} {token} {_decimal(right)} = {_decimal(value)}")
            return value
        if token.startswith("number"):
            return Fraction(values[int(token.removeprefix("number"))])
        return Fraction(token)

    unsolved = f"#### {answer}", None
    try:
        value, target = walk(), Fraction(answer)
    except (StopIteration, IndexError, ValueError, ZeroDivisionError):
        return unsolved
    leftover = next(tokens, None) is not None
    if leftover or not lines or abs(value - target) > abs(target) * Fraction(1, 10**9):
        return unsolved
    # The last line states the answer as the reference writes it.
    lines[-1] = f"{lines[-1].rsplit(' = ', 1)[0]} = {answer}"
    return "\n".join([*lines, f"#### {answer}"]), len(lines)


def _decimal(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    # Twelve digits hide float noise such as 0.30000000000000004; never in exponent form.
    return plain_number(f"{float(value):.12f}")


def data_fingerprint(problems: Iterable[Problem]) -> str:
    """sha256 (hex) over the canonical JSON of the problems, in their order."""
    digest = hashlib.sha256()
    for problem in problems:
        fields = {**vars(problem), "metadata": dict(problem.metadata)}
        line = json.dumps(fields, sort_keys=True, separators=(",", ":"), default=str)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def load_reasoning_gym(name: str, *, size: int, seed: int, **params: Any) -> list[Problem]:
    """Problems of any reasoning-gym data set, ``source="reasoning_gym/<name>"``.

    Item i is drawn from ``seed + i`` in most generators: two sets share items when their ranges
    ``[seed, seed + size)`` overlap, so keep the seeds of train and test further apart than `size`.

    ``metadata`` is the entry's, plus ``params``: some scores depend on them. Where a data set
    names no answer (several are right), ``answer`` is `NO_SINGLE_ANSWER`; grade every set with
    `score_reasoning_gym`. `chain_sum` also gets a step-by-step solution, and its number of
    operations as difficulty.

    Raises:
        DeliberateError: unknown name (with close matches) or parameters that it does not accept.
    """
    _known_gym(name)
    import reasoning_gym

    try:
        dataset = reasoning_gym.create_dataset(name, size=size, seed=seed, **params)
    except (TypeError, AssertionError, ValueError) as error:
        raise DeliberateError(
            f"reasoning_gym/{name} does not accept size={size}, seed={seed}, {params}: {error}"
        ) from None
    problems = []
    for number, entry in enumerate(dataset):
        solution, difficulty = None, None
        if name == "chain_sum":
            solution, difficulty = chain_sum_steps(entry["metadata"]["expression"])
        problems.append(
            Problem(
                id=f"reasoning_gym/{name}/{seed}/{number}",
                question=entry["question"],
                answer=NO_SINGLE_ANSWER if entry["answer"] is None else str(entry["answer"]),
                solution=solution,
                source=f"reasoning_gym/{name}",
                difficulty=difficulty,
                metadata={**entry["metadata"], "params": params},
            )
        )
    return problems


def _known_gym(name: str) -> None:
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"{len(DATASETS)} names are known"
        raise DeliberateError(f"unknown reasoning-gym data set {name!r}: {hint}")


def chain_sum_steps(expression: str) -> tuple[str, int]:
    """``"4 - 1 - 7"`` as ``("4 - 1 = 3\\n3 - 7 = -4\\n#### -4", 2)``: left to right."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        value = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {value}")
        total = value
    return "\n".join([*lines, f"#### {total}"]), len(lines)


def score_reasoning_gym(problem: Problem, answer: str | None) -> float:
    """The data set's own score of an answer, in [0, 1]: many accept more than one answer.

    Raises:
        DeliberateError: the problem did not come from `load_reasoning_gym`.
    """
    family, _, name = problem.source.partition("/")
    if family != "reasoning_gym":
        raise DeliberateError(
            f"problem {problem.id!r} is from {problem.source!r}, not reasoning_gym"
        )
    metadata = dict(problem.metadata)
    params = metadata.pop("params", {})
    entry = {"question": problem.question, "answer": problem.answer, "metadata": metadata}
    return float(_gym_scorer(name, json.dumps(params, sort_keys=True))(answer, entry))


@functools.lru_cache(maxsize=32)
def _gym_scorer(name: str, params: str) -> Any:
    _known_gym(name)
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0, **json.loads(params)).score_answer


def check_training_sources(train_names: Iterable[str], eval_names: Iterable[str] = ()) -> None:
    """Refuses training data that overlaps with evaluation data.

    Names are ``gsm8k/train`` (set/split), ``reasoning_gym/<name>`` or bare. Refused: a set in
    `EVALUATION_ONLY`, any ``test`` split and MATH-500 (part of the MATH test split), whatever is
    evaluated; and the split of a fixed data set that this run also evaluates on. Generated
    sets may be in both lists: their seeds differ.

    Raises:
        DeliberateError: names the source and the reason.
    """
    evaluated = set(eval_names)
    for name in train_names:
        parts = name.split("/")
        if EVALUATION_ONLY.intersection(parts):
            raise DeliberateError(
                f"training on {name!r} is refused: rewritten GSM8K test problems, evaluation only"
            )
        if parts[-1] == "test" or "math500" in parts:
            raise DeliberateError(
                f"training on {name!r} is refused: a test split is for evaluation only"
            )
        if name in evaluated and parts[0] in SOURCES:
            raise DeliberateError(
                f"training on {name!r} is refused: this run evaluates on the same split"
            )
