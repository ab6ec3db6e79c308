"""Energy is counted where the machine tells it, also beyond the range of a counter."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from deliberate.utils.energy import EnergyMeter


def zone(folder, name: str, label: str, energy: int, most: int = 1_000_000):
    made = folder / name
    made.mkdir()
    (made / "name").write_text(label + "\n")
    (made / "energy_uj").write_text(f"{energy}\n")
    (made / "max_energy_range_uj").write_text(f"{most}\n")
    return made / "energy_uj"


def test_packages_are_summed_and_their_parts_are_not_counted_twice(tmp_path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 100_000)
    part = zone(tmp_path, "intel-rapl:0:0", "core", 50_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 900_000)
    whole = zone(tmp_path, "intel-rapl:2", "psys", 0)
    meter = EnergyMeter(tmp_path)
    assert meter.sources == ["package-0", "package-1"] and meter.joules() == 0.0
    first.write_text("400000")
    part.write_text("350000")
    whole.write_text("999999")
    second.write_text("100000")  # went over its range
    assert meter.joules() == pytest.approx(0.3 + 0.2)
    second.write_text("150000")
    assert meter.joules() == pytest.approx(0.3 + 0.25)


def test_a_machine_that_tells_nothing_has_no_energy(tmp_path) -> None:
    assert EnergyMeter(tmp_path / "none").joules() is None
    (tmp_path / "intel-rapl:0").mkdir()  # without a counter that can be read
    assert EnergyMeter(tmp_path).sources == []


def test_a_device_is_counted_from_where_its_counter_stands(tmp_path, monkeypatch) -> None:
    counter = [5_000]
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: counter[0],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = EnergyMeter(tmp_path, gpus=1)
    counter[0] = 7_500
    assert meter.sources == ["GPU 0"] and meter.joules() == pytest.approx(2.5)
