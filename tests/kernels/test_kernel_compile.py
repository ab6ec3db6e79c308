"""Every kernel compiles for a Hopper GPU, which need not be there, and keeps to its registers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deliberate.kernels.triton_support import HAS_TRITON

KERNELS = (
    "_partial_kernel",
    "_combine_kernel",
    "_score_kernel",
    "_compact_kernel",
    "_add_rmsnorm_kernel",
    "_gate_up_kernel",
    "_down_kernel",
    "_add_shares_kernel",
    "_kv_fill_kernel",
    "_rope_write_kernel",
    "_share_kernel",
    "_merge_kernel",
    "_int8_linear_kernel",
)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernels_compile_for_hopper_without_spilling_registers() -> None:
    # A process of its own: in this one Triton may have been imported as an interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "deliberate.kernels.tools.compile_check",
        "--dtype",
        "bfloat16",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()[1:]]
    assert {line[0] for line in lines} >= set(KERNELS)
    for line in lines:
        registers, spilled, shared = (int(number) for number in line[-3:])
        assert registers <= 255, line
        assert spilled <= 0, line  # -1 where the tool that reads it is missing
        assert shared <= 227 * 1024, line


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_compiling_under_the_interpreter_is_a_one_line_error() -> None:
    command = [sys.executable, "-m", "deliberate.kernels.tools.compile_check"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "TRITON_INTERPRET unset" in done.stderr
