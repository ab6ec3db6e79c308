"""What the tests of the kernels share: the device, backends, poisoned memory, closeness."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from deliberate.kernels.registry import KERNELS
from deliberate.kernels.triton_support import HAS_TRITON, IS_INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

BACKENDS = [
    "torch",
    pytest.param(
        "triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
    ),
]
backends = pytest.mark.parametrize("backend", BACKENDS)

# Relative error in the 2-norm that a right result of this dtype stays under: sums are in float32,
# operands and results are rounded to the dtype.
RATIO = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
dtypes = pytest.mark.parametrize("dtype", list(RATIO), ids=["float32", "float16", "bfloat16"])


@contextmanager
def running(backend: str) -> Iterator[None]:
    """Every op runs this backend, and memory that nothing wrote holds NaN or the largest number."""
    if backend == "triton" and DEVICE == "cpu":
        assert IS_INTERPRETED, "Triton was imported before TRITON_INTERPRET was set"
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty
    try:
        with KERNELS.override(backend):
            yield
    finally:
        torch.use_deterministic_algorithms(before)


class Draw:
    """Random tensors on the device under test, the same for a seed on every device."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(*shape, generator=self.generator) * scale
        return made.to(self.dtype).to(DEVICE)

    def gain(self, width: int) -> Tensor:
        return (1.0 + 0.3 * torch.randn(width, generator=self.generator)).to(self.dtype).to(DEVICE)


def integers(*values: int) -> Tensor:
    """A list of rows, or a count, as the kernels take them."""
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


# Which rows of 5 are active: (rows, count) with entries past the count that must not be used.
ACTIVE = {
    "all": None,
    "every row listed": ([0, 1, 2, 3, 4], 5),
    "some": ([3, 0, 4, 1, 2], 2),
    "one": ([2, 2, 2, 2, 2], 1),
    "none": ([0, 0, 0, 0, 0], 0),
}
active = pytest.mark.parametrize("active", list(ACTIVE))


def listed(active: str) -> tuple[Tensor | None, Tensor | None, list[int]]:
    """(rows, count, the active rows as numbers) of a case in ACTIVE."""
    case = ACTIVE[active]
    if case is None:
        return None, None, list(range(5))
    rows, count = case
    return integers(*rows), integers(count), rows[:count]


def assert_close(name: str, reference: Tensor, result: Tensor, ratio: float) -> None:
    """Both NaN in the same places, and elsewhere within ``ratio`` in the 2-norm."""
    reference, result = reference.double().cpu(), result.double().cpu()
    assert reference.shape == result.shape, name
    assert torch.equal(reference.isnan(), result.isnan()), f"{name}: NaN in other places"
    reference, result = reference.nan_to_num(0.0), result.nan_to_num(0.0)
    norm = float(reference.norm())
    error = float((result - reference).norm()) / (norm if norm > 0 else 1.0)
    assert error <= ratio, f"{name}: relative error {error:.2e} over {ratio:.0e}"
