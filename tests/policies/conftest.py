"""The model that the tests of promises share."""

from __future__ import annotations

import pytest
import torch
from calibrated_model import LAYER
from tiny_calibration import keep_tiny_cost, tiny_calibration
from tiny_models import tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.modeling.exit_config import ExitConfig


@pytest.fixture(scope="module")
def base():
    return tiny_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def calibration(base):
    return tiny_calibration(AdaptiveModel(base, ExitConfig((1, 2), (0.1, 0.1), translator="none")))


@pytest.fixture
def model(base, calibration, tmp_path, monkeypatch):
    """Calibrated, with a cost model in a cache of its own."""
    monkeypatch.setenv("DELIBERATE_CACHE", str(tmp_path))
    exits = ExitConfig((1, 2), (0.1, 0.1), translator="none")
    made = AdaptiveModel(base, exits, executor="generic")
    made.set_calibration(calibration)
    keep_tiny_cost(made, tmp_path, LAYER)
    return made
