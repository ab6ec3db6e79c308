"""Hidden states after the exit layers of one forward pass, for training and recording."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput


@dataclass
class ExitStates(ModelOutput):
    """Hidden states of one forward pass, before the final norm.

    Attributes:
        exits: ``[B, T, d]`` after each exit layer, in the order of the exits.
        last: ``[B, T, d]`` after the last layer.
    """

    exits: tuple[Tensor, ...] | None = None
    last: Tensor | None = None


@contextmanager
def record_outputs(layers: nn.ModuleList, taps: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Records the hidden state after each of `taps` layers during one forward pass."""
    states: dict[int, Tensor] = {}

    def recorder(layer: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            states[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [layers[tap - 1].register_forward_hook(recorder(tap)) for tap in taps]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
