"""Decoding with a model that is in training mode."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from deliberate.config import Fidelity
from deliberate.utils.errors import DeliberateError

# Attributes by which attention and routing modules of transformers are told to add noise.
_NOISE = ("attention_dropout", "jitter_noise")
_TURN = threading.RLock()
_GUARANTEES = (Fidelity.EXACT, Fidelity.CERTIFIED, Fidelity.BUDGET)


@contextmanager
def checkpointing_off(layers: nn.ModuleList) -> Iterator[None]:
    """Turns gradient checkpointing off and on again.

    In training mode transformers' layers are given no cache while it is on, since it runs them
    twice; decoding takes no gradients. Threads that decode in training mode take turns: one that
    ends would turn it on under another.
    """
    if not any(layer.training for layer in layers):
        yield
        return
    with _TURN:
        held: list[Any] = [one for one in layers if getattr(one, "gradient_checkpointing", False)]
        for layer in held:
            layer.gradient_checkpointing = False
        try:
            yield
        finally:
            for layer in held:
                layer.gradient_checkpointing = True


def refuse_noise(base: nn.Module, fidelity: Fidelity) -> None:
    """Refuses a guarantee where a module in training mode draws at random.

    Raises:
        DeliberateError: names the module and what it draws.
    """
    if not base.training or fidelity not in _GUARANTEES:
        return
    for name, module in base.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            raise _noise(name, "p", module.p, fidelity)
        for attribute in _NOISE:
            value = getattr(module, attribute, None)
            if isinstance(value, float) and value > 0 and module.training:
                raise _noise(name, attribute, value, fidelity)


def _noise(name: str, attribute: str, value: float, fidelity: Fidelity) -> DeliberateError:
    return DeliberateError(
        f"fidelity {str(fidelity)!r} in training mode with {attribute}={value} in {name}: drafts "
        "and full depth would drop different units; call model.eval() first"
    )
