"""Versions, devices and threads of this machine, for bug reports and beside every figure."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from deliberate import __version__
from deliberate.installation import install_extra

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "hydra-core",
    "math-verify",
    "reasoning-gym",
    "numpy",
    "scikit-learn",
    "scipy",
    "statsmodels",
)
OPTIONAL = {
    "datasets": f"loading data sets by hub name ({install_extra('hub')})",
    "wandb": f"the wandb logger ({install_extra('wandb')})",
    "triton": f"GPU kernels ({install_extra('triton')})",
}


def package_version(name: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Model name of the processor as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def load_average() -> list[float] | None:
    """1, 5 and 15 minute load, or None where the system has none."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except OSError:
        return None


def describe() -> dict[str, Any]:
    """JSON-ready description: versions, devices, threads and what is missing."""
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] or [
        "none"
    ]
    missing = {name: use for name, use in OPTIONAL.items() if package_version(name) is None}
    if shutil.which("c++") is None and shutil.which("g++") is None:
        missing["c++"] = "torch.compile on a CPU (install a C++ compiler)"
    return {
        "deliberate": __version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gpus": devices,
        "versions": {name: package_version(name) for name in (*PACKAGES, *OPTIONAL)},
        "missing": missing,
    }
