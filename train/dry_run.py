"""Prints what a run would train on: decoded batches with their loss mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor

from deliberate.config import IGNORE_INDEX

# Marks around text that the loss is taken on.
OPEN, CLOSE = "⟦", "⟧"
# Between the examples of a packed row.
BOUNDARY = "\n--- next example ---\n"


def decoded_rows(batch: Mapping[str, Tensor], tokenizer: Any) -> Iterator[str]:
    """Each row of a batch as text; `OPEN` and `CLOSE` mark what the loss is taken on.

    Args:
        batch: as `batches.collate` makes it.
        tokenizer: decodes the ids, special tokens included.
    """
    masks = batch["attention_mask"]
    for row, mask in enumerate(masks):
        size = int(mask.sum())
        ids = batch["input_ids"][row, :size].tolist()
        trained = (batch["labels"][row, :size] != IGNORE_INDEX).tolist()
        places: Sequence[int] = range(size)
        if "position_ids" in batch:
            places = batch["position_ids"][row, :size].tolist()
        text, example = "", 0
        marked = []
        for at, token in enumerate(ids):
            example += places[at] == 0 and at > 0
            marked.append((example, trained[at], token))
        shown = 0
        for (number, loss), run in groupby(marked, key=lambda item: item[:2]):
            if number > shown:
                text, shown = text + BOUNDARY, number
            piece = tokenizer.decode([token for _, _, token in run])
            text += f"{OPEN}{piece}{CLOSE}" if loss else piece
        yield text


def show(batches: Any, tokenizer: Any, *, rows: int = 4) -> None:
    """Prints the first rows of the first micro-batch and the token counts of the first step."""
    step = [batches[index] for index in range(batches.parts)]
    for number, text in zip(range(rows), decoded_rows(step[0], tokenizer), strict=False):
        print(f"=== row {number + 1} ===\n{text}")
    shown = ", ".join(f"{tuple(batch['input_ids'].shape)}" for batch in step)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in step)
    slots = sum(batch["input_ids"].numel() for batch in step)
    targets = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in step)
    print(f"=== first step ===\nmicro-batches {shown}")
    print(f"{tokens} tokens, {targets} with loss, {1 - tokens / slots:.1%} padding")
    print("dry run: nothing was trained or written")
