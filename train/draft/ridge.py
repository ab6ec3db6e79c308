"""Ridge regression from sums that are gathered block by block."""

from __future__ import annotations

import torch
from torch import Tensor


class Ridge:
    """A linear map ``[outputs, inputs]`` with the least squared error and a penalty on its size.

    The sums X'X and X'Y are kept in float64, so any number of rows takes the same memory.

    Args:
        inputs, outputs: widths of the rows that are added.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self._inner = torch.zeros(inputs, inputs, dtype=torch.float64)
        self._cross = torch.zeros(inputs, outputs, dtype=torch.float64)
        self.rows = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds rows: ``x [n, inputs]`` and what they should give, ``y [n, outputs]``."""
        x, y = x.float(), y.float()  # of one block; sums of blocks are in float64
        self._inner += (x.T @ x).double()
        self._cross += (x.T @ y).double()
        self.rows += len(x)

    def solve(self, penalty: float) -> Tensor:
        """The map as float32 ``[outputs, inputs]``.

        Args:
            penalty: on the squared size of the map, relative to the mean of the diagonal of X'X.
        """
        scale = self._inner.diagonal().mean().clamp(min=1e-12)
        ridged = self._inner + penalty * scale * torch.eye(len(self._inner), dtype=torch.float64)
        return torch.linalg.solve(ridged, self._cross).T.float().contiguous()
