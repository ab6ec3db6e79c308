"""Exit configuration, scores and heads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCAB, tiny_model
from torch import nn

from deliberate.api.model import AdaptiveModel
from deliberate.kernels.ops.exit_head import normalised_certainty, top_margin, top_probability
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.exit_heads import ExitHeads, ExitReader
from deliberate.modeling.measures import MEASURES
from deliberate.utils.errors import DeliberateError

rows = st.lists(st.floats(-30, 30), min_size=2, max_size=40)


@given(rows)
def test_scores_are_confidences_of_the_most_likely_token(values):
    logits = torch.tensor([values], dtype=torch.float64)
    probabilities = torch.softmax(logits, dim=-1)[0]
    for score in (top_probability, top_margin, normalised_certainty):
        token, confidence = score(logits)
        assert probabilities[token] == probabilities.max()
        assert -1e-12 <= float(confidence) <= 1 + 1e-12
    best, second = probabilities.topk(2).values
    assert float(top_probability(logits)[1]) == pytest.approx(float(best))
    assert float(top_margin(logits)[1]) == pytest.approx(float(best - second), abs=1e-12)


def test_scores_of_the_uniform_and_the_certain_distribution():
    uniform = torch.zeros(1, 8, dtype=torch.float64)
    certain = torch.tensor([[0.0, 1000.0, 0.0, 0.0]], dtype=torch.float64)
    assert float(top_probability(uniform)[1]) == pytest.approx(1 / 8)
    assert float(top_margin(uniform)[1]) == pytest.approx(0)
    assert float(normalised_certainty(uniform)[1]) == pytest.approx(0, abs=1e-12)
    for score in (top_probability, top_margin, normalised_certainty):
        token, confidence = score(certain)
        assert int(token) == 1 and float(confidence) == pytest.approx(1)


def test_entropy_certainty_of_a_known_distribution():
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    entropy_bits = 1.75
    _, certainty = normalised_certainty(probabilities.log()[None])
    assert float(certainty) == pytest.approx(1 - entropy_bits / math.log2(4))


def test_the_gate_decides_without_running_the_head():
    config = ExitConfig.build(4, [2], 0.5, measure="gate", translator="none")
    model = AdaptiveModel(tiny_model("llama", layers=4), config)
    calls = []
    model.backbone.lm_head.register_forward_hook(lambda *_: calls.append(1))
    hidden = torch.randn(1, 1, model.backbone.hidden_size, dtype=torch.float64)
    with torch.inference_mode():
        model.exits.gates[0].bias.fill_(-3.0)
        assert model.reader().evaluate(0, hidden[:, -1], 0.5).confidences[0] < 0.5 and calls == []
        model.exits.gates[0].bias.fill_(3.0)
        reading = model.reader().evaluate(0, hidden[:, -1], 0.5)
        assert 0 <= reading.token(0) < VOCAB
    assert len(calls) == 1
    assert reading.confidences[0] == pytest.approx(1 / (1 + math.exp(-3)))


@pytest.mark.parametrize("measure", list(MEASURES))
def test_reading_several_tokens_equals_reading_each_alone(measure):
    config = ExitConfig.build(4, [2], 1e-9, measure=measure)
    model = AdaptiveModel(tiny_model("llama", layers=4), config)
    hidden = torch.randn(1, 3, model.backbone.hidden_size, dtype=torch.float64)
    with torch.inference_mode():
        together = model.reader().evaluate(0, hidden[0], 1e-9)
        for row in range(3):
            alone = model.reader().evaluate(0, hidden[0, row : row + 1], 1e-9)
            assert together.token(row) == alone.token(0)
            assert together.confidences[row] == pytest.approx(alone.confidences[0])


def test_a_configuration_survives_json():
    config = ExitConfig.build(12, [2, 5], (0.8, 0.9), measure="gate", rank=7, max_pending=3)
    assert ExitConfig.from_dict(config.to_dict(), num_layers=12) == config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": []}, "exit layers are empty"),
        ({"layers": [2, 2]}, "must rise"),
        ({"layers": [2, 99]}, "exit layer 99"),
        ({"layers": [1.5]}, "1.5"),
        ({"thresholds": 0.0}, "threshold 0.0"),
        ({"thresholds": float("nan")}, "threshold nan"),
        ({"thresholds": (0.5, 0.5)}, "2 thresholds for 1 exits"),
        ({"measure": "luck"}, "'luck'"),
        ({"translator": "wide"}, "'wide'"),
        ({"rank": 0}, "rank 0"),
        ({"max_pending": 0}, "max_pending 0"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    arguments = {"layers": [2], "thresholds": 0.9} | settings
    with pytest.raises(DeliberateError) as caught:
        ExitConfig.build(6, arguments.pop("layers"), arguments.pop("thresholds"), **arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_only_decision_settings_of_a_trained_model_may_change():
    model = AdaptiveModel(tiny_model("llama", layers=6), [1, 3])
    model.set_exit_config(model.exit_config.with_thresholds(0.4))
    assert model.exit_config.thresholds == (0.4, 0.4)
    with pytest.raises(DeliberateError, match="layers"):
        model.set_exit_config(ExitConfig.build(6, [2, 3], 0.4))


def test_untrained_exits_are_the_same_at_every_load_whatever_was_drawn_before(tmp_path):
    tiny_model("llama", layers=6, dtype=torch.float32).save_pretrained(tmp_path)
    found = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = AdaptiveModel.from_pretrained(tmp_path)
        found.add(model.fingerprints())
        assert not model.exits.trained
    assert len(found) == 1
    first, second = (t.down.weight for t in list(model.exits.translators)[:2])
    assert not torch.equal(first, second)
    assert float(first.detach().std()) == pytest.approx(32**-0.5, rel=0.2)


@pytest.mark.parametrize("translator", ["low_rank", "full"])
def test_exits_are_trained_once_a_translator_is_not_the_identity(tmp_path, translator):
    config = ExitConfig.build(4, [1, 2], translator=translator)
    model = AdaptiveModel(tiny_model("llama", layers=4), config)
    assert not model.exits.trained
    model.save_pretrained(tmp_path / "untrained", merge=True)
    assert not AdaptiveModel.from_pretrained(tmp_path / "untrained").exits.trained
    with torch.no_grad():
        list(model.exits.translators[1].parameters())[-1][0, 0] = 1e-3
    assert model.exits.trained
    model.save_pretrained(tmp_path / "trained", merge=True)
    assert AdaptiveModel.from_pretrained(tmp_path / "trained").exits.trained


def test_exits_without_translators_need_no_training_unless_their_gates_decide():
    base = tiny_model("llama", layers=4)
    plain = ExitConfig.build(4, [2], translator="none")
    assert AdaptiveModel(base, plain).exits.trained
    gated = ExitConfig.build(4, [2], translator="none", measure="gate")
    model = AdaptiveModel(base, gated)
    assert not model.exits.trained
    with torch.no_grad():
        model.exits.gates[0].weight[0, 0] = 1.0
    assert model.exits.trained


@pytest.mark.parametrize(
    ("affordable", "folded"), [(0.9, 0), (1.1, 1), (1.9, 1), (2.1, 2), (9.0, 3)]
)
def test_the_shallowest_exits_are_folded_within_12_percent_of_the_model(affordable, folded):
    head = nn.Linear(8, 40, bias=False)
    heads = ExitHeads(ExitConfig.build(6, [1, 2, 3], translator="full"), 8)
    with torch.no_grad():
        for translator in heads.translators:
            translator.delta.weight.copy_(torch.randn(8, 8))
    same = nn.Identity()
    model_bytes = round(head.weight.nbytes * affordable / 0.12)
    reader = ExitReader(heads, same, head, head, lambda x: 2 * x, model_bytes=model_bytes)
    assert reader.folded_bytes == folded * head.weight.nbytes
    normed = torch.randn(5, 8)
    for index in range(3):
        expected = head(heads.translate(index, normed)) * (2 if index < folded else 1)
        torch.testing.assert_close(reader.logits(index, normed), expected, rtol=1e-4, atol=1e-5)


def test_a_head_with_a_bias_is_not_folded():
    head = nn.Linear(8, 40)
    heads = ExitHeads(ExitConfig.build(6, [1, 2], translator="full"), 8)
    same = nn.Identity()
    reader = ExitReader(heads, same, head, head, same, model_bytes=10**9)
    assert reader.folded_bytes == 0
    normed = torch.randn(3, 8)
    torch.testing.assert_close(reader.logits(1, normed), head(heads.translate(1, normed)))


def test_a_token_at_the_threshold_of_the_gate_exits():
    config = ExitConfig.build(4, [2], 0.5, measure="gate", translator="none")
    heads, same = ExitHeads(config, 4), nn.Identity()  # untrained probes give exactly 1/2
    reader = ExitReader(heads, same, same, same, same, model_bytes=0)
    reading = reader.evaluate(0, torch.tensor([[0.0, 3.0, 0.0, 0.0]]), 0.5)
    assert reading.confidences == [0.5] and reading._tokens == [1]
