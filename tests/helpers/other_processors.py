"""The C++ kernels as they are built for other processors than this one."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deliberate.kernels import native_build
from deliberate.kernels.blocks import BlockWeight

# Processors, and what one must have to run what is built for them.
NAMES = ("blocks", "block_panels", "panels", "threads")
PROCESSORS = {"x86-64": b"", "x86-64-v3": b" avx2 ", "x86-64-v4": b" avx512vl "}


def built_for(processor: str, folder: Path) -> ctypes.CDLL:
    """The products of blocks and panels; skips the test where compiler or processor are too old.

    They are compiled once for all tests of a run.

    Args:
        folder: the test's own; they are kept beside those of the run's workers.

    Raises:
        AssertionError: they do not compile for it.
    """
    needed = PROCESSORS[processor]
    if needed not in native_build._features():
        pytest.skip(f"this processor has no{needed.decode()}")
    flags = [flag for flag in native_build.FLAGS if not flag.startswith("-march")]
    of_run = folder.parent.parent if "PYTEST_XDIST_WORKER" in os.environ else folder.parent
    kept, made = of_run / f"products-{processor}.so", folder / "products.so"
    if kept.exists():
        return ctypes.CDLL(str(kept))
    sources = [native_build.SOURCES / f"{name}.cpp" for name in NAMES]
    run = subprocess.run(
        [
            native_build.compiler(),
            *flags,
            "-shared",
            "-O1",
            f"-march={processor}",
            "-o",
            made,
            *sources,
        ],
        capture_output=True,
        text=True,
    )
    if run.returncode and "bad value" in run.stderr:
        pytest.skip(f"the compiler does not know {processor}")
    assert not run.returncode, run.stderr[:2000]
    made.replace(kept)  # another worker may have made the same by now
    return ctypes.CDLL(str(kept))


def multiplied(library: ctypes.CDLL, weight: BlockWeight, x: Tensor) -> tuple[Tensor, Tensor]:
    """As `BlockWeight.multiply`, and `BlockWeight.widen`, by this library."""
    argument, out = weight.argument("a matrix"), torch.empty(len(x), weight.rows)
    wide, ids = torch.empty(weight.rows, weight.columns), torch.arange(weight.rows)
    library.deliberate_multiply_blocks(
        ctypes.byref(argument),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(len(x)),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(1),
    )
    library.deliberate_widen_rows(
        ctypes.byref(argument),
        ctypes.c_void_p(ids.data_ptr()),
        ctypes.c_int64(weight.rows),
        ctypes.c_void_p(wide.data_ptr()),
    )
    return out, wide
