"""What every Triton kernel here needs: an import that may fail, launches, one dot product.

Kernels are written once and run three ways: compiled on a GPU, interpreted on a CPU
(``TRITON_INTERPRET=1`` set before Triton is first imported, as the tests do), or, where Triton is
not installed, not at all: the modules import and their torch references serve. The API used is
the part common to Triton 3.4-3.9.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deliberate.installation import install_extra
from deliberate.kernels.registry import KernelRequest
from deliberate.utils.errors import DeliberateError

# No `from __future__ import annotations` in modules that hold kernels: Triton compares the
# annotation `tl.constexpr` as an object.
tl: Any
triton: Any
try:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]
except ImportError:
    triton = None

    class _Language:
        """Enough of `triton.language` for kernel definitions to be read, not run."""

        @staticmethod
        def constexpr(value: Any) -> Any:
            return value

    tl = _Language()

HAS_TRITON: bool = triton is not None
# True only when Triton's own library was imported interpreted: the variable set later is no help.
IS_INTERPRETED: bool = HAS_TRITON and not isinstance(tl.sum, triton.JITFunction)
INTERPRETED: tl.constexpr = tl.constexpr(IS_INTERPRETED)


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function itself where Triton is not installed."""
    return triton.jit(function) if HAS_TRITON else function


@dataclass(frozen=True, slots=True)
class Tile:
    """How a matrix kernel is cut: output channels and inputs of one step, warps, pipeline depth.

    Defaults are chosen by rows alone, not by timing at the first call: what runs is then the same
    every time, also inside a CUDA graph and when a device-side count happens to be small. The
    benchmark times the candidates of each op and names the best.
    """

    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3

    def launch(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def prefers_triton(request: KernelRequest) -> bool:
    """Predicate of the Triton kernels: floating tensors on a CUDA device.

    The interpreter is never chosen by itself, only by an override: it is for tests.
    """
    return HAS_TRITON and request.device == "cuda" and request.dtype in KERNEL_DTYPES


KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_launch(op: str, *tensors: Tensor | None) -> None:
    """Raises DeliberateError unless a Triton kernel can be launched on these tensors."""
    for tensor in tensors:
        if tensor is None:
            continue
        if not HAS_TRITON:
            raise DeliberateError(
                f"{op}: backend 'triton' was asked for but Triton is not installed: "
                f"{install_extra('triton')}, or use backend 'torch'"
            )
        if not tensor.is_cuda and not IS_INTERPRETED:
            raise DeliberateError(
                f"{op}: backend 'triton' needs tensors on a CUDA device, got {tensor.device}; "
                "use backend 'torch', or set TRITON_INTERPRET=1 before the start"
            )
        if tensor.is_floating_point() and tensor.dtype not in KERNEL_DTYPES:
            raise DeliberateError(
                f"{op}: backend 'triton' takes float32, bfloat16 or float16, got {tensor.dtype}"
            )


def power_of_two(value: int, *, least: int = 1, most: int = 1 << 20) -> int:
    """The smallest power of two >= value, kept within [least, most] (powers of two)."""
    return min(max(1 << max(value - 1, 0).bit_length(), least), most)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, which is how many programs fill it once; 1 elsewhere."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@jit
def dot(a, b, acc):  # type: ignore[no-untyped-def]
    """acc + a @ b, float32 sums; float32 operands are not cut to tf32."""
    if INTERPRETED:
        # The interpreter multiplies bfloat16 as the integers that hold them.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def active_count(count, total, HAS_ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many rows are active: read on the device, or all of them."""
    active = total
    if HAS_ROWS:
        active = tl.minimum(tl.load(count), total)
    return active
