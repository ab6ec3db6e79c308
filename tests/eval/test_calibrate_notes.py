"""What calibrate says of exits that do not pay and of models that solve little."""

from __future__ import annotations

import numpy as np

from deliberate.calibration.exit_traces import Recording
from deliberate.cost import measure as cost_measure
from deliberate.cost.model import CostModel
from deliberate.cost.parts import PassCost, SegmentCost, WarmCost
from deliberate.eval.calibrate.command import exits_that_lose_time
from deliberate.eval.runner.answer_notes import says_nothing


def test_an_exit_that_no_token_exits_at_is_named_with_its_price(monkeypatch):
    def warm(seconds: float) -> WarmCost:
        return WarmCost(PassCost(seconds, 0.0, 0.0, 0.0), 0.0)

    segment = SegmentCost(warm(1e-3), warm(1e-3), PassCost(1e-3, 0.0, 0.0, 0.0))
    cost = CostModel((1,), 2, (segment, segment), (warm(2e-4),), PassCost(1e-4, 0.0, 0.0, 0.0))
    monkeypatch.setattr(cost_measure, "cached_cost", lambda *_args, **_kwargs: cost)

    class Stub:
        backbone = exit_config = gate = None

        def reader(self):
            return None

        class policy:
            @staticmethod
            def lambda_for_risk(risk: float) -> float:
                return 1.0

        def thresholds(self, lambda_: float):
            return (0.9,)

    def recording(score: float) -> Recording:
        tokens = 40
        return Recording(
            layers=(1,),
            num_layers=2,
            measure="max_prob",
            scores=np.full((tokens, 1), score, np.float32),
            tokens=np.zeros((tokens, 1), np.int32),
            final=np.zeros(tokens, np.int32),
            final_scores=np.ones(tokens, np.float32),
            sequence=np.arange(tokens, dtype=np.int32) // 10,
            position=np.arange(tokens, dtype=np.int32) % 10,
        )

    stub = Stub()
    assert exits_that_lose_time(stub, stub, (), recording(0.99)) == []
    reasons = exits_that_lose_time(stub, stub, (), recording(0.5))
    assert "exit after layer 1: 0 % of tokens exit" in reasons[0]
    assert "no exit pays" in reasons[-1]


def test_a_certificate_over_a_model_that_solves_little_says_what_epsilon_is_of_that():
    assert "says nothing" in says_nothing(1, 100, 0.01)
    assert "20% of those that it solves" in says_nothing(5, 100, 0.01)
    assert says_nothing(10, 100, 0.01) is None
