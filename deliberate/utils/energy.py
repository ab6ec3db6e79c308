"""Energy that the machine has taken, where it tells: processor packages and NVIDIA devices."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
"""The kernel's counters (Intel's and AMD's RAPL); on most systems only root may read them."""


class EnergyMeter:
    """Joules since it was made, of all processor packages and of the NVIDIA devices in use.

    The counters are of the whole machine: of an idle one they tell what a run took and what it
    takes to be on. Memory and the rest of the machine are not counted.

    Args:
        folder: of the kernel's counters.
        gpus: devices to count; 0 leaves them out.

    Attributes:
        sources: names of what is counted; empty where the machine tells nothing.
    """

    def __init__(self, folder: Path = POWERCAP, *, gpus: int = 0) -> None:
        self._packages: list[_Package] = []
        self._gpus: list[Any] = []
        self.sources: list[str] = []
        for zone in sorted(folder.glob("*:*")) if folder.is_dir() else ():
            # "intel-rapl:0" is a package; "intel-rapl:0:1" a part of it, counted with it.
            with contextlib.suppress(OSError, ValueError):
                name = (zone / "name").read_text(encoding="utf-8").strip()
                if zone.name.count(":") == 1 and name.startswith("package"):
                    self._packages.append(_Package(zone))
                    self.sources.append(name)
        for index in range(gpus):
            # The package is no dependency, and an older device has no such counter.
            with contextlib.suppress(Exception):
                nvml = importlib.import_module("pynvml")
                nvml.nvmlInit()
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                self._gpus.append(_Gpu(nvml, handle))
                self.sources.append(f"GPU {index}")

    def joules(self) -> float | None:
        """Since this meter was made; None where nothing is counted."""
        if not self.sources:
            return None
        return sum(one.joules() for one in (*self._packages, *self._gpus))


class _Package:
    """A counter of microjoules that begins anew at its range."""

    def __init__(self, zone: Path) -> None:
        self._file = zone / "energy_uj"
        self._range = int((zone / "max_energy_range_uj").read_text(encoding="utf-8"))
        self._last, self._total = self._read(), 0

    def _read(self) -> int:
        return int(self._file.read_text(encoding="utf-8"))

    def joules(self) -> float:
        now = self._read()
        passed = now - self._last
        self._total += passed if passed >= 0 else passed + self._range
        self._last = now
        return 1e-6 * self._total


class _Gpu:
    """A counter of millijoules since the driver was loaded."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._read = lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        self._first = self._read()

    def joules(self) -> float:
        return 1e-3 * (self._read() - self._first)
