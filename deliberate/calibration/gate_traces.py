"""Measuring a deliberation gate: what its rounds cost here, and what they do to reference texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from deliberate.calibration.collect import LOGIT_ELEMENTS, like_lengths, padded
from deliberate.calibration.gate_threshold import Thinking
from deliberate.cost.parts import PassCost, ThinkingCost
from deliberate.engine.deliberation import GateRunner
from deliberate.kernels.ops.exit_head import top_probability
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.deliberation_gate import DeliberationGate, think_over
from deliberate.modeling.model_view import ModelView
from deliberate.utils.errors import DeliberateError

# Timed repetitions, of which the median counts.
_TRIES = 9
# Tokens of the larger of the two timed rounds.
_SEVERAL = 8
# From this probability on no round is tried: what it could win is not worth its time.
TRIED = 0.999


@torch.inference_mode()
def measure_thinking(
    gate: DeliberationGate,
    backbone: Backbone,
    *,
    context: int = 128,
    clock: Callable[[], float] = time.perf_counter,
) -> ThinkingCost:
    """Times a gate at this context, on this machine.

    A round is that of a sequence in which nobody has thought before: the keys of its history are
    in it.
    """
    like = next(backbone.norm.parameters())
    device = backbone.device
    hidden = torch.randn(1, context + 1, backbone.hidden_size, dtype=like.dtype, device=like.device)
    prompt = backbone.context(0, context, device=device)
    token = backbone.context(context, 1, device=device)
    newest = hidden[:, context:]
    logits = backbone.logits(newest[0])

    def timed(run: Callable[[GateRunner], object], *, remembered: bool) -> float:
        samples = []
        for _ in range(_TRIES):
            runner = GateRunner(gate, backbone, [])
            runner.begin([context], hidden[:, :context], prompt)
            if remembered:
                runner.remember(newest, token)
            _synchronise(device)
            began = clock()
            run(runner)
            _synchronise(device)
            samples.append(clock() - began)
        return float(np.median(samples))

    def keep(runner: GateRunner) -> None:
        runner.remember(newest, token)
        runner.probabilities(logits)

    def think(tokens: int) -> Callable[[GateRunner], object]:
        state = newest[0].expand(tokens, -1).contiguous()
        return lambda runner: runner.round(state, [0] * tokens, [context] * tokens)

    remember = timed(keep, remembered=False)
    one = timed(think(1), remembered=True)
    each = max(0.0, timed(think(_SEVERAL), remembered=True) - one) / (_SEVERAL - 1)
    each = min(each, one)
    return ThinkingCost(remember, PassCost(one - each, per_row=each))


@torch.no_grad()
def record_thinking(
    model: ModelView,
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    *,
    batch_tokens: int = 8192,
) -> Thinking:
    """What the model's gate does to the tokens of reference texts, in teacher-forced passes.

    Every token below `TRIED` takes all rounds of the gate, whatever its band.

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
            states = think_over(gate, last, wanted, model.backbone.logits, think_below=2.0).states[
                -1
            ]
            after, _ = _top(model.backbone, states)
            right = targets[wanted]
            change = (after == right).to(torch.int8) - (before[trying] == right).to(torch.int8)
            helped[trying] = change
        probabilities.append(sure.float().cpu().numpy())
        helps.append(helped.cpu().numpy())
    return Thinking(np.concatenate(probabilities), np.concatenate(helps), gate.config.rounds, TRIED)


def _top(backbone: Backbone, states: Tensor) -> tuple[Tensor, Tensor]:
    """Token and probability ``[N]`` of states ``[N, d]``, few enough logits at a time."""
    block = max(1, LOGIT_ELEMENTS // backbone.vocab_size)
    parts = [top_probability(backbone.logits(some)) for some in states.split(block)]
    tokens, probabilities = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(probabilities)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
