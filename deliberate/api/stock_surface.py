"""What callers of a transformers model expect to find on it, taken from the wrapped model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deliberate.modeling.block_modules import weight_count


class StockSurface(nn.Module):
    """A module that wraps a transformers model as `base` and can be used where one is expected.

    transformers' pipelines, trainers and servers read these; all are the wrapped model's own.
    """

    base: Any

    @property
    def config(self) -> Any:
        """The wrapped model's configuration."""
        return self.base.config

    @property
    def generation_config(self) -> Any:
        """The defaults of `generate`; may be changed or replaced."""
        return self.base.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.base.generation_config = config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the wrapped model's weights."""
        return self.base.dtype

    @property
    def name_or_path(self) -> str:
        """Where the wrapped model came from."""
        return self.base.name_or_path

    @property
    def input_modalities(self) -> Any:
        """What the wrapped model reads."""
        return self.base.input_modalities

    @property
    def output_modalities(self) -> Any:
        """What the wrapped model writes."""
        return self.base.output_modalities

    def can_generate(self) -> bool:
        """True: `generate` is what this wrapper is for."""
        return True

    def trainable_parameters(self) -> tuple[int, int]:
        """Parameters that would be trained, and all weights, those in a file's blocks included."""
        trained = sum(one.numel() for one in self.parameters() if one.requires_grad)
        return trained, weight_count(self)

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters would be trained, as PEFT does."""
        trained, every = self.trainable_parameters()
        print(f"trainable params: {trained:,} || all params: {every:,} || {trained / every:.4%}")
