"""The model's own text, written by its own engine, and continued after an interruption.

One JSON line a text: the exact token ids (`tokens`) and how many of them are the prompt; the same
rows that `deliberate.data.self_generated` reads. Answers are written as they end: while one ends,
another begins, so no place of a batch waits for its longest answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from deliberate.engine.request import Request
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.spec import DecodingSpec, Fidelity
from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import parse_json


@dataclass(frozen=True)
class OwnText:
    """How the text is written.

    Attributes:
        tokens: answer tokens after which no answer is begun.
        max_new_tokens: of one answer.
        batch_size: answers at a time.
        sampled: share of the answers that are sampled; the others are greedy.
        temperature, top_p: of the sampled ones.

    Raises:
        DeliberateError: a value that is not allowed.
    """

    tokens: int = 60_000
    max_new_tokens: int = 320
    batch_size: int = 32
    sampled: float = 0.25
    temperature: float = 0.7
    top_p: float = 0.95

    def __post_init__(self) -> None:
        for name in ("tokens", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise DeliberateError(f"text.{name}={getattr(self, name)} must be at least 1")
        if not (0 <= self.sampled <= 1 and self.temperature > 0 and 0 < self.top_p <= 1):
            raise DeliberateError(
                f"text.sampled={self.sampled}, text.temperature={self.temperature}, "
                f"text.top_p={self.top_p}: shares are within [0, 1], the temperature positive"
            )

    def is_sampled(self, index: int) -> bool:
        """Whether this answer is sampled: evenly spread, the first ones greedy."""
        return int((index + 1) * self.sampled) > int(index * self.sampled)

    def chooser(self, index: int) -> TokenChooser | None:
        """How the tokens of this answer are chosen; None for greedily."""
        if not self.is_sampled(index):
            return None
        warpers = [TemperatureLogitsWarper(self.temperature), TopPLogitsWarper(self.top_p)]
        return TokenChooser(warpers, sample=True, seed=index)


def write_own_text(
    path: Path,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    how: OwnText,
    *,
    note: Callable[[int], None] = lambda tokens: None,
) -> int:
    """Appends answers to `path` until there are enough; the number of answer tokens.

    Answers that are there already stay; the part of a line that an interruption left is dropped.

    Args:
        model: a `deliberate.AdaptiveModel`; it decodes at full depth.
        prompts: token ids; the same ones in the same order when a run is continued.
        note: called with the answer tokens so far, after each answer.
    """
    ends = {*end_tokens(model.generation_config), *end_tokens(None, tokenizer)}
    path.parent.mkdir(parents=True, exist_ok=True)
    done, total = _kept(path, prompts)
    waiting: Iterator[int] = (index for index in range(len(prompts)) if index not in done)
    engine = model.engine(max_running=how.batch_size)
    dense = DecodingSpec(fidelity=Fidelity.DENSE)
    answers: dict[int, tuple[int, list[int]]] = {}  # by request: prompt and answer so far

    def begin() -> None:
        while total < how.tokens and len(answers) < how.batch_size:
            index = next(waiting, None)
            if index is None:
                return
            asked = Request(
                prompts[index], how.max_new_tokens, spec=dense, sampling=how.chooser(index),
                end_tokens=ends,
            )  # fmt: skip
            answers[engine.add(asked)] = (index, [])

    with path.open("a", encoding="utf-8") as file:
        begin()
        while answers:
            for output in engine.step():
                index, answer = answers[output.id]
                answer += output.tokens
                if output.finished is None:
                    continue
                del answers[output.id]
                prompt = prompts[index]
                row = {"index": index, "prompt": len(prompt), "tokens": [*prompt, *answer]}
                file.write(json.dumps(row) + "\n")
                file.flush()
                total += len(answer)
                note(total)
            begin()
    return total


def read_own_text(path: Path) -> list[tuple[list[int], int]]:
    """Token ids and prompt length of each text, in the order of their prompts where it is known."""
    rows = [parse_json(one, str(path)) for one in path.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: row.get("index", 0))
    return [
        (row["tokens"], row["prompt"]) for row in rows if len(row["tokens"]) > row["prompt"] + 2
    ]


def _kept(path: Path, prompts: Sequence[Sequence[int]]) -> tuple[set[int], int]:
    """Prompts that `path` has answers to, and their tokens; drops what an interruption left."""
    if not path.is_file():
        return set(), 0
    kept: dict[int, str] = {}
    total = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = parse_json(line, str(path))
        except DeliberateError:
            continue  # the last line of an interrupted run
        index, length = row.get("index", -1), row["prompt"]
        known = 0 <= index < len(prompts) and row["tokens"][:length] == list(prompts[index])
        if known and index not in kept:
            kept[index] = line
            total += len(row["tokens"]) - length
    path.write_text("".join(line + "\n" for line in kept.values()), encoding="utf-8")
    return set(kept), total
