"""Whether a generation looks its drafts up in the text instead of evaluating exits.

``lookup_tokens`` is for exact mode of one sequence. Where it is not given it is 6 if the exits were
never trained and no threshold is given, since evaluating them would only cost time; else none.
"""

from __future__ import annotations

from typing import Any

from deliberate.config import Fidelity
from deliberate.engine.ngram_drafts import DEFAULT_TOKENS
from deliberate.engine.spec import DecodingSpec
from deliberate.utils.errors import DeliberateError


def lookup_tokens(
    model: Any, spec: DecodingSpec, hooks: Any, fidelity: Fidelity, batch: int
) -> int:
    """Most drafts of a pass that are looked up, 0 for none; with any, exits are not evaluated.

    Args:
        hooks: of the caller, `deliberate.api.loop_builder.Hooks`.
        fidelity: of the decode loop; ``exact`` too where exact mode meets a guarantee.

    Raises:
        DeliberateError: ``lookup_tokens`` was given and cannot be obeyed.
    """
    given = spec.lookup_tokens
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
    if given:
        if reason is not None:
            raise DeliberateError(f"lookup_tokens={given}: {reason}; leave lookup_tokens out")
        return given
    if given is not None or reason is not None:
        return 0
    return DEFAULT_TOKENS if model.exits.unproven else 0
