"""Recording what a model's exits say of answers, teacher-forced.

The layers and heads are those that decode: an executor of our own runs one text after another by
its kernels, in the storage that its weights have; transformers' modules run batches of like length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deliberate.calibration.exit_traces import Recording
from deliberate.engine.exit_policy import state_similarity
from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.modeling.deliberation_gate import refined_states
from deliberate.modeling.measures import MAX_PROB, MEASURES
from deliberate.modeling.model_view import ModelView
from deliberate.utils.errors import DeliberateError

# Logits of one block of rows: 16 Mi elements are 64 MiB in float32, whatever the vocabulary.
LOGIT_ELEMENTS = 1 << 24
# States of one text at every exit and after the last layer, ``[T, d]`` each, and which sequence and
# place within it each row of them is of.
_Read = tuple[list[Tensor], Any, Any]


@torch.no_grad()
def record_sequences(
    model: ModelView,
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    *,
    groups: Sequence[str] = (),
    meta: Mapping[str, Any] | None = None,
    batch_tokens: int = 8192,
    note: Callable[[int], None] = lambda sequences: None,
) -> Recording:
    """Records what the exits say at every answer token, in teacher-forced passes.

    Every measure is recorded; `scores` is the model's own, computed as decoding computes it.

    Args:
        model: in eval mode.
        sequences: token ids, prompt and answer.
        prompt_lengths: tokens of each prompt, at least 1; the rest is the answer. A sequence
            without an answer contributes no token.
        groups: one name per sequence, or none.
        meta: JSON-ready, kept with the recording.
        batch_tokens: at most so many positions, padding included, in one pass of transformers'
            modules.
        note: called with the number of sequences that were read since it was called last.
    """
    if len(sequences) != len(prompt_lengths):
        raise DeliberateError(
            f"{len(prompt_lengths)} prompt lengths for {len(sequences)} sequences"
        )
    for row, (whole, prompt) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        if not 1 <= prompt <= len(whole):
            raise DeliberateError(
                f"sequence {row}: a prompt of {prompt} tokens does not fit its {len(whole)} tokens"
            )
    if not sequences:
        raise DeliberateError("there is no sequence to record")
    parts: list[tuple[Any, ...]] = []
    passes = _by_executor if _executor_reads(model) else _by_modules
    for count, (hidden, sequence, position) in passes(
        model, sequences, prompt_lengths, batch_tokens
    ):
        parts.append((*_read(model, hidden), sequence, position))
        note(count)
    names = list(MEASURES)
    every, tokens, similarities, final, final_scores, sequence, position = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    order = np.lexsort((position, sequence))
    measure = model.exit_config.measure
    by_name = {name: every[order, :, i].astype(np.float32) for i, name in enumerate(names)}
    return Recording(
        layers=model.exit_config.layers,
        num_layers=model.backbone.num_layers,
        measure=measure,
        scores=by_name[measure],
        tokens=tokens[order].astype(np.int32),
        final=final[order].astype(np.int32),
        final_scores=final_scores[order].astype(np.float32),
        sequence=sequence[order].astype(np.int32),
        position=position[order].astype(np.int32),
        meta=dict(meta or {}),
        groups=tuple(groups),
        others={name: by_name[name] for name in names if name != measure},
        similarities=similarities[order].astype(np.float32),
    )


def _executor_reads(model: ModelView) -> bool:
    """Whether an executor of our own runs the texts: the gate's rounds are by modules."""
    return model.gate is None and isinstance(model.backbone, FusedBackbone)


@torch.inference_mode()
def _by_executor(
    model: ModelView,
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    _batch_tokens: int,
) -> Iterator[tuple[int, _Read]]:
    """One text after another by the executor that decodes."""
    backbone, ends = model.backbone, (*model.exit_config.layers, model.backbone.num_layers)
    for row, (ids, prompt) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        # The last token chooses nothing that is recorded.
        length = max(1, len(ids) - 1)
        cache = backbone.new_cache(length)
        ctx = backbone.context(0, length, device=backbone.device)
        hidden = backbone.embed(torch.tensor([list(ids[:length])], device=backbone.device), ctx)
        picked, first = [], 0
        for last in ends:
            hidden = backbone.run_layers(hidden, first, last, ctx, cache)
            picked.append(hidden[0, prompt - 1 : len(ids) - 1].clone())
            first = last
        place = np.arange(len(ids) - prompt)
        yield 1, (picked, np.full(len(place), row), place)


def _by_modules(
    model: ModelView,
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    batch_tokens: int,
) -> Iterator[tuple[int, _Read]]:
    """Batches of texts of like length by the wrapped model's own forward."""
    for rows in like_lengths([len(ids) for ids in sequences], batch_tokens):
        ids, predicts = padded(rows, sequences, prompt_lengths)
        # padding stands on the right, where causality hides it from every real token
        states = model(ids.to(model.device), output_exit_states=True)
        picked = predicts.to(model.device)
        hidden = [state[picked] for state in states.exits]
        logits = model.backbone.logits
        hidden.append(refined_states(model.gate, states.last, picked, logits))
        line_of, place = np.nonzero(predicts.numpy())
        sequence = np.asarray(rows)[line_of]
        yield len(rows), (hidden, sequence, place - (np.asarray(prompt_lengths)[sequence] - 1))


def padded(
    rows: Sequence[int], sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Ids ``[B, T]`` of these sequences, and bool ``[B, T]``: states that choose answer tokens."""
    longest = max(len(sequences[row]) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.int64)
    predicts = torch.zeros((len(rows), longest), dtype=torch.bool)
    for line, row in enumerate(rows):
        ids[line, : len(sequences[row])] = torch.as_tensor(sequences[row])
        # the state at position t chooses token t + 1
        predicts[line, prompt_lengths[row] - 1 : len(sequences[row]) - 1] = True
    return ids, predicts


def like_lengths(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Sequences of like length together, each batch within `limit` positions (or one alone)."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * lengths[row] > limit:
            batches.append([])
        batches[-1].append(row)
    return batches


def _read(model: ModelView, hidden: Sequence[Tensor]) -> tuple[Any, ...]:
    """Scores ``[N, K, measures]``, tokens and similarities ``[N, K]`` of states at the exits.

    Then token and score ``[N]`` of full depth.
    """
    block = max(1, LOGIT_ELEMENTS // model.backbone.vocab_size)
    columns: list[tuple[Tensor, ...]] = []
    # at least one block, so that no rows give empty columns of the right widths
    for start in range(0, max(1, len(hidden[0])), block):
        rows = [state[start : start + block] for state in hidden]
        exits = [_read_exit(model, index, state) for index, state in enumerate(rows[:-1])]
        scores = torch.stack([score for score, _ in exits], dim=1)
        tokens = torch.stack([token for _, token in exits], dim=1)
        alike = [torch.zeros_like(scores[:, 0, 0])]
        alike += [state_similarity(state, below) for below, state in pairwise(rows[:-1])]
        columns.append((scores, tokens, torch.stack(alike, dim=1), *_read_top(model, rows[-1])))
    return tuple(torch.cat(column).cpu().numpy() for column in zip(*columns, strict=True))


def _read_top(model: ModelView, state: Tensor) -> tuple[Tensor, Tensor]:
    """Token and score ``[N]`` of full depth."""
    measure, backbone = model.exits.measure, model.backbone
    if measure is MAX_PROB or measure.before_head:
        found = backbone.read_full_depth(state)
        tokens = torch.tensor(found.tokens, dtype=torch.int64)
        return tokens, torch.tensor(found.probabilities, dtype=torch.float32)
    token, score = measure.score(backbone.logits(state))
    return token, score.float()


def _read_exit(model: ModelView, index: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """Every measure ``[N, measures]`` and the token ``[N]`` of one exit."""
    token, scores = model.reader().every_score(index, state)
    return torch.stack([scores[name].float() for name in MEASURES], dim=-1), token
