"""Greedy answers to many prompts, in left-padded batches: for figures in which time has no part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from deliberate.api.model import AdaptiveModel
from deliberate.engine.exit_policy import FixedPolicy
from deliberate.eval.runner.partial_file import AnswerLog
from deliberate.eval.runner.runner import plain_greedy
from deliberate.utils.end_tokens import end_tokens


def decode_answers(
    model: AdaptiveModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch: int,
    thresholds: Sequence[float] | None = None,
    gate_threshold: float | None = None,
    title: str | None = None,
    log: AnswerLog | None = None,
) -> list[tuple[int, ...]]:
    """Token ids of each answer, up to and with the token that ends it.

    Args:
        prompts: token ids, none empty.
        max_new_tokens: at most so many tokens an answer.
        batch: prompts decoded at once; like lengths are put together.
        thresholds: least raw scores at which a token exits, one per exit, infinity for never;
            dense if None.
        gate_threshold: of the deliberation gate, with `thresholds`; None for its own.
        title: of the progress bar; none without one.
        log: where batches are kept, and taken from if they were decoded before.
    """
    ends = end_tokens(model.base.generation_config, tokenizer)
    how: dict[str, Any] = {"fidelity": "dense"}
    if thresholds is not None:
        how = {"fidelity": "threshold", "exit_policy": FixedPolicy(thresholds, gate_threshold)}
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    answers: list[tuple[int, ...]] = [()] * len(prompts)
    bar = tqdm(total=len(prompts), desc=title, disable=None if title else True, leave=False)
    with bar, plain_greedy(model, ends):
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]

            def decode(rows: Sequence[int] = rows) -> list[tuple[int, ...]]:
                longest = len(prompts[rows[-1]])
                ids = torch.full((len(rows), longest), ends[0])
                mask = torch.zeros_like(ids)
                for line, row in enumerate(rows):
                    ids[line, longest - len(prompts[row]) :] = torch.as_tensor(prompts[row])
                    mask[line, longest - len(prompts[row]) :] = 1
                made = model.generate(
                    ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    max_new_tokens=max_new_tokens,
                    **how,
                )
                return [_until_end(ids[longest:].tolist(), ends) for ids in made]

            found = decode() if log is None else log.take(rows, decode)
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
            bar.update(len(rows))
    return answers


def _until_end(ids: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    for place, token in enumerate(ids):
        if token in ends:
            return tuple(ids[: place + 1])
    return tuple(ids)
