"""What a deliberation gate's rounds do to the tokens of reference texts, recorded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deliberate.calibration.collect import LOGIT_ELEMENTS, like_lengths, padded
from deliberate.calibration.gate_threshold import GateRounds
from deliberate.kernels.ops.exit_head import top_probability
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.deliberation_gate import run_rounds
from deliberate.modeling.model_view import ModelView
from deliberate.utils.errors import DeliberateError

# From this probability on no round is tried: what it could win is not worth its time.
TRIED = 0.999


@torch.no_grad()
def record_rounds(
    model: ModelView,
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    *,
    batch_tokens: int = 8192,
) -> GateRounds:
    """What the model's gate does to the tokens of reference texts, in teacher-forced passes.

    Every token below `TRIED` takes all rounds of the gate, whatever its threshold.

    Args:
        sequences: token ids, prompt and reference answer.
        prompt_lengths: tokens of each prompt, at least 1.

    Raises:
        DeliberateError: a model without a gate, or lengths that do not match.
    """
    gate = model.gate
    if gate is None:
        raise DeliberateError("the model has no deliberation gate whose rounds could be recorded")
    if len(sequences) != len(prompt_lengths):
        raise DeliberateError(
            f"{len(prompt_lengths)} prompt lengths for {len(sequences)} sequences"
        )
    probabilities, helps = [], []
    for rows in like_lengths([len(ids) for ids in sequences], batch_tokens):
        made = padded(rows, sequences, prompt_lengths)
        ids, predicts = made[0].to(model.device), made[1].to(model.device)
        last = model(ids, output_exit_states=True).last
        targets = ids.roll(-1, dims=1)
        before, sure = _top(model.backbone, last[predicts])
        helped = torch.zeros_like(before, dtype=torch.int8)
        trying = sure < TRIED
        wanted = predicts.clone()
        wanted[predicts] = trying
        if trying.any():
            states = run_rounds(gate, last, wanted, model.backbone.logits, think_below=2.0).states[
                -1
            ]
            after, _ = _top(model.backbone, states)
            right = targets[wanted]
            change = (after == right).to(torch.int8) - (before[trying] == right).to(torch.int8)
            helped[trying] = change
        probabilities.append(sure.float().cpu().numpy())
        helps.append(helped.cpu().numpy())
    return GateRounds(
        np.concatenate(probabilities), np.concatenate(helps), gate.config.rounds, TRIED
    )


def _top(backbone: Backbone, states: Tensor) -> tuple[Tensor, Tensor]:
    """Token and probability ``[N]`` of states ``[N, d]``, few enough logits at a time."""
    block = max(1, LOGIT_ELEMENTS // backbone.vocab_size)
    parts = [top_probability(backbone.logits(some)) for some in states.split(block)]
    tokens, probabilities = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(probabilities)
