"""A made-up calibration and cost model for the random checkpoint, so that nothing is measured."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_recordings import synthetic_recording

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibration import Calibration, fit_calibration
from deliberate.calibration.certificate import Certificate
from deliberate.calibration.stopping_policy import StepCosts
from deliberate.cost.cache import fingerprint, keep
from deliberate.cost.model import CostModel
from deliberate.cost.parts import PassCost, SegmentCost, WarmCost
from deliberate.policies import guarantees


def tiny_calibration(model: AdaptiveModel, **changes: object) -> Calibration:
    """Calibrators and policy of a synthetic recording, and a certificate for each risk.

    `changes` go to the certificates.
    """
    layers = model.exit_config.layers
    slopes = tuple(1.5 + 0.5 * k for k in range(len(layers)))
    offsets = tuple(0.5 + k for k in range(len(layers)))
    recording = synthetic_recording(60, slopes=slopes, offsets=offsets)
    depth = model.backbone.num_layers
    recording = replace(recording, layers=layers, num_layers=depth)
    weights, exits = model.fingerprints()
    made = fit_calibration(
        recording,
        StepCosts.in_layers(layers, depth),
        weights=weights,
        exits=exits,
        data="d" * 64,
    )
    table = made.policy
    fields: dict = {
        "epsilon": 0.1,
        "delta": 0.05,
        "n": 100,
        "observed": 0.01,
        "lambda_": table.lambdas[1],
        "thresholds": table.rows[1],
        "disagreement": 0.2,
        "weights": weights,
        "exits": exits,
        "policy": table.sha256,
        "data": made.data,
        "conditions": {"task": "words", "max_new_tokens": 24},
    }
    fields |= changes
    return made.with_certificates(
        *(Certificate(risk=risk, **fields) for risk in ("accuracy", "token"))
    )


def tiny_cost(model: AdaptiveModel, layer_seconds: float = 1e-3) -> CostModel:
    """Every layer takes the same, a deferred token a tenth of it, reading memory nothing."""
    edges = (0, *model.exit_config.layers, model.backbone.num_layers)
    segments = []
    for low, high in itertools.pairwise(edges):
        one = PassCost((high - low) * layer_seconds, per_row=0.1 * (high - low) * layer_seconds)
        segments.append(SegmentCost(WarmCost(one), WarmCost(one), one))
    read = PassCost(0.01 * layer_seconds)
    return CostModel(
        layers=edges[1:-1],
        num_layers=edges[-1],
        segments=tuple(segments),
        reads=(WarmCost(read),) * (len(edges) - 2),
        head=read,
        fingerprint=fingerprint(model.backbone, model.exit_config),
    )


def keep_tiny_cost(model: AdaptiveModel, folder: Path, layer_seconds: float = 1e-3) -> CostModel:
    """Puts a `tiny_cost` where `cached_cost` looks for it, with DELIBERATE_CACHE at `folder`."""
    cost = tiny_cost(model, layer_seconds)
    keep(cost, folder)
    return cost


def use_tiny_cost(
    monkeypatch: pytest.MonkeyPatch, model: AdaptiveModel, layer_seconds: float = 1e-3
) -> CostModel:
    """Makes certificates and budgets use a `tiny_cost`, whatever the executor, threads and cache.

    A measured cost model may say that full depth is faster than a certificate's exits, and
    certified mode then decodes at full depth: what a test sees would depend on the machine.
    """
    cost = tiny_cost(model, layer_seconds)
    monkeypatch.setattr(guarantees, "recall", lambda print_: replace(cost, fingerprint=print_))
    return cost
