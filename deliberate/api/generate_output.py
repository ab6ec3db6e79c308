"""What `generate` returns: transformers' output, with the traces of the generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from deliberate.api.stopping_criteria import step_scores
from deliberate.engine.decode_loop import DecodeLoop
from deliberate.policies.controller import BudgetReport
from deliberate.reasoning.chain_output import ChainResult
from deliberate.reasoning.vote_runner import VoteResult
from deliberate.trace import BatchTrace, GenerationTrace


@dataclass
class AdaptiveGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output with the traces of the generation.

    Attributes:
        sequences: prompts and generated ids, ``[B, n + new]``, finished rows padded at the end.
        scores: with ``output_scores``, one ``[B, V]`` a step: processed scores of the accepted
            token; rows that had finished hold minus infinity.
        past_key_values: a cache with the keys and values of all tokens but the last, where the
            caller gave one.
        trace: of a batch of 1: where each token was chosen and what was run for it.
        traces: the same for every sequence.
        batch: what they did together.
        budget: fidelity ``budget``: how the response stood to its budget.
        chains: with ``reasoning`` or ``votes``, of each sequence: tokens of reasoning, where and
            why it stopped, its probes and what they cost.
        votes: with ``votes``, of each prompt: the tally and all chains.
    """

    trace: GenerationTrace | None = None
    traces: list[GenerationTrace] | None = None
    batch: BatchTrace | None = None
    budget: BudgetReport | None = None
    chains: list[ChainResult] | None = None
    votes: list[VoteResult] | None = None


def padded(input_ids: Tensor, loop: DecodeLoop, pad: int) -> Tensor:
    """Prompts and generated ids ``[B, n + new]``, finished rows padded at the end."""
    made = [sequence.trace.tokens for sequence in loop.sequences]
    width = max(map(len, made))
    rows = [tokens + [pad] * (width - len(tokens)) for tokens in made]
    return torch.cat((input_ids, torch.tensor(rows, device=input_ids.device)), dim=1)


def scores_by_step(loop: DecodeLoop) -> tuple[Tensor, ...]:
    """One ``[B, V]`` a step, as transformers gives them."""
    width = max(len(sequence.records) for sequence in loop.sequences)
    return tuple(step_scores(loop.sequences, step) for step in range(width))
