"""Compiles every kernel for a GPU that need not be there.

``python -m deliberate.kernels.tools.compile_check``. The interpreter shows that a kernel computes
the
right thing; this shows that the compiler takes it, and what it costs: registers, bytes spilled to
memory and shared memory, read off the machine code. Shapes are those of Qwen2.5-0.5B, batches of 1
and 8.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from deliberate.installation import install_extra
from deliberate.kernels import triton_support
from deliberate.kernels.ops import skip_mlp
from deliberate.kernels.ops.add_rmsnorm import add_rmsnorm_triton
from deliberate.kernels.ops.decode_attention import decode_attention_triton
from deliberate.kernels.ops.exit_gate import exit_gate_triton
from deliberate.kernels.ops.exit_head import exit_head_fused
from deliberate.kernels.ops.int8_linear import int8_linear_triton
from deliberate.kernels.ops.kv_fill import kv_fill_triton
from deliberate.kernels.ops.rope_write import rope_write_triton
from deliberate.utils.errors import DeliberateError

WIDTH, INNER, HEADS, KV, HEAD_WIDTH, VOCAB, CAPACITY = 896, 4864, 14, 2, 64, 4096, 1024


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled: registers and spilled bytes per thread, shared bytes per program."""

    name: str
    case: str
    registers: int
    spilled: int
    shared: int


def launches(rows: int, dtype: torch.dtype, listed: bool) -> Iterator[Callable[[], Any]]:
    """Calls that launch every kernel once, on tensors that are only looked at."""

    def made(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=kind)

    picked = made(rows, kind=torch.int32) if listed else None
    count = made(1, kind=torch.int32) if listed else None
    x, gain = made(rows, WIDTH), made(WIDTH)
    yield lambda: exit_head_fused(
        x, made(VOCAB, WIDTH), gain, 1e-6, None, None,
        made(VOCAB, kind=torch.int64) if listed else None, 30.0 if listed else 0.0, picked, count,
    )  # fmt: skip
    yield lambda: exit_gate_triton(
        x, gain, made(1), made(1, kind=torch.float32), gain, 1e-6, picked, count
    )
    yield lambda: add_rmsnorm_triton(
        x, made(rows, WIDTH), gain, 1e-6, made(rows, WIDTH), picked, count
    )
    yield lambda: skip_mlp.skip_mlp_triton(
        x, made(rows, WIDTH), made(2 * INNER, WIDTH), made(WIDTH, INNER), picked, count
    )
    for key_gain in (None, made(4, HEAD_WIDTH)):
        caches = [made(4, rows, KV, CAPACITY, HEAD_WIDTH) for _ in range(2)]
        yield lambda key_gain=key_gain, caches=caches: kv_fill_triton(  # type: ignore[misc]
            x, made(4, 2, KV, HEAD_WIDTH, WIDTH), made(4, 2, KV, HEAD_WIDTH), key_gain,
            made(CAPACITY, HEAD_WIDTH), made(CAPACITY, HEAD_WIDTH), made(rows, kind=torch.int64),
            caches[0], caches[1], 1e-6, 1e-6, picked, count,
        )  # fmt: skip
    tokens = 1 if rows == 1 else 2
    keys, values = (made(rows // tokens, KV, CAPACITY, HEAD_WIDTH) for _ in range(2))
    for head_gain in (None, made(HEAD_WIDTH)):
        yield lambda head_gain=head_gain: rope_write_triton(  # type: ignore[misc]
            made(rows, (HEADS + 2 * KV) * HEAD_WIDTH), made((HEADS + 2 * KV) * HEAD_WIDTH),
            head_gain, head_gain, made(CAPACITY, HEAD_WIDTH), made(CAPACITY, HEAD_WIDTH),
            made(rows, kind=torch.int64), keys, values, made(rows, HEADS, HEAD_WIDTH), 1e-6,
            picked, count, tokens,
        )  # fmt: skip
    pool, table = (
        made(KV, 32, 16, HEAD_WIDTH).transpose(0, 1),
        made(rows // tokens, 8, kind=torch.int32),
    )
    yield lambda: rope_write_triton(
        made(rows, (HEADS + 2 * KV) * HEAD_WIDTH), None, None, None, made(CAPACITY, HEAD_WIDTH),
        made(CAPACITY, HEAD_WIDTH), made(rows, kind=torch.int64), pool, pool,
        made(rows, HEADS, HEAD_WIDTH), 1e-6, picked, count, tokens, table,
    )  # fmt: skip
    for splits in (1, 8):
        yield lambda splits=splits: decode_attention_triton(  # type: ignore[misc]
            made(rows, HEADS, HEAD_WIDTH), keys, values, made(rows, kind=torch.int32), 0.125,
            made(rows, HEADS, HEAD_WIDTH), 0, picked, count, tokens, splits=splits,
        )  # fmt: skip
        yield lambda splits=splits: decode_attention_triton(  # type: ignore[misc]
            made(rows, HEADS, HEAD_WIDTH), pool, pool, made(rows, kind=torch.int32), 0.125,
            made(rows, HEADS, HEAD_WIDTH), 0, picked, count, tokens,
            table, splits,
        )  # fmt: skip
    yield lambda: int8_linear_triton(
        x, made(INNER, WIDTH, kind=torch.int8), made(INNER, kind=torch.float32), None
    )


class _AbsentGPU:
    """What Triton asks a driver before it compiles, answered for a GPU that is not here."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget(
            "cuda", self.capability, 32
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling_only(capability: int, compiled: list[Any]) -> Iterator[None]:
    """Launches compile, are noted, and run nothing."""
    jit = importlib.import_module("triton.runtime.jit").JITFunction
    driver = importlib.import_module("triton.runtime.driver").driver
    run = jit.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        made = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(made.result() if hasattr(made, "result") else made)
        return made

    before = getattr(driver, "_active", None)
    driver.set_active(_AbsentGPU(capability))
    try:
        with (
            patch.object(jit, "run", compile_only),
            patch.object(triton_support, "IS_INTERPRETED", True),  # tensors on a CPU will do
            patch.object(skip_mlp, "processors", lambda device: 132),  # so that sums are split
        ):
            yield
    finally:
        driver.set_active(before)


def resources(binary: bytes) -> tuple[int, int]:
    """(registers, bytes on the stack) a thread of a CUDA binary, by cuobjdump; -1 without it."""
    tool = Path(str(triton_support.triton.__file__)).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        return -1, -1
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else (-1, -1)


def compile_all(capability: int, dtypes: Sequence[torch.dtype]) -> list[Compiled]:
    """Every kernel for compute capability ``capability`` (90 for Hopper) and these dtypes."""
    if not triton_support.HAS_TRITON or triton_support.IS_INTERPRETED:
        raise DeliberateError(
            "compiling needs Triton installed and TRITON_INTERPRET unset: "
            + install_extra("triton")
        )
    results: list[Compiled] = []
    for rows in (1, 8):
        for dtype in dtypes:
            for listed in (False, True):
                kernels: list[Any] = []
                with _compiling_only(capability, kernels):
                    for launch in launches(rows, dtype, listed):
                        launch()
                case = f"{rows} rows, {str(dtype).removeprefix('torch.')}"
                case += ", listed" if listed else ""
                for kernel in kernels:
                    registers, spilled = resources(kernel.asm["cubin"])
                    results.append(
                        Compiled(
                            kernel.metadata.name, case, registers, spilled, kernel.metadata.shared
                        )
                    )
    return results


def main() -> int:
    """Prints one line per kernel and case; one that does not compile is an error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--capability", type=int, default=90, help="90: Hopper, 80: Ampere")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), action="append")
    arguments = parser.parse_args()
    dtypes = [getattr(torch, name) for name in arguments.dtype or ("bfloat16", "float32")]
    try:
        results = compile_all(arguments.capability, dtypes)
    except DeliberateError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{'kernel':24}{'case':28}{'registers':>10}{'spilled':>9}{'shared':>8}")
    for one in results:
        print(f"{one.name:24}{one.case:28}{one.registers:10}{one.spilled:9}{one.shared:8}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
