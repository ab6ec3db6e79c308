"""A clock is read after the device has done its work."""

from __future__ import annotations

import pytest
import torch

from deliberate.utils.devices import synchronize


@pytest.mark.parametrize(
    ("device", "there", "waits"),
    [
        (torch.device("cuda", 1), True, [torch.device("cuda", 1)]),
        (torch.device("cpu"), True, []),
        (None, True, [None]),
        (None, False, []),
    ],
)
def test_only_a_gpu_is_waited_for(device, there, waits, monkeypatch) -> None:
    waited = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    synchronize(*([] if device is None else [device]))
    assert waited == waits
