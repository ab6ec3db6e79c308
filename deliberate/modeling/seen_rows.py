"""Embeddings that no token has, under ids of their own: what a vision tower makes of images.

An image is so many positions of a prompt. Each gets an id past the vocabulary, the same for the
same image every time, so whatever knows prompts as ids (the engine, its prefix tree, sequences
that are run again) knows images too, and a prefix is shared only where its images are the same.
"""

from __future__ import annotations

import bisect
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deliberate.utils.errors import DeliberateError

# Positions of images whose embeddings are kept; a SmolVLM image is 64, a LLaVA image 576.
MOST_ROWS = 32_768


@dataclass(frozen=True, eq=False)
class SeenRun:
    """Embeddings under consecutive ids.

    Attributes:
        key: names them: the same key always comes with the same rows.
        first: id of the first.
        rows: ``[n, d]``.
        places: rotary positions ``[axes, n]`` from the first one's on, where they are not 0, 1, 2,
            ... (M-RoPE).
    """

    key: str
    first: int
    rows: Tensor
    places: Tensor | None = None


class SeenRows:
    """Embeddings by id; threads may share them.

    Ids are given out in rising order and never given again: one whose embedding was dropped is an
    error where it is used, never another image.

    Args:
        first: the first id; as many as the embedding has rows.
        most: rows that are kept; beyond that the oldest are dropped that nobody holds (`hold`).

    Attributes:
        first, most: the same.
    """

    def __init__(self, first: int, most: int = MOST_ROWS) -> None:
        self.first, self.most = first, most
        self._next = first
        self._kept: OrderedDict[str, SeenRun] = OrderedDict()
        # All that are alive, by first id; what is kept no longer lives while somebody holds it.
        self._by_id: tuple[list[int], list[weakref.ref[SeenRun]]] = ([], [])
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"first": self.first, "most": self.most}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def add(self, key: str, rows: Tensor, places: Tensor | None = None) -> int:
        """The first of the consecutive ids of ``rows [n, d]``.

        Args:
            key: names these rows: the same key always comes with the same rows and places.
            places: of `SeenRun`.

        Raises:
            DeliberateError: more rows than are kept.
        """
        if len(rows) > self.most:
            raise DeliberateError(
                f"an image of {len(rows)} positions: at most {self.most} are kept; split it"
            )
        with self._lock:
            run = self._kept.get(key)
            if run is not None:
                self._kept.move_to_end(key)
                return run.first
            alive = [found for one in self._by_id[1] if (found := one()) is not None]
            run = next((one for one in alive if one.key == key), None)
            if run is None:
                run = SeenRun(key, self._next, rows, places)
                self._next += len(rows)
                alive.append(run)
            self._kept[key] = run
            total = sum(len(one.rows) for one in self._kept.values())
            while total > self.most:
                total -= len(self._kept.popitem(last=False)[1].rows)
            # Ids only rise, so these are in order.
            self._by_id = [one.first for one in alive], [weakref.ref(one) for one in alive]
            return run.first

    def hold(self, ids: Sequence[int]) -> tuple[SeenRun, ...]:
        """The runs that ids are of, each once, in order; what is returned keeps them.

        Raises:
            DeliberateError: an id whose embedding was dropped, or that was never given.
        """
        by_id, found = self._by_id, dict[int, SeenRun]()
        for token in ids:
            if token >= self.first:
                run = self._run_of(by_id, token)
                found[run.first] = run
        return tuple(found.values())

    def knows(self, token: int) -> bool:
        """Whether an id has an embedding here."""
        return self._find(self._by_id, token) is not None

    def look_up(self, ids: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Embeddings ``[..., d]`` of ids ``[...]``, those of tokens by `embed`.

        Raises:
            DeliberateError: an id whose embedding was dropped, or that was never given.
        """
        seen = ids >= self.first
        if not bool(seen.any()):
            return embed(ids)
        hidden = embed(ids.masked_fill(seen, 0)).clone()
        by_id = self._by_id
        wanted = ids[seen]
        made = hidden.new_empty((len(wanted), hidden.shape[-1]))
        done = 0
        numbers: list[int] = wanted.tolist()
        while done < len(numbers):
            run = self._run_of(by_id, numbers[done])
            rows, place = run.rows, numbers[done] - run.first
            count = 1
            while (
                done + count < len(numbers)
                and numbers[done + count] == numbers[done] + count
                and place + count < len(rows)
            ):
                count += 1
            made[done : done + count] = rows[place : place + count].to(made)
            done += count
        hidden[seen] = made
        return hidden

    def _run_of(self, by_id: tuple[list[int], list[weakref.ref[SeenRun]]], token: int) -> SeenRun:
        found = self._find(by_id, token)
        if found is None:
            raise DeliberateError(
                f"token id {token} is neither a token's nor that of an image among "
                f"the {self.most} newest positions: call model.see anew"
            )
        return found

    @staticmethod
    def _find(by_id: tuple[list[int], list[weakref.ref[SeenRun]]], token: int) -> SeenRun | None:
        starts, runs = by_id
        index = bisect.bisect_right(starts, token) - 1
        run = runs[index]() if index >= 0 else None
        return None if run is None or token - run.first >= len(run.rows) else run


def positions_of(ids: Sequence[int], seen: Sequence[SeenRun]) -> Tensor | None:
    """Rotary positions ``[axes, n]`` of a prompt, where its images have places of their own.

    A token has the position after the largest one before it, and an image its places from there on
    (Qwen2-VL, arXiv:2409.12191).

    Args:
        ids: of the prompt.
        seen: the runs of its images.
    """
    runs = {run.first: run for run in seen if run.places is not None}
    if not runs:
        return None
    axes = max(len(run.places) for run in runs.values() if run.places is not None)
    parts: list[Tensor] = []
    at = following = 0
    while at < len(ids):
        run = runs.get(ids[at])
        if run is not None and run.places is not None:
            part = run.places + following
        else:
            end = next((one for one in range(at + 1, len(ids)) if ids[one] in runs), len(ids))
            part = torch.arange(following, following + end - at).expand(axes, -1)
        parts.append(part)
        at, following = at + part.shape[1], int(part.max()) + 1
    return torch.cat(parts, dim=1)[:, : len(ids)]


def runs_of(mask: Tensor) -> list[tuple[int, int, int]]:
    """(row, first, end) of each run of True in ``mask [B, n]``, row by row."""
    padded = torch.nn.functional.pad(mask.to(torch.int8), (1, 1))
    steps = padded.diff(dim=1)
    starts, ends = (steps == 1).nonzero().tolist(), (steps == -1).nonzero().tolist()
    return [(row, first, end) for (row, first), (_, end) in zip(starts, ends, strict=True)]
