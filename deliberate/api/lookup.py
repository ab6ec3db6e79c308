"""Whether the drafts of a generation come from a draft layer or from the text, not from exits.

``draft_tokens`` and ``lookup_tokens`` are for exact mode of one sequence. Where they are not
given, a draft layer drafts at most 6 tokens if the model has one; and at most 6 are looked up if
it has one or its exits were never trained and no threshold is given: evaluating those would only
cost time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch

from deliberate.api.draft_files import base_sample
from deliberate.api.draft_source import DEFAULT_DRAFTS
from deliberate.api.model_drafts import why_not_rounded
from deliberate.config import Fidelity
from deliberate.engine.ngram_drafts import DEFAULT_TOKENS
from deliberate.engine.spec import DecodingSpec
from deliberate.executors.quantization import Storage
from deliberate.modeling.block_modules import weight_count
from deliberate.policies.guarantee_settings import storage_of
from deliberate.utils.errors import DeliberateError
from deliberate.utils.resident import release_file_pages, trim_heap

# Minutes that `deliberate fit` takes for a model of so many weights on one thread: SmolLM2-135M,
# default settings, by the rates of its parts in docs/training.md.
_FIT_MINUTES, _FIT_WEIGHTS = 12.0, 134.5e6
# Weights that no processor's caches hold in float32; a smaller model's rounded pass saves little.
_BEYOND_CACHES = 50e6
# Whether this thread loads a model for its weights alone.
_WEIGHTS_ALONE: ContextVar[bool] = ContextVar("weights_alone", default=False)


@contextlib.contextmanager
def weights_alone() -> Iterator[None]:
    """Models that are loaded inside decode nothing: no line on exact mode is logged."""
    token = _WEIGHTS_ALONE.set(True)
    try:
        yield
    finally:
        _WEIGHTS_ALONE.reset(token)


def announced(model: Any, name: str, sample: str | None = None) -> Any:
    """The model that was loaded, after one logged line on what exact mode does with it.

    What runs a draft layer is built now, not at the first request. Models with trained exits and
    no draft layer do what their exits say, and nothing is logged.

    Args:
        sample: `base_sample` of the weights that its drafts were fitted on; None: unknown.
    """
    _settle(model)
    if _WEIGHTS_ALONE.get():
        return model
    if model.draft is not None:
        model.draft.build(model.backbone)
        survives = model.draft.prior.survives[:DEFAULT_DRAFTS]
        layers = ", ".join(map(str, model.exit_config.layers))
        found = base_sample(model.backbone)
        other = None not in (sample, found) and sample != found
        logging.getLogger("deliberate").warning(
            "%s: exact mode verifies drafts of a draft layer%s and of the text; its exits after "
            "layers %s serve threshold, budget and certified%s%s", name,
            f" (up to {1 + sum(survives):.1f} tokens a pass on held-out text)" if survives else "",
            layers, _certified_by(model),
            "; the base weights are not those that the drafts were fitted on, so fewer may be "
            "accepted" if other else "",
        )  # fmt: skip
        _settle(model)
    elif model.exits.unproven:
        minutes = max(1, round(_FIT_MINUTES * weight_count(model.base) / _FIT_WEIGHTS))
        rounded = "; drafts='int4' drafts by its own weights, rounded, without training"
        logging.getLogger("deliberate").warning(
            "%s: no trained exits: n-gram drafts only; `deliberate fit %s out=DIR` takes about %d "
            "minute%s%s", name, name, minutes, "s" if minutes > 1 else "",
            rounded if _rounded_drafts_pay(model) else "",
        )  # fmt: skip
    return model


def _certified_by(model: Any) -> str:
    """What a request with a guarantee must name, where the model has certificates."""
    held = model.calibration
    certificates = () if held is None else held.certificates
    if not certificates:
        return ""
    risks = " or ".join(sorted({f"risk={one.risk}" for one in certificates}))
    own = storage_of(model)
    storages = [one.conditions.get("storage", own) for one in certificates]
    if own in storages:
        return f" ({risks})"
    named = sorted({"float" if one == "native" else str(one) for one in storages})
    return f" ({risks}, and weights={' or '.join(named)} alone)"


def _rounded_drafts_pay(model: Any) -> bool:
    """Where reading float32 or bfloat16 weights from memory is most of a pass."""
    backbone = model.backbone
    plan = getattr(backbone, "plan", None)
    return (
        plan is not None
        and {*plan.layers, plan.head} <= {Storage.NATIVE, Storage.BF16}
        and backbone.dtype is torch.float32
        and weight_count(model.base) >= _BEYOND_CACHES
        and why_not_rounded("int4", backbone) is None
    )


def _settle(model: Any) -> None:
    """Gives back what reading and laying out weights has left in memory."""
    drafts = () if model.draft is None else model.draft.layer.parameters()
    read = [*model.exits.parameters(), *drafts]
    plan = getattr(model.backbone, "plan", None)
    if plan is not None and not plan.native:
        read += model.base.parameters()  # decoded from copies in another form
    release_file_pages(read)
    trim_heap()


def draft_limits(
    model: Any, spec: DecodingSpec, hooks: Any, fidelity: Fidelity, batch: int
) -> tuple[int, int]:
    """Most drafts of a pass by the draft layer, and most that are looked up; 0 for none.

    With any of either, exits are not evaluated.

    Args:
        hooks: of the caller, `deliberate.api.loop_builder.Hooks`.
        fidelity: of the decode loop; ``exact`` too where exact mode meets a guarantee.

    Raises:
        DeliberateError: ``draft_tokens`` or ``lookup_tokens`` was given and cannot be obeyed.
    """
    reason = None
    if fidelity is not Fidelity.EXACT:
        reason = f"fidelity {str(fidelity)!r} verifies no drafts, use 'exact'"
    elif batch != 1:
        reason = f"a batch of {batch}: drafts are looked up for one sequence"
    elif hooks.decide is not None or spec.thresholds is not None:
        reason = "thresholds and decide are of exits, which are not evaluated then"
    elif hooks.exit_policy is not None or not spec.online:
        reason = "exit_policy and online=False are of exits, which are not evaluated then"
    elif spec.strict:
        reason = "strict mode re-runs drafts that exits made, leave strict out"
    elif model.backbone.rope_switch is not None:
        reason = "the model's rotary frequencies change at a length that a pass may cross"
    for name in ("lookup_tokens", "draft_tokens", "drafts"):
        given = getattr(spec, name)
        if given and reason is not None:
            raise DeliberateError(f"{name}={given!r}: {reason}; leave {name} out")
    if spec.draft_tokens and spec.drafts is None and model.draft is None:
        raise DeliberateError(
            f"draft_tokens={spec.draft_tokens}: the model has no draft layer; train one with "
            "`deliberate fit`, or leave draft_tokens out"
        )
    if reason is not None:
        return 0, 0
    drafted = spec.draft_tokens
    if drafted is None:
        none = model.draft is None and spec.drafts is None
        drafted = 0 if none else DEFAULT_DRAFTS
    looked_up = spec.lookup_tokens
    if looked_up is None:
        looked_up = DEFAULT_TOKENS if drafted or model.exits.unproven else 0
    return drafted, looked_up
