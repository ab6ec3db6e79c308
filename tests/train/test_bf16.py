"""Mixed precision of training: `auto` follows the hardware."""

from __future__ import annotations

import pytest
import torch

from deliberate.utils.devices import bf16_line, use_bf16


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"), [(True, False, True), (False, True, True), (False, False, False)]
)
def test_auto_takes_bf16_where_the_cpu_multiplies_it(monkeypatch, amx, avx512, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    assert use_bf16("auto") is expected
    assert use_bf16(True)
    assert not use_bf16(False)


@pytest.mark.parametrize("has", [True, False])
def test_a_run_says_what_it_multiplies_in_and_warns_where_the_cpu_is_not_made_for_it(
    monkeypatch, has
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert ("WARNING: this device has no instructions" in bf16_line(True)) is not has
    assert bf16_line("auto").startswith(f"products in {'bfloat16' if has else 'float32'}")
    assert "WARNING" not in bf16_line("auto") + bf16_line(False)


def test_auto_is_float32_on_a_torch_that_cannot_tell(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert not use_bf16("auto")
