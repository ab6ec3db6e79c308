"""Waiting for a device before a clock is read."""

from __future__ import annotations

import torch


def synchronize(device: torch.device | None = None) -> None:
    """Waits until a GPU has done the work given to it; a CPU has done it when a call returns.

    Args:
        device: None for the current GPU, where there is one.
    """
    if device is None and not torch.cuda.is_available():
        return
    if device is None or device.type == "cuda":
        torch.cuda.synchronize(device)
