"""What the tests of the CUDA executor share: passes by the ops, and a device that takes notes."""

from __future__ import annotations

from collections.abc import Callable

import kernel_cases as kernels
import pytest
import torch

from deliberate.api.model import AdaptiveModel
from deliberate.executors.fused.cuda.backbone import CudaFusedBackbone
from deliberate.executors.fused.cuda.graphs import HostDevice

# Where the Triton kernels run; they leave float64 to torch's references.
ON_GPU = kernels.DEVICE == "cuda"
DTYPE = torch.float32 if ON_GPU else torch.float64
cpu_only = pytest.mark.skipif(ON_GPU, reason="written for a CPU; generations run on a GPU too")


class Recorder(HostDevice):
    """A device that notes what it is asked for; copies arrive when they are waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.captured: list[Callable[[], None]] = []

    def capture(self, work):
        self.captured.append(work)
        number = len(self.captured) - 1
        for _ in range(2):
            work()  # as warming up does

        def replay() -> None:
            self.log.append(f"replay {number}")
            work()

        return replay

    def post(self, source, target):
        taken = source.clone()
        self.log.append("post")

        def wait() -> None:
            self.log.append("wait")
            target.copy_(taken)

        return wait


def by_ops(model, **settings) -> CudaFusedBackbone:
    return CudaFusedBackbone(model, ops=True, **settings)


def adaptive(base, exits, **settings) -> AdaptiveModel:
    """A model whose passes and exits go by the ops."""
    made = AdaptiveModel(base, exits)
    made.backbone = by_ops(base, boundaries=made.exit_config.layers, **settings)
    return made
