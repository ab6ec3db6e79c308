"""A certificate's exits, full depth or exact mode: the fastest decodes, and says why."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from synthetic_recordings import synthetic_recording
from tiny_models import VOCAB, random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibration import fit_calibration
from deliberate.calibration.certificate import Certificate, Risk
from deliberate.calibration.stopping_policy import StepCosts
from deliberate.config import Fidelity
from deliberate.engine.draft_lengths import DraftPrior
from deliberate.modeling.draft_layer import DraftLayer, DraftLayerConfig
from deliberate.policies.faster_member import faster_member
from deliberate.policies.member_costs import MemberCosts

GOOD = DraftPrior((0.9,) * 10, survives=(0.65, 0.44, 0.3), draft_cost=0.013, token_cost=0.108)
CALIBRATION = fit_calibration(
    synthetic_recording(120), StepCosts(2.0, (2.0, 2.0, 2.0), "layers"), weights="w", exits="e"
)


def certificate(lambda_: float, calibration=CALIBRATION, n: int = 400) -> Certificate:
    return Certificate(
        risk=Risk.TOKEN, epsilon=0.5, delta=0.05, n=n, observed=0.0, lambda_=lambda_,
        thresholds=calibration.policy.thresholds(lambda_), disagreement=0.5,
        weights=calibration.weights, exits=calibration.exits,
        policy=calibration.policy.sha256, data=calibration.data,
    )  # fmt: skip


def test_the_time_with_drafts_is_that_of_the_best_number_of_them() -> None:
    best = min((1 + n * 0.121) / t for n, t in ((1, 1.65), (2, 2.09), (3, 2.39)))
    assert GOOD.time_ratio == pytest.approx(best)
    assert DraftPrior().time_ratio == 1.0
    assert replace(GOOD, token_cost=2.0).time_ratio == 1.0


def test_drafts_decode_where_they_are_faster_than_the_certified_exits() -> None:
    table = CALIBRATION.policy
    dense, cheap = certificate(math.inf), certificate(table.lambdas[0])
    assert faster_member(dense, table, None, None, margin=1.1) == (None, "")
    chosen, why = faster_member(dense, table, None, GOOD, margin=1.1)
    assert chosen is Fidelity.EXACT and "its exits never pay" in why and "0.57 of full" in why
    # Exits at a quarter of the cost are faster than drafts at 0.57.
    assert faster_member(cheap, table, None, GOOD, margin=1.1)[0] is None
    # And where the machine was measured, its figures count.
    rows = (0.9,) * (len(table.rows) - 1) + (1.0,)
    slow = MemberCosts(dense=1.0, exact=1.0, rows=rows, least=0.9, prompt=0.0)
    assert faster_member(cheap, table, slow, None, margin=1.1) == (None, "")
    assert faster_member(cheap, table, slow, GOOD, margin=1.1)[0] is Fidelity.EXACT
    lossy = replace(slow, rows=(1.2,) * len(rows))
    assert faster_member(cheap, table, lossy, None, margin=1.1)[0] is Fidelity.DENSE


def test_a_certified_request_of_a_model_with_drafts_is_exact_at_once_and_says_so_once(
    caplog,
) -> None:
    model = AdaptiveModel(tiny_model("llama", layers=8, dtype=torch.float32), [2, 4, 6])
    config = DraftLayerConfig(model.backbone.hidden_size, 4, 2, 8, 48, VOCAB)
    model.attach_draft(DraftLayer(config), GOOD)
    weights, exits = model.fingerprints()
    calibration = replace(CALIBRATION, weights=weights, exits=exits)
    model.set_calibration(calibration.with_certificates(certificate(math.inf, calibration)))
    ids = random_ids(9)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "eos_token_id": None}
    dense = model.generate(ids, fidelity="dense", **given)
    with caplog.at_level("WARNING", logger="deliberate"):
        for _ in range(2):
            made = model.generate(
                ids, fidelity="certified", risk="token", return_dict_in_generate=True, **given
            )
    assert made.sequences.tolist() == dense.tolist() and made.traces[0].drafted > 0
    said = [one.getMessage() for one in caplog.records if one.name == "deliberate"]
    assert len(said) == 1 and "exact mode decodes, which meets the guarantee" in said[0]
