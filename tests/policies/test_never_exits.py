"""An infinite threshold says that no token exits; 1.0 does not, since a confidence can be 1."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.modeling.exit_config import ExitConfig
from deliberate.utils.errors import DeliberateError

NEW = 12


@pytest.fixture
def model():
    made = AdaptiveModel(
        tiny_model("llama", dtype=torch.float32), ExitConfig((1, 2), (0.1, 0.1), translator="none")
    )
    # Every logit is large: the confidence of the token chosen rounds to 1.
    with torch.no_grad():
        made.base.lm_head.weight.mul_(1e4)
    return made


def generate(model, **how):
    return model.generate(random_ids(6), max_new_tokens=NEW, return_dict_in_generate=True, **how)


def test_a_threshold_of_one_lets_tokens_exit_and_infinity_does_not(model) -> None:
    one = generate(model, fidelity="threshold", thresholds=1.0)
    assert min(one.trace.exit_layers) < 4
    for fidelity in ("threshold", "exact"):
        never = generate(model, fidelity=fidelity, thresholds=math.inf)
        assert set(never.trace.exit_layers) == {4} and never.batch.reads == []
    first = generate(model, fidelity="threshold", thresholds=[math.inf, 1.0])
    assert 1 not in first.trace.exit_layers and {k for k, _ in first.batch.reads} == {1}


def test_never_is_null_in_files_and_comes_back(model) -> None:
    config = replace(model.exit_config, thresholds=(0.5, math.inf))
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert json.loads(text)["thresholds"] == [0.5, None]
    assert ExitConfig.from_dict(json.loads(text), num_layers=4) == config


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5, math.nan, -math.inf])
def test_a_threshold_outside_its_range_is_refused_with_what_never_is(model, value) -> None:
    with pytest.raises(DeliberateError, match=r"is outside \(0, 1\]; infinity means"):
        generate(model, fidelity="threshold", thresholds=value)
