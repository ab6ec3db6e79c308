"""A model whose passes take the seconds of a made-up cost model, on a clock of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_calibration import tiny_calibration, use_tiny_cost
from tiny_models import tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.modeling.exit_config import ExitConfig

LAYER = 1e-3  # seconds of a layer for one token; a tenth for each token


def calibrate(model: AdaptiveModel, scale: float = 0.3) -> None:
    """Gives a random model a made-up calibration with thresholds that random exits reach.

    Args:
        scale: factor on the thresholds of the synthetic recording.
    """
    made = tiny_calibration(model)
    rows = tuple(tuple(scale * value for value in row) for row in made.policy.rows)
    # Exact mode is not expected to pay: a draft is right as seldom as random exits' are.
    risks = tuple(1.0 - share[-1] for share in made.policy.shares)
    table = replace(made.policy, rows=rows, risks=risks)
    model.set_calibration(replace(made, policy=table, certificates=()))


class SimulatedMachine:
    """A calibrated random model and the clock that its passes move.

    Its policy's thresholds are such that random exits reach them.

    Attributes:
        model: of transformers' modules.
        now: seconds.
        slowdown: factor on every duration.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, gate: bool = False, layers: int = 6) -> None:
        exits = ExitConfig((1, 2, 4), (0.1, 0.1, 0.1), translator="none")
        base = tiny_model("llama", layers=layers, dtype=torch.float64)
        self.model = AdaptiveModel(base, exits, executor="generic")
        if gate:
            self.model.attach_gate()
        calibrate(self.model)
        use_tiny_cost(patch, self.model, LAYER)
        self.now, self.slowdown = 0.0, 1.0
        self._run = self.model.backbone.run_layers
        patch.setattr(self.model.backbone, "run_layers", self._run_layers)

    def _run_layers(self, hidden, first, last, *rest):
        rows = hidden.shape[0] * hidden.shape[1]
        self.now += self.slowdown * (last - first) * LAYER * (1.0 + 0.1 * rows)
        return self._run(hidden, first, last, *rest)

    def clock(self) -> float:
        return self.now
