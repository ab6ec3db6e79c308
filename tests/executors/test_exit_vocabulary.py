"""Exits over a draft vocabulary: rows of the head, in every executor, alone and in batches."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tiny_models import VOCAB, left_padded, random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.collect import record_sequences
from deliberate.calibration.fingerprint import exits_sha256
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec
from deliberate.executors.fused.native import NativeHead
from deliberate.executors.quantization import Matrix
from deliberate.kernels.border import BorderError
from deliberate.modeling.exit_config import ExitConfig
from deliberate.utils.errors import DeliberateError

IDS = torch.arange(1, VOCAB, 2)
HOW = [
    {"executor": "generic"},
    {"executor": "fused"},
    {"executor": "fused", "weights": "int8"},
    {"executor": "fused", "weights": "int4"},
    {"executor": "fused", "engine": "eager"},
]


def adaptive(how, *, translator="full", measure="max_prob", threshold=0.02) -> AdaptiveModel:
    base = tiny_model("llama", layers=4, dtype=torch.float32)
    config = ExitConfig.build(
        4, [1, 2], threshold, measure=measure, translator=translator, vocabulary=len(IDS)
    )
    model = AdaptiveModel(base, config, **how)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.exits.vocabulary.copy_(IDS)
        for parameter in model.exits.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("how", HOW, ids=lambda how: "-".join(how.values()))
@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy", "gate"])
def test_an_exit_chooses_as_the_rows_of_its_vocabulary_say(how, measure) -> None:
    model = adaptive(how, measure=measure)
    reader, backbone = model.reader(), model.backbone
    states = torch.randn(6, backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        normed = backbone.norm(states)
        whole = model.base.lm_head(model.exits.translate(1, normed))[:, IDS]
        logits = reader.logits(1, normed)
        reading = reader.evaluate(1, states, 0.0, keep_logits=True)
        token, score = reader.score(1, normed)
        every, scores = reader.every_score(1, states)
    apart = 0.2 if "weights" in how else 1e-4
    assert (logits[:, IDS] - whole).abs().max() < apart
    outside = torch.ones(VOCAB, dtype=torch.bool)
    outside[IDS] = False
    assert logits.shape == (6, VOCAB) and logits[:, outside].isneginf().all()
    best = logits.argmax(dim=-1).tolist()
    assert [reading.token(row) for row in range(6)] == token.tolist() == every.tolist() == best
    torch.testing.assert_close(reading.logits(3), logits[3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(reading.confidences), score, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores[measure], score, atol=1e-4, rtol=1e-4)
    assert all(torch.isfinite(one).all() for one in scores.values())


def test_heads_of_the_kernels_are_not_kept_as_floats_too() -> None:
    model = adaptive({"executor": "fused", "weights": "int8"})
    reader = model.reader()
    rows = len(IDS) * model.backbone.hidden_size
    assert reader._folded == {}
    # A byte a weight, and a scale a row.
    assert 2 * rows <= reader.folded_bytes < 2 * rows * 1.5


@pytest.mark.parametrize("how", HOW, ids=lambda how: "-".join(how.values()))
def test_exact_mode_is_dense_and_early_tokens_are_of_the_vocabulary(how) -> None:
    model = adaptive(how)
    ids = random_ids(9)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "eos_token_id": None}
    dense = model.generate(ids, fidelity="dense", **given)
    exact = model.generate(
        ids, fidelity="exact", thresholds=0.02, return_dict_in_generate=True, **given
    )
    assert exact.sequences.tolist() == dense.tolist()
    early = model.generate(ids, fidelity="threshold", return_dict_in_generate=True, **given)
    (records,) = [one.records for one in early.traces]
    exited = [one.token for one in records if one.exit_layer < 4]
    assert exited and set(exited) <= set(IDS.tolist())
    again = model.generate(ids, fidelity="threshold", **given)  # several tokens in one call
    assert again.tolist() == early.sequences.tolist()


def test_batches_and_sampling_give_what_one_sequence_gets() -> None:
    model = adaptive({"executor": "fused"})
    ids, mask = left_padded([5, 9, 3])
    given = {"max_new_tokens": 16, "eos_token_id": None, "fidelity": "threshold"}
    together = model.generate(ids, attention_mask=mask, **given)
    for row in range(3):
        own = ids[row][mask[row].bool()][None]
        alone = model.generate(own, attention_mask=torch.ones_like(own), **given)
        assert together[row, ids.shape[1] :].tolist() == alone[0, own.shape[1] :].tolist()
    drawn = {"do_sample": True, "temperature": 1.3, "max_new_tokens": 16, "eos_token_id": None}
    outputs = []
    for fidelity in ("dense", "exact"):
        torch.manual_seed(3)
        outputs.append(model.generate(ids, attention_mask=mask, fidelity=fidelity, **drawn))
    assert outputs[0].tolist() == outputs[1].tolist()


class Only:
    """A constraint: these tokens and no others."""

    finished = False

    def __init__(self, allowed) -> None:
        self.allowed = allowed

    def forced(self):
        return []

    def mask(self, scores):
        left = torch.full_like(scores, -torch.inf)
        left[..., self.allowed] = scores[..., self.allowed]
        return left

    def advance(self, token) -> None: ...

    def rollback(self, tokens) -> None: ...


def test_a_constraint_that_leaves_one_draft_token_makes_no_exit_sure_of_it() -> None:
    """Renormalised over what is left, its confidence would be 1, whatever lies outside."""
    model = adaptive({"executor": "generic"}, threshold=0.5)
    engine, layers, tokens = model.engine(), [], []
    engine.add(
        Request(
            random_ids(9)[0],
            12,
            DecodingSpec(fidelity="threshold"),
            constraint=Only([int(IDS[3]), 0, 2, 4]),
        )
    )
    while engine.unfinished:
        for output in engine.step():
            layers += output.exit_layers
            tokens += output.tokens
    assert set(tokens) <= {int(IDS[3]), 0, 2, 4}
    assert layers == [4] * 12


def test_a_recording_counts_tokens_outside_the_vocabulary_as_disagreements() -> None:
    model = adaptive({"executor": "fused"})
    sequences = [random_ids(20, seed=seed)[0].tolist() for seed in range(4)]
    recorded = record_sequences(model, sequences, [3] * 4)
    assert set(recorded.tokens.ravel().tolist()) <= set(IDS.tolist())
    outside = ~torch.isin(torch.tensor(recorded.final), IDS)
    assert outside.any() and not recorded.agrees[outside.numpy()].any()


def test_the_vocabulary_is_saved_hashed_and_checked(tmp_path) -> None:
    model = adaptive({"executor": "fused"})
    model.save_pretrained(tmp_path, merge=True)
    again = AdaptiveModel.from_pretrained(tmp_path)
    assert again.exits.vocabulary.tolist() == IDS.tolist()
    assert exits_sha256(again) == exits_sha256(model)
    with torch.no_grad():
        again.exits.vocabulary[0] = 0
    assert exits_sha256(again) != exits_sha256(model)
    again.exits.vocabulary[0] = IDS[1]
    again.save_pretrained(tmp_path)
    with pytest.raises(DeliberateError, match="vocabulary must be token ids that rise"):
        AdaptiveModel.from_pretrained(tmp_path)
    with pytest.raises(DeliberateError, match="vocabulary 7 differs from the trained"):
        model.set_exit_config(dataclasses.replace(model.exit_config, vocabulary=7))
    with pytest.raises(DeliberateError, match="exit vocabulary 1 must be"):
        dataclasses.replace(model.exit_config, vocabulary=1)
    config = tmp_path / "adaptive_config.json"
    raw = json.loads(config.read_text())
    assert raw["exits"]["vocabulary"] == len(IDS)


def test_a_vocabulary_of_another_model_is_refused_by_name() -> None:
    model = adaptive({"executor": "generic"})
    with torch.no_grad():
        model.exits.vocabulary[-1] = VOCAB + 5
    with pytest.raises(DeliberateError, match=f"tokens up to {VOCAB + 5}, and the head has"):
        model.reader()


@pytest.mark.parametrize(
    "ids",
    [torch.arange(3), torch.arange(4, dtype=torch.int32), torch.arange(8)[::2], -torch.arange(4)],
    ids=["short", "int32", "strided", "negative"],
)
def test_ids_that_the_kernels_cannot_read_are_refused_before_them(ids) -> None:
    head = Matrix(torch.randn(4, 8))
    assert NativeHead(None, 1e-6, head, ids=torch.arange(4)).head.tokens_end == 4
    with pytest.raises(BorderError, match="tokens of a head's rows"):
        NativeHead(None, 1e-6, head, ids=ids)
