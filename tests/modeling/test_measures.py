"""Confidence measures: hand-computed values wherever they are read, and one more entry."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_checkpoint import save_checkpoint
from tiny_models import random_ids, tiny_model
from torch import nn

from deliberate.api.checkpoint import load_tokenizer
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.collect import record_sequences
from deliberate.calibration.exit_traces import Recording
from deliberate.cli import app
from deliberate.executors.fused.native import unavailable
from deliberate.kernels.ops.exit_head import HeadReading
from deliberate.modeling import measures
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.exit_heads import ExitHeads, ExitReader
from deliberate.modeling.measures import MEASURES, Measure
from deliberate.train import setup
from deliberate.utils.errors import DeliberateError


def by_hand(logits) -> dict[str, float]:
    """Every measure of logits ``[V]``, in plain Python."""
    weights = [math.exp(float(one)) for one in logits]
    shares = sorted((weight / sum(weights) for weight in weights), reverse=True)
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    return {
        "max_prob": shares[0],
        "margin": shares[0] - shares[1],
        "entropy": 1 - entropy / math.log(len(shares)),
        "lead": 1 - shares[1] / shares[0],
    }


def lead_of_best(logits):
    """The share by which the second is less likely than the best."""
    values, indices = logits.topk(2, dim=-1)
    return indices[..., 0], 1 - torch.exp(values[..., 1] - values[..., 0])


@pytest.fixture
def lead(monkeypatch) -> Measure:
    """A measure of one's own: one entry in the table, which no kernel knows."""
    entry = Measure("lead", lead_of_best)
    monkeypatch.setitem(MEASURES, entry.name, entry)
    return entry


def adaptive(measure: str, *, dtype=torch.float64, **settings) -> AdaptiveModel:
    config = ExitConfig.build(6, [2, 4], 0.02, measure=measure, translator="none")
    return AdaptiveModel(tiny_model("llama", layers=6, dtype=dtype), config, **settings).eval()


def exit_logits(model: AdaptiveModel, ids) -> list[torch.Tensor]:
    """Logits ``[T, V]`` of each exit by transformers' own modules."""
    with torch.no_grad():
        states = model.base(ids, output_hidden_states=True).hidden_states
        head, norm = model.base.lm_head, model.base.model.norm
        return [head(norm(states[layer][0])) for layer in model.exit_config.layers]


def test_values_of_a_distribution_of_four_tokens() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    expected = {"max_prob": 0.5, "margin": 0.25, "entropy": 1 - 1.75 / 2, "gate": 0.5}
    assert expected.keys() == MEASURES.keys()
    for name, value in expected.items():
        config = ExitConfig.build(2, [1], 0.5, measure=name, translator="none")
        heads = ExitHeads(config, 4).double()
        same = nn.Identity()
        reader = ExitReader(heads, same, same, same, same, model_bytes=0)
        with torch.no_grad():
            reading = reader.evaluate(0, logits, 0.5)
            assert reading.confidences == pytest.approx([value]) and reading.token(0) == 0
            token, score = reader.score(0, logits)
        assert int(token) == 0 and float(score) == pytest.approx(value)


@pytest.mark.parametrize("name", [name for name, one in MEASURES.items() if one.from_head])
def test_the_head_kernels_statistics_give_the_same_values(name) -> None:
    shares = torch.tensor([0.5, 0.25, 0.125, 0.125])
    reading = HeadReading(
        tokens=torch.tensor([[0, 1]]),
        values=shares[:2].log()[None] + 3,
        normaliser=torch.tensor([3.0]),
        entropy=torch.tensor([1.75 * math.log(2)]),
    )
    made = MEASURES[name].from_head(reading, 4)
    assert float(made) == pytest.approx(by_hand(shares.log())[name])


@pytest.mark.parametrize("executor", ["generic", "fused"])
@pytest.mark.parametrize("name", ["max_prob", "margin", "entropy"])
def test_decoding_compares_the_threshold_with_the_hand_computed_measure(name, executor) -> None:
    dtype = torch.float64 if executor == "generic" else torch.float32
    model = adaptive(name, dtype=dtype, executor=executor)
    out = model.generate(random_ids(5), fidelity="threshold", max_new_tokens=8, thresholds=0.02,
                         return_dict_in_generate=True, kv_mode="defer")  # fmt: skip
    records = out.trace.records
    layers = list(model.exit_config.layers)
    early = [place for place, record in enumerate(records) if record.exit_layer in layers]
    assert early
    logits = exit_logits(model, out.sequences)
    for place in early:
        found = logits[layers.index(records[place].exit_layer)][5 + place - 1]
        assert records[place].confidence == pytest.approx(by_hand(found)[name], abs=1e-4)
        assert records[place].token == int(found.argmax())


@pytest.mark.parametrize("own", ["max_prob", "margin", "entropy"])
def test_recordings_hold_the_hand_computed_measures(own) -> None:
    model = adaptive(own)
    ids = random_ids(9, seed=3)
    recorded = record_sequences(model, [ids[0].tolist()], [4])
    assert {recorded.measure, *recorded.others} == set(MEASURES)
    for name in ("max_prob", "margin", "entropy"):
        scores = recorded.with_measure(name).scores
        for column, logits in enumerate(exit_logits(model, ids)):
            expected = [by_hand(row)[name] for row in logits[3:8]]
            np.testing.assert_allclose(scores[:, column], expected, atol=1e-6)


def test_a_measure_of_ones_own_decodes_by_the_generic_executor(lead) -> None:
    model = adaptive("lead", executor="generic")
    out = model.generate(random_ids(5), fidelity="threshold", max_new_tokens=6,
                         return_dict_in_generate=True)  # fmt: skip
    first = next(r for r in out.trace.records if r.exit_layer < 6)
    place = out.trace.records.index(first)
    index = model.exit_config.layers.index(first.exit_layer)
    found = exit_logits(model, out.sequences)[index][5 + place - 1]
    assert first.confidence == pytest.approx(by_hand(found)["lead"])
    exact = model.generate(random_ids(5), fidelity="exact", max_new_tokens=6)
    assert torch.equal(exact, model.generate(random_ids(5), fidelity="dense", max_new_tokens=6))
    recorded = record_sequences(model, [[1, 2, 3, 4, 5]], [2])
    assert recorded.measure == "lead" and set(recorded.others) == MEASURES.keys() - {"lead"}


def test_executors_without_a_measure_refuse_it_by_name(lead) -> None:
    if unavailable(torch.zeros(1)):
        pytest.skip(str(unavailable(torch.zeros(1))))
    model = adaptive("lead", dtype=torch.float32)
    with pytest.raises(DeliberateError) as caught:
        model.generate(random_ids(5), fidelity="exact", max_new_tokens=4)
    assert str(caught.value) == (
        "measure 'lead' is not computed by the C++ kernels (they compute max_prob, margin, "
        "entropy, gate): use one of these, or executor='generic'"
    )
    with pytest.raises(DeliberateError, match="'lead' is not computed by X"):
        measures.require_known(lead, "X", lambda one: one.known_to_cuda)
    eager = adaptive("lead", dtype=torch.float32, executor="fused", engine="eager")
    assert eager.generate(random_ids(5), fidelity="exact", max_new_tokens=4).shape == (1, 9)


def test_an_unknown_measure_is_refused_with_the_list() -> None:
    assert not {"lead"} & MEASURES.keys()
    for name in ("lead", None, 3):
        with pytest.raises(DeliberateError, match="is unknown; it is one of max_prob, margin"):
            ExitConfig.build(6, [2], measure=name)
    with pytest.raises(DeliberateError, match="measure name 'two words'"):
        Measure("two words", lead_of_best)


def test_the_training_command_takes_a_measure_of_ones_own(lead, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(setup, "TOKENIZER_WORDS", 300)
    toy = ["debug=fast", "data=words", "model.vocab_size=300", "trainer.max_steps=2",
           "trainer.bf16=false"]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        app.main(["train", *toy, "exits.measure=lead", f"output_dir={tmp_path / 'trained'}"])
    assert not ended.value.code
    model = AdaptiveModel.from_pretrained(tmp_path / "trained" / "model", executor="generic")
    assert model.exit_config.measure == "lead"


def test_the_calibration_command_takes_a_measure_of_ones_own(lead, tmp_path) -> None:
    model = AdaptiveModel.from_pretrained(save_checkpoint(tmp_path / "plain"))
    model.set_exit_config(replace(model.exit_config, measure="lead"))
    model.save_pretrained(tmp_path / "model", merge=True)
    load_tokenizer(tmp_path / "plain").save_pretrained(tmp_path / "model")
    small = ["size=60", "task.steps=[1,2]", "task.max_new_tokens=20", "costs=layers", "device=cpu",
             "epsilon=0.9", f"out={tmp_path / 'calibrated'}"]  # fmt: skip
    command = ["calibrate", f"model={tmp_path / 'model'}", *small]
    with pytest.raises(SystemExit) as ended:
        app.main([*command, "executor=generic"])
    assert not ended.value.code
    assert Recording.load(tmp_path / "calibrated" / "recording.npz").measure == "lead"
