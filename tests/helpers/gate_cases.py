"""What the tests of deliberation gate share with others."""

from __future__ import annotations

import torch
from tiny_models import tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.modeling.deliberation_gate import (
    DeliberationGate,
    GateConfig,
)

NEW = 14


# Random models of 97 tokens are sure of nothing: about half of the tokens are below this.
BAND = 0.2


def shaken(gate: DeliberationGate, seed: int = 3, size: float = 0.4) -> None:
    """Random weights everywhere, so that a round moves the state a lot."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gate.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(size * noise)
        gate.mix.bias.fill_(1.0)


def gated_model(block: str = "transformer", arch: str = "llama", **changes) -> AdaptiveModel:
    model = AdaptiveModel(tiny_model(arch, layers=4), [1, 2])
    given = {"rounds": 3, "think_below": BAND, "block": block, "width": 24, "heads": 2} | changes
    shaken(model.attach_gate(GateConfig(**given)), size=0.4 if block == "transformer" else 1.0)
    return model.eval()


def decode(model, ids, mask, fidelity, **how):
    how = {"online": False, "max_new_tokens": NEW} | how
    out = model.generate(
        ids, attention_mask=mask, fidelity=fidelity, return_dict_in_generate=True, **how
    )
    return out


def tokens(out):
    return [trace.tokens for trace in out.traces]


def rounds(out):
    return [[record.rounds for record in trace.records] for trace in out.traces]
