"""Stopping criteria called as transformers' loop calls them, over sequences that differ in depth.

transformers calls a criterion once a step, with every row of the batch and the scores so far. Here
sequences reach a step at different times. Criteria that look at one row alone are called as soon as
its token is final; all others when every running sequence has reached the step, so that a row's
index, its neighbours and the scores are what they are in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deliberate.engine.sequence import DecodingSequence
from deliberate.utils.errors import DeliberateError

# transformers' own criteria whose verdict on a row follows from that row (or from the clock).
_ROW_ALONE = ("StopStringCriteria", "MaxTimeCriteria", "MaxLengthCriteria", "EosTokenCriteria")
_OF_TRANSFORMERS = "transformers.generation.stopping_criteria"


class StoppingSteps:
    """The stopping criteria of one generation.

    Args:
        criteria: those that the decode loop does not hold by itself.
        prompts: int64 ``[B, n]``, padding included.
        pad: what a finished row holds in later steps.
        keep_scores: the criteria get the processed scores; None otherwise, as in transformers.
    """

    def __init__(
        self, criteria: Sequence[Any], prompts: Tensor, pad: int, *, keep_scores: bool
    ) -> None:
        self._alone = [one for one in criteria if _looks_at_one_row(one)]
        self._together = [one for one in criteria if not _looks_at_one_row(one)]
        self._pad = pad
        self._keep_scores = keep_scores
        self._width = prompts.shape[1]
        self._seen = [0] * len(prompts)  # tokens of each row that `_alone` has judged
        self._stopped: set[int] = set()
        self._step = 0  # tokens of every row that `_together` has judged
        self._scores: tuple[Tensor, ...] = ()
        with torch.inference_mode(False):
            self._ids = prompts.new_full((len(prompts), self._width + 64), pad)
            self._ids[:, : self._width] = prompts

    def stops(self, sequences: Sequence[DecodingSequence]) -> dict[int, int]:
        """Sequences that stop now, by index, each with the number of its tokens that remain.

        Raises:
            DeliberateError: a criterion raised, or its result fits no batch; the message names it.
        """
        if not (self._alone or self._together):
            return {}
        found: dict[int, int] = {}
        # Not inference tensors: a criterion may keep what it is shown.
        with torch.inference_mode(False), torch.no_grad():
            self._write(sequences)
            if self._alone:
                self._judge_rows(sequences, found)
            if self._together:
                self._judge_steps(sequences, found)
        return found

    def _write(self, sequences: Sequence[DecodingSequence]) -> None:
        longest = self._width + max(sequence.yielded for sequence in sequences)
        if longest > self._ids.shape[1]:
            wider = self._ids.new_full((len(self._ids), 2 * longest), self._pad)
            wider[:, : self._ids.shape[1]] = self._ids
            self._ids = wider
        for row, sequence in enumerate(sequences):
            fresh = [
                record.token for record in sequence.records[self._seen[row] : sequence.yielded]
            ]
            if fresh:
                start = self._width + self._seen[row]
                self._ids[row, start : start + len(fresh)] = self._ids.new_tensor(fresh)

    def _judge_rows(self, sequences: Sequence[DecodingSequence], found: dict[int, int]) -> None:
        for row, sequence in enumerate(sequences):
            for count in range(self._seen[row] + 1, sequence.yielded + 1):
                if row in self._stopped:
                    break
                ids = self._ids[row : row + 1, : self._width + count]
                if any(self._verdict(one, ids, None, count)[0] for one in self._alone):
                    self._stop(row, count, found)
            self._seen[row] = sequence.yielded

    def _judge_steps(self, sequences: Sequence[DecodingSequence], found: dict[int, int]) -> None:
        """Takes every step that all running sequences have reached."""
        while True:
            step = self._step
            running = []
            for row, sequence in enumerate(sequences):
                limit = found.get(row, sequence.yielded)
                if limit > step:
                    running.append(row)
                elif row not in self._stopped and not sequence.finished:
                    return
            if not running:
                break
            self._step += 1
            ids = self._ids[:, : self._width + step + 1].clone()
            for row in range(len(sequences)):
                if row not in running:
                    ids[row, self._width + self._ended(row, sequences, found) :] = self._pad
            if self._keep_scores:
                self._scores = (*self._scores, step_scores(sequences, step))
            scores = self._scores if self._keep_scores else None
            verdicts = [self._verdict(one, ids, scores, step + 1) for one in self._together]
            for row in running:
                if any(verdict[row] for verdict in verdicts):
                    self._stop(row, step + 1, found)
        for row, sequence in enumerate(sequences):
            self._seen[row] = sequence.yielded

    def _ended(self, row: int, sequences: Sequence[DecodingSequence], found: dict[int, int]) -> int:
        return found.get(row, len(sequences[row].records))

    def _stop(self, row: int, count: int, found: dict[int, int]) -> None:
        self._stopped.add(row)
        found[row] = min(count, found.get(row, count))

    def _verdict(
        self, criterion: Any, ids: Tensor, scores: tuple[Tensor, ...] | None, count: int
    ) -> list[bool]:
        """Whether each row of ``ids [R, n]`` stops."""
        name = type(criterion).__name__
        try:
            done = torch.as_tensor(criterion(ids, scores)).reshape(-1).tolist()
        except Exception as error:
            raise DeliberateError(
                f"stopping_criteria {name} failed at generated token {count}: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        if len(done) not in (1, len(ids)):
            raise DeliberateError(
                f"stopping_criteria {name} gave {len(done)} verdicts for {len(ids)} sequences: "
                "return one bool a sequence"
            )
        return [bool(one) for one in done] * (len(ids) if len(done) == 1 else 1)


def _looks_at_one_row(criterion: Any) -> bool:
    kind = type(criterion)
    return kind.__name__ in _ROW_ALONE and kind.__module__ == _OF_TRANSFORMERS


def step_scores(sequences: Sequence[DecodingSequence], step: int) -> Tensor:
    """Processed scores of one step ``[B, V]``, minus infinity where a sequence had ended."""
    like: Any = next(sequence.scores[step] for sequence in sequences if len(sequence.scores) > step)
    ended = torch.full_like(like, float("-inf"))
    rows: list[Any] = [
        sequence.scores[step] if step < len(sequence.scores) else ended for sequence in sequences
    ]
    return torch.cat(rows)
