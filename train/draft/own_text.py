"""The model's own text, written in batches by its own decoder, and continued after an interruption.

One JSON line a text: the exact token ids (`tokens`) and how many of them are the prompt; the same
rows that `deliberate.data.self_generated` reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import parse_json


@dataclass(frozen=True)
class OwnText:
    """How the text is written.

    Attributes:
        tokens: answer tokens after which no batch is begun.
        max_new_tokens: of one answer.
        batch_size: answers at a time.
        sampled: share of the batches that are sampled; the others are greedy.
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

    def is_sampled(self, batch: int) -> bool:
        """Whether this batch is sampled: evenly spread, the first ones greedy."""
        return int((batch + 1) * self.sampled) > int(batch * self.sampled)


def write_own_text(
    path: Path,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    how: OwnText,
    *,
    note: Callable[[int], None] = lambda tokens: None,
) -> int:
    """Appends batches of answers to `path` until there are enough; the number of answer tokens.

    Whole batches that are there already stay; a part of one is dropped and written anew.

    Args:
        model: a `deliberate.AdaptiveModel`; it decodes at full depth.
        prompts: token ids; the same ones in the same order when a run is continued.
        note: called with the answer tokens so far, after each batch.
    """
    ends = {*end_tokens(model.generation_config), *end_tokens(None, tokenizer)}
    pad = next(iter(sorted(end for end in ends if end is not None)), 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    batch, total = _kept(path, prompts, how.batch_size)
    while total < how.tokens and batch * how.batch_size < len(prompts):
        chosen = prompts[batch * how.batch_size : (batch + 1) * how.batch_size]
        width = max(map(len, chosen))
        ids = torch.full((len(chosen), width), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(chosen):
            ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, width - len(prompt) :] = 1
        sampling: dict[str, Any] = {"do_sample": False}
        if how.is_sampled(batch):
            sampling = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p}
            sampling["seed"] = batch
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=how.max_new_tokens, fidelity="dense",
            pad_token_id=pad, **sampling,
        )  # fmt: skip
        rows = []
        for row, prompt in enumerate(chosen):
            answer = made[row, width:].tolist()
            end = next((at + 1 for at, token in enumerate(answer) if token in ends), len(answer))
            total += end
            whole = [*prompt, *answer[:end]]
            rows.append({"batch": batch, "prompt": len(prompt), "tokens": whole})
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        batch += 1
        note(total)
    return total


def read_own_text(path: Path) -> list[tuple[list[int], int]]:
    """Token ids and prompt length of each text of whole batches."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = parse_json(line, str(path))
        if len(row["tokens"]) > row["prompt"] + 2:
            found.append((row["tokens"], row["prompt"]))
    return found


def _kept(path: Path, prompts: Sequence[Sequence[int]], size: int) -> tuple[int, int]:
    """Whole batches that `path` holds, and their answer tokens; drops what is after them."""
    if not path.is_file():
        return 0, 0
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append((line, parse_json(line, str(path))))
        except DeliberateError:
            break  # the last line of an interrupted run
    kept: list[str] = []
    batches = total = 0
    while True:
        wanted = len(prompts[batches * size : (batches + 1) * size])
        mine = rows[len(kept) : len(kept) + wanted]
        whole = len(mine) == wanted and all(row["batch"] == batches for _, row in mine)
        if not wanted or not whole:
            break
        kept += [line for line, _ in mine]
        total += sum(len(row["tokens"]) - row["prompt"] for _, row in mine)
        batches += 1
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    return batches, total
