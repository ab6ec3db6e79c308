"""Which cheaper run of the model drafts, where ``drafts`` asks for one.

What runs the drafts lives as long as the model, and so do the estimates of what they are worth: it
is built at the first request that asks for it, and again where weights have changed.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch

from deliberate.api.decodable import DecodableModel
from deliberate.engine.draft_lengths import DraftLengths, DraftPrior
from deliberate.engine.loop_settings import Stopwatch
from deliberate.engine.model_drafts import ModelDrafts
from deliberate.engine.ngram_drafts import NgramDrafts
from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.executors.fused.implementation import LayerEngine
from deliberate.executors.model_drafter import ModelDrafter
from deliberate.executors.quantization import Storage
from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError

# First estimates by tenth of confidence: the share of drafts that is accepted, and how many of the
# drafts there are (SmolLM2-135M-Instruct, 16 and 8 questions of GSM8K's training set, four drafts a
# pass: 845 by weights of 4 bits, 405 by 8). Missing layers lose more: 45 to 72 of 100 are accepted.
_ACCEPTED = {
    "int4": (0.2, 0.35, 0.6, 0.68, 0.74, 0.85, 0.96, 0.97, 0.99, 0.99),
    "int8": (0.8, 0.85, 0.95, 0.97, 0.97, 0.99, 0.99, 0.99, 0.99, 0.99),
}
_SHARES = (0.01, 0.03, 0.06, 0.1, 0.1, 0.08, 0.07, 0.11, 0.11, 0.33)
_WITHOUT = DraftPrior(acceptance=tuple(0.1 + 0.09 * tenth for tenth in range(10)))
# Observations that these weigh as much as: another model's are other ones.
_WEIGHT = 64.0


def drafts_by_model(
    model: DecodableModel, how: str | tuple[int, ...], backbone: Backbone, most: int, lookup: int
) -> ModelDrafts:
    """Drafts of one sequence.

    Args:
        how: ``drafts`` of the spec.
        backbone: what decodes the sequence.
        most: drafts of a pass at most.
        lookup: n-gram drafts of a pass at most, 0 for none.

    Raises:
        DeliberateError: this model, or what runs it, has no such cheaper run.
    """
    held: dict[str, Any] = vars(model)
    drafters: _Drafters = held.setdefault("_drafters", _Drafters())
    drafter, lengths = drafters.of(how, backbone, most)
    on_cpu = torch.device(backbone.device).type == "cpu"
    return ModelDrafts(
        drafter,
        lengths,
        lookup=NgramDrafts(lookup) if lookup else None,
        clock=Stopwatch(on_cpu=on_cpu).work,
    )


class _Drafters:
    """What drafts for one model; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[Any, tuple[Backbone, ModelDrafter, float]] = {}
        self._lengths: dict[Any, DraftLengths] = {}

    def __reduce__(self) -> Any:  # weights and locks are of this process
        return _Drafters, ()

    def of(
        self, how: str | tuple[int, ...], backbone: Backbone, most: int
    ) -> tuple[ModelDrafter, DraftLengths]:
        """What drafts over this backbone's keys and values, and what that is worth."""
        with self._lock:
            held = self._held.get(how)
            try:
                if held is None or held[0] is not backbone:
                    made = _by_layers if isinstance(how, tuple) else _by_storage
                    held = self._held[how] = backbone, *made(how, backbone)
                    self._lengths.clear()
                elif isinstance(held[1].backbone, FusedBackbone):
                    held[1].backbone.refresh(same_modules=True)
            except DeliberateError as error:
                if str(error).startswith("drafts="):
                    raise
                # Of an executor: the model is in another dtype now, or on another device.
                raise DeliberateError(f"drafts={how!r}: {error}; leave drafts out") from None
            _, drafter, cost = held
            key = how, most
            if key not in self._lengths:
                prior = _WITHOUT if isinstance(how, tuple) else _rounded(how)
                prior = dataclasses.replace(prior, draft_cost=cost)
                self._lengths[key] = DraftLengths(prior, most, weight=_WEIGHT)
            return drafter, self._lengths[key]


def _rounded(storage: str) -> DraftPrior:
    accepted = _ACCEPTED["int4" if storage == "int4" else "int8"]
    return DraftPrior(acceptance=accepted, shares=_SHARES)


def _by_layers(layers: Any, backbone: Backbone) -> tuple[ModelDrafter, float]:
    depth = backbone.num_layers
    if layers[-1] > depth or len(layers) == depth:
        raise DeliberateError(
            f"drafts={list(layers)}: the model has {depth} layers; name some of them, not all, "
            "e.g. what `deliberate bench subset` finds"
        )
    # The head is evaluated for each draft: a guess until it is measured.
    return ModelDrafter(backbone, [one - 1 for one in layers]), (len(layers) + 1) / (depth + 1)


def why_not_rounded(name: str, backbone: Backbone) -> str | None:
    """Why a model cannot draft by its weights in this storage; None where it can."""
    if not isinstance(backbone, FusedBackbone) or backbone.engine is not LayerEngine.NATIVE:
        return "the C++ kernels do not run this model here, and only they read such weights"
    if Storage.FILE in backbone.plan.layers:
        return "its weights stay in a GGUF file: load them with another weights="
    if Storage(name) in backbone.plan.layers:
        return "its weights are stored so already"
    return None


def _by_storage(name: Any, backbone: Backbone) -> tuple[ModelDrafter, float]:
    reason = why_not_rounded(name, backbone)
    if reason is not None:
        raise DeliberateError(f"drafts={name!r}: {reason}; leave drafts out")
    assert isinstance(backbone, FusedBackbone)
    # The head in as few bits as the layers: it is a quarter of a draft's time, and no fewer drafts
    # are accepted.
    smaller = FusedBackbone(
        backbone.model, weights=name, head=name, share=False, engine=LayerEngine.NATIVE
    )
    return ModelDrafter(smaller), smaller.bytes_per_token / backbone.bytes_per_token
