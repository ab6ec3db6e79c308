"""A widened model computes the same function with more weights."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.eval.benchmarks.widen import widen
from deliberate.modeling.exit_config import ExitConfig
from deliberate.utils.errors import DeliberateError


@pytest.mark.parametrize("translator", ["low_rank", "full", "none"])
@pytest.mark.parametrize("measure", ["max_prob", "gate"])
def test_tokens_confidences_and_exits_stay(translator, measure):
    exits = ExitConfig.build(4, [1, 2], 0.5, translator=translator, rank=3, measure=measure)
    base = tiny_model("llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    narrow = AdaptiveModel(base, exits)
    with torch.no_grad():
        for parameter in narrow.exits.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    wide = widen(narrow, 3)
    assert wide.trainable_parameters()[1] > 6 * narrow.trainable_parameters()[1]
    ids = random_ids(12)
    made, expected = wide(ids).logits, narrow(ids).logits
    assert torch.allclose(made, expected, rtol=1e-4, atol=1e-4)  # norms are float32
    variants = [
        model.generate(
            ids,
            max_new_tokens=30,
            fidelity="threshold",
            thresholds=0.1,
            return_dict_in_generate=True,
        )
        for model in (wide, narrow)
    ]
    assert torch.equal(variants[0].sequences, variants[1].sequences)
    records = [out.trace.records for out in variants]
    assert [r.exit_layer for r in records[0]] == [r.exit_layer for r in records[1]]
    assert [r.confidence for r in records[0]] == pytest.approx(
        [r.confidence for r in records[1]], rel=1e-3, nan_ok=True
    )


@pytest.mark.parametrize(
    ("architecture", "times", "why"),
    [("qwen2", 2, "not of qwen2"), ("llama", 0, "widen=0 must be at least 1")],
)
def test_what_cannot_be_widened_is_named(architecture, times, why):
    with pytest.raises(DeliberateError, match=why):
        widen(AdaptiveModel(tiny_model(architecture), [1]), times)
