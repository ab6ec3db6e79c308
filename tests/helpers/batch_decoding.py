"""Batches of random prompts, decoded together and each by itself."""

from __future__ import annotations

import torch
from tiny_models import random_ids

from deliberate.api.model import AdaptiveModel
from deliberate.config import Fidelity
from deliberate.engine.decode_loop import DecodeLoop
from deliberate.engine.exit_policy import CallablePolicy
from deliberate.engine.loop_settings import LoopSettings

NEW = 16


def alone(model: AdaptiveModel, ids: torch.Tensor, mask: torch.Tensor, **settings) -> list:
    """Dense tokens of each prompt decoded by itself."""
    made = []
    for own, keep in zip(ids, mask, strict=True):
        out = model.generate(
            own[keep.bool()].unsqueeze(0),
            attention_mask=keep[keep.bool()].unsqueeze(0),  # else a 0 in the text means padding
            fidelity="dense",
            return_dict_in_generate=True,
            **settings,
        )
        made.append(out.trace.tokens)
    return made


def together(model: AdaptiveModel, ids, mask, fidelity="exact", **settings):
    settings = {"online": False} | settings
    return model.generate(
        ids, attention_mask=mask, fidelity=fidelity, return_dict_in_generate=True, **settings
    )


def tokens(out) -> list:
    return [trace.tokens for trace in out.traces]


def make_loop(model: AdaptiveModel, fidelity=Fidelity.EXACT, **settings) -> DecodeLoop:
    settings = {"max_pending": 6, "max_new_tokens": NEW} | settings
    settings = {"exits": (2,), "thresholds": (0.5,), "fidelity": fidelity} | settings
    decide = settings.pop("decide", None)
    policy = None if decide is None else CallablePolicy(decide)
    wanted = LoopSettings(**settings)
    return DecodeLoop(model.backbone, model.reader(), wanted, exit_policy=policy)


def prompts(*lengths: int) -> list[torch.Tensor]:
    return [random_ids(length, seed=length)[0] for length in lengths]
