"""Loading what `deliberate fit` wrote: what it says, on its own base weights and on others."""

from __future__ import annotations

import pytest
import torch
from synthetic_recordings import synthetic_recording
from tiny_calibration import tiny_calibration
from tiny_models import VOCAB, random_ids, tiny_model

from deliberate.api import draft_source
from deliberate.api.lookup import weights_alone
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibration import fit_calibration
from deliberate.calibration.stopping_policy import StepCosts
from deliberate.engine.draft_lengths import DraftPrior
from deliberate.modeling.draft_layer import DraftLayer, DraftLayerConfig
from deliberate.policies.guarantee_settings import storage_of
from deliberate.utils.errors import DeliberateError


@pytest.fixture
def fitted(tmp_path):
    """A folder of exits and a draft layer, and the folder of its base model."""
    base, folder = tmp_path / "base", tmp_path / "fitted"
    tiny_model("llama", dtype=torch.float32).save_pretrained(base)
    model = AdaptiveModel.from_pretrained(base, exits=[1, 2])
    config = DraftLayerConfig(model.backbone.hidden_size, 4, 2, 8, 48, VOCAB)
    model.attach_draft(DraftLayer(config), DraftPrior(survives=(0.5, 0.25)))
    model.save_pretrained(folder)
    return folder, base


def lines(caplog, folder, **how):
    caplog.clear()
    with caplog.at_level("WARNING", logger="deliberate"):
        model = AdaptiveModel.from_pretrained(folder, **how)
    return model, [one.getMessage() for one in caplog.records if one.name == "deliberate"]


def test_loading_says_in_one_line_what_exact_mode_does_with_drafts(fitted, caplog) -> None:
    _, (line,) = lines(caplog, fitted[0])
    assert "exact mode verifies drafts of a draft layer (up to 1.8 tokens a pass" in line
    assert "exits after layers 1, 2 serve threshold" in line and "base weights" not in line


@pytest.mark.parametrize(
    ("storage", "said"),
    [("int8", "certified (risk=accuracy or risk=token, and weights=int8 alone)"),
     ("native", "certified (risk=accuracy or risk=token)")],
)  # fmt: skip
def test_the_line_says_what_a_certified_request_must_name(fitted, caplog, storage, said) -> None:
    folder, _ = fitted
    model = AdaptiveModel.from_pretrained(folder)
    own = storage if storage == "int8" else storage_of(model)
    tiny_calibration(model, conditions={"storage": own}).save(folder / "calibration.json")
    _, (line,) = lines(caplog, folder)
    assert line.endswith(f"serve threshold, budget and {said}")


def test_a_model_that_is_loaded_for_its_weights_says_nothing_of_decoding(fitted, caplog) -> None:
    with weights_alone():
        assert not lines(caplog, fitted[0])[1]
    assert lines(caplog, fitted[0])[1]


def test_other_base_weights_draft_with_a_note_and_certify_nothing(fitted, caplog) -> None:
    folder, base = fitted
    own = AdaptiveModel.from_pretrained(folder)
    weights, exits = own.fingerprints()
    calibration = fit_calibration(
        synthetic_recording(120), StepCosts(2.0, (2.0, 2.0, 2.0), "layers"),
        weights=weights, exits=exits, data="d" * 64,
    )  # fmt: skip
    tiny_model("llama", dtype=torch.float32, seed=1).save_pretrained(base)
    model, (line,) = lines(caplog, folder)
    assert "the base weights are not those that the drafts were fitted on" in line
    ids = random_ids(9)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "eos_token_id": None}
    dense = model.generate(ids, fidelity="dense", **given)
    assert model.generate(ids, fidelity="exact", **given).tolist() == dense.tolist()
    with pytest.raises(DeliberateError, match="the calibration is for other weights"):
        model.set_calibration(calibration)
    # A file beside the exits is checked when it is used, not when it is loaded.
    calibration.save(folder / "calibration.json")
    beside = AdaptiveModel.from_pretrained(folder)
    with pytest.raises(DeliberateError, match="other weights"):
        beside.generate(ids, fidelity="certified", **given)
    # In another dtype the same weights are other numbers: nothing is known.
    _, (line,) = lines(caplog, folder, dtype=torch.bfloat16)
    assert "base weights" not in line


def test_a_draft_layer_stays_in_its_file_and_is_saved_again_as_it_was(fitted, tmp_path) -> None:
    model = AdaptiveModel.from_pretrained(fitted[0])
    weights = list(model.draft.layer.parameters())
    assert {one.dtype for one in weights} == {torch.bfloat16}
    assert not any(one.requires_grad for one in weights)
    model.save_pretrained(tmp_path / "again")
    for name in ("draft.safetensors", "exits.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (fitted[0] / name).read_bytes()
    # Over the files that are mapped, too.
    model.save_pretrained(fitted[0])
    again = AdaptiveModel.from_pretrained(fitted[0])
    assert all(a.equal(b) for a, b in zip(weights, again.draft.layer.parameters(), strict=True))


def test_the_first_answer_does_not_wait_for_what_runs_the_draft_layer(fitted, monkeypatch) -> None:
    model = AdaptiveModel.from_pretrained(fitted[0])
    built: list[int] = []
    make = draft_source.DraftExecutor

    def counted(*given):
        built.append(1)
        return make(*given)

    monkeypatch.setattr(draft_source, "DraftExecutor", counted)
    ids = random_ids(9)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)
    assert not built
    with torch.no_grad():
        model.base.lm_head.weight.mul_(1.01)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)
    assert built
