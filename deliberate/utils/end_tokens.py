"""Which tokens end an answer."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def end_tokens(settings: Any, tokenizer: Any = None) -> tuple[int, ...]:
    """Ids that end an answer: the generation settings' own, or else the tokenizer's.

    Args:
        settings: a transformers `GenerationConfig`, or None. Its ``eos_token_id`` is an id, several
            (list, tuple or tensor), or None.
        tokenizer: whose end token is taken where the settings name none; None for no other.

    Returns:
        Empty where neither names one: only the limit ends an answer then.
    """
    end: Any = None if settings is None else settings.eos_token_id
    if end is None and tokenizer is not None:
        end = tokenizer.eos_token_id
    if end is None:
        return ()
    if isinstance(end, Tensor):
        end = end.reshape(-1).tolist()
    return tuple(int(one) for one in end) if isinstance(end, list | tuple) else (int(end),)
