"""The watches over long texts, for the sequences of a pass: which states each of them gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deliberate.engine.segment_runner import SegmentRunner
from deliberate.engine.sequence import DecodingSequence


def observe(
    runner: SegmentRunner, rows: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
) -> list[int]:
    """Shows the watches ``hidden [N, d]``; the first token that each row's states predict.

    Args:
        counts: states of each row, its last ones.
    """
    firsts = [
        runner.token_range(sequence, count)[0] for sequence, count in zip(rows, counts, strict=True)
    ]
    parts = hidden.split(list(counts))
    for sequence, first, part in zip(rows, firsts, parts, strict=True):
        if sequence.watch is not None:
            sequence.watch.observe(sequence, first, part)
    return firsts


def observe_forced(
    runner: SegmentRunner, rows: Sequence[DecodingSequence], hidden: Tensor, counts: Sequence[int]
) -> None:
    """Shows the watches the states of tokens that were forced before the newest ones.

    Args:
        hidden: final states ``[R, M, d]``, of each row its last ``counts`` positions.
    """
    for place, (sequence, count) in enumerate(zip(rows, counts, strict=True)):
        if count > 1 and sequence.watch is not None:
            observe(runner, [sequence], hidden[place, :count], [count])


def observe_prompt(
    runner: SegmentRunner, sequence: DecodingSequence, hidden: Tensor, first: int
) -> None:
    """Shows a watch the states of a prompt that earlier requests of its text generated.

    Args:
        hidden: final states ``[M, d]`` of positions `first` and on, the prompt's last one at most.
    """
    watch = sequence.watch
    if watch is None or not watch.earlier:
        return
    # A token follows from the state of the position before it.
    begin = sequence.prompt_tokens - 1 - watch.earlier
    left_out = max(0, begin - first)
    if left_out < len(hidden):
        watch.observe(sequence, first + left_out - begin - watch.earlier, hidden[left_out:])


def reweighed(
    rows: Sequence[DecodingSequence], firsts: Sequence[int], counts: Sequence[int], logits: Tensor
) -> Tensor:
    """Logits ``[N, V]`` as the watches re-weigh them; the same tensor where none does."""
    parts = logits.split(list(counts))
    changed = [
        part if sequence.watch is None else sequence.watch.reweigh(sequence, first, part)
        for sequence, first, part in zip(rows, firsts, parts, strict=True)
    ]
    if all(new is old for new, old in zip(changed, parts, strict=True)):
        return logits
    return torch.cat(changed)
