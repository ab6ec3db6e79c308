"""An engine of an adaptive model: specs are resolved by the model's exits and policies."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from deliberate.api.decodable import DecodableModel
from deliberate.api.draft_source import SharedRows
from deliberate.api.loop_builder import Extent, Hooks, decoding_of
from deliberate.cache.block_cache import BlockCache
from deliberate.calibration.fingerprint import base_sha256
from deliberate.engine.engine import Engine
from deliberate.engine.request import Decoding, Request
from deliberate.engine.scheduler import Scheduler
from deliberate.modeling.backbone import Backbone
from deliberate.policies.budget import as_budget
from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hashing import json_sha256

# Requests share passes: what is measured and chosen for batches is right for them.
_SHARED = 2
_ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")


def build_engine(
    model: DecodableModel,
    *,
    max_running: int = 16,
    cache: Any = None,
    scheduler: Scheduler | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Engine:
    """As `AdaptiveModel.engine`."""
    source, reader = model.backbone_for(_SHARED), model.reader(_SHARED)
    backbone = source.with_rows()
    gate, draft_rows = model.gate, SharedRows()

    def resolve(request: Request, running: int) -> Decoding:
        if model.backbone_for(_SHARED) is not source or model.gate is not gate:
            raise DeliberateError("the model was changed since the engine was made: make a new one")
        budget = None if request.budget is None else as_budget(request.budget)
        ends = request.end_tokens
        extent = Extent(
            max_new_tokens=request.max_new_tokens,
            end_tokens=end_tokens(model.generation_config) if ends is None else ends,
            batch=_SHARED,
            load=running,
            draft_rows=draft_rows,
            prompt_tokens=len(request.prompt_ids),
            chooser=request.sampling,
            prompts=(request.prompt_ids,),
            constraints=() if request.constraint is None else (request.constraint,),
        )
        return decoding_of(model, request.spec, Hooks(), budget, extent, backbone)

    shares = isinstance(cache, BlockCache)
    if shares:
        kv_key(model, backbone)  # hashes the weights now, not while the first request waits

    return Engine(
        backbone,
        reader,
        model.exit_config.layers,
        resolve,
        max_running=max_running,
        cache=cache,
        scheduler=scheduler,
        max_pending=model.exit_config.max_pending,
        clock=clock,
        reuse_key=lambda: kv_key(model, backbone) if shares else None,
        turn=model.turn,
        gate=gate,
    )


def kv_key(model: DecodableModel, backbone: Backbone) -> str:
    """Names whatever makes keys and values of the same tokens differ: weights, adapters, executor.

    Weights that were changed in place since they were hashed give another key; see `Fingerprints`.
    What exits wrote without running a layer is never published, so fidelity is no part of it.
    """
    try:
        weights = model.fingerprints()[0]
    except DeliberateError:  # modules were replaced, as by an adapter: nothing kept is known to fit
        weights = base_sha256(model)
    plan = getattr(backbone, "plan", None)
    made = {
        "weights": weights,
        # Of adapters by peft, what the weights do not say: which are on, and how strongly.
        "adapters": [
            [str(getattr(one, name, None)) for name in _ADAPTER_STATE]
            for one in model.base.modules()
            if "lora_A" in one._modules or "lora_A" in vars(one)  # hasattr raises and catches
        ],
        "executor": type(backbone).__name__,
        "engine": str(getattr(backbone, "engine", "")),
        "storage": "" if plan is None else plan.described,
        "dtype": str(backbone.dtype),
    }
    return json_sha256(made)


class EngineSurface:
    """The method of `AdaptiveModel` that makes engines."""

    def engine(self, *, max_running: int = 16, **settings: Any) -> Engine:
        """An engine that decodes requests of this model as they come and go.

        Args:
            max_running: most requests that have a cache row at a time.
            **settings: cache, scheduler and clock of `deliberate.engine.engine.Engine`.
        """
        model: Any = self
        return build_engine(model, max_running=max_running, **settings)
