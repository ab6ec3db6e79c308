"""What "certified" in `generate` takes and refuses: certificates of this model and its weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calibrated_model import generate

from deliberate.api.checkpoint import resolve
from deliberate.calibration.calibration import Calibration
from deliberate.engine.exit_policy import FixedPolicy
from deliberate.policies.budget import LatencyBudget
from deliberate.utils.errors import DeliberateError


def test_certified_decodes_with_the_thresholds_of_its_certificate(model, calibration) -> None:
    certificate = calibration.certificate("accuracy")
    assert certificate.thresholds != model.exit_config.thresholds
    certified = generate(model, fidelity="certified")
    same = generate(model, fidelity="threshold", exit_policy=FixedPolicy(certificate.thresholds))
    assert certified.sequences.tolist() == same.sequences.tolist()
    assert certified.trace.exit_layers == same.trace.exit_layers
    assert set(certified.trace.exit_layers) != {model.backbone.num_layers}


@pytest.mark.parametrize("how", [{"fidelity": "certified"}, {"latency_budget": "L3"}])
def test_a_model_without_calibration_promises_nothing_and_says_how_to_get_one(model, how) -> None:
    model.set_calibration(None)
    with pytest.raises(DeliberateError, match="no calibration: run `deliberate calib") as caught:
        generate(model, **how)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["weights", "exits"])
def test_a_calibration_of_another_model_is_refused_by_name(model, calibration, name) -> None:
    foreign = replace(calibration, **{name: "f" * 64})
    with pytest.raises(DeliberateError, match=f"other {name} \\(ffffffffffff"):
        model.set_calibration(foreign)
    model._calibration = foreign  # as a folder that was loaded with the model
    for how in ({"fidelity": "certified"}, {"latency_budget": LatencyBudget(ms_per_token=1e4)}):
        with pytest.raises(DeliberateError, match=f"other {name}"):
            generate(model, **how)


@pytest.mark.parametrize("name", ["weights", "exits", "policy"])
def test_a_certificate_of_another_model_or_policy_is_refused_by_name(
    model, calibration, name
) -> None:
    foreign = [replace(c, **{name: "f" * 64}) for c in calibration.certificates]
    model.set_calibration(calibration.with_certificates(*foreign))
    with pytest.raises(DeliberateError, match=f"certificate is for other {name}"):
        generate(model, fidelity="certified")


def test_weights_changed_after_calibration_are_noticed(model) -> None:
    generate(model, fidelity="certified")
    weight = model.base.model.layers[0].mlp.down_proj.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] += 1e-3
        with pytest.raises(DeliberateError, match="other weights"):
            generate(model, fidelity="certified")
    finally:
        with torch.no_grad():
            weight.copy_(before)


def one_value(weight: torch.Tensor) -> None:
    weight.data[-1, 3] += 1e-3  # no call sees every value: it is found within a few


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        (lambda weight: weight.data.mul_(1.001), 1),
        (lambda weight: weight.data.add_(torch.ones(len(weight), 1) * 1e-3), 1),
        (lambda weight: setattr(weight, "data", weight.data * 1.001), 1),
        (one_value, 50),
    ],
    ids=["scaled", "low rank", "replaced", "one value"],
)
@pytest.mark.parametrize("how", [{"fidelity": "certified"}, {"latency_budget": "L3"}])
def test_weights_written_through_data_after_a_first_call_are_noticed(
    model, change, calls, how
) -> None:
    generate(model, **how)
    weight = model.base.model.layers[1].self_attn.v_proj.weight
    before = weight.detach().clone()
    version = weight._version
    try:
        change(weight)
        assert weight._version == version, "no trace is left"
        with pytest.raises(DeliberateError, match="other weights"):
            for _ in range(calls):
                generate(model, **how)
    finally:
        weight.data.copy_(before)
        model.guarantees.clear()


def test_a_merged_adapter_is_noticed(model) -> None:
    peft = pytest.importorskip("peft")
    generate(model, fidelity="certified")
    before = {name: value.clone() for name, value in model.base.state_dict().items()}
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model.base, settings)
    try:
        with pytest.raises(DeliberateError, match="modules of the base model have changed"):
            generate(model, fidelity="certified")
    finally:
        adapted.merge_and_unload()
    try:
        with pytest.raises(DeliberateError, match="other weights"):
            generate(model, fidelity="certified")
    finally:
        model.base.load_state_dict(before)
    assert generate(model, fidelity="certified").trace.tokens


def test_a_module_of_another_class_is_noticed(model) -> None:
    generate(model, fidelity="certified")
    mlp = model.base.model.layers[0].mlp
    kept, mlp.act_fn = mlp.act_fn, torch.nn.ReLU()
    try:
        with pytest.raises(DeliberateError, match=r"modules of the base model .*ReLU"):
            generate(model, fidelity="certified")
    finally:
        mlp.act_fn = kept


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"thresholds": (0.0, 0.0)}, "thresholds .* its policy has"),
        ({"lambda_": 0.0}, "its policy has"),
        ({"gate_threshold": 0.5}, "gate threshold 0.5"),
        ({"epsilon": 1e-4}, "epsilon=0.0001 at delta=0.05, but a loss of 0.01"),
        ({"observed": 0.09}, "but a loss of 0.09"),
        ({"n": 5}, "on 5 problems"),
    ],
)
def test_an_edited_certificate_is_refused_though_its_hashes_are_kept(model, edit, message) -> None:
    edited = [replace(c, **edit) for c in model.calibration.certificates]
    model.set_calibration(model.calibration.with_certificates(*edited))
    with pytest.raises(DeliberateError, match=message) as caught:
        generate(model, fidelity="certified")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("risk", ["accuracy", "token"])
@pytest.mark.parametrize("name", ["tiny", "tiny-gate"])
def test_the_bundled_certificates_are_supported_by_their_calibrations(name, risk) -> None:
    bundled = Calibration.load(resolve(name))
    bundled.check_certificate(bundled.certificate(risk))


CONTRADICTIONS = [
    ({"kv_mode": "skip"}, "kv_mode='skip' with fidelity"),
    ({"kv_mode": "propagate"}, "kv_mode='propagate'"),
    ({"decide": lambda k, row, confidence: True}, "decide='function'"),
    ({"thresholds": 0.5}, "thresholds=0.5"),
    ({"thresholds": [0.5, 0.6]}, r"thresholds=\[0.5, 0.6\]"),
    ({"lambda_": 1.0}, "lambda_=1.0"),
    ({"exit_policy": FixedPolicy([0.5, 0.5])}, "exit_policy='FixedPolicy'"),
]
CERTIFIED_ONLY = [
    ({"monitor": lambda agreed, seen: None}, "monitor='function'"),
    ({"do_sample": True, "top_k": 0}, "for sampling='greedy', not 'sampling'"),
    ({"repetition_penalty": 1.3}, "not 'RepetitionPenaltyLogitsProcessor'"),
]


@pytest.mark.parametrize(("setting", "message"), CONTRADICTIONS + CERTIFIED_ONLY)
def test_certified_refuses_by_name_what_its_certificate_was_not_made_for(
    model, setting, message
) -> None:
    with pytest.raises(DeliberateError, match=message) as caught:
        generate(model, fidelity="certified", **setting)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("setting", "message"), CONTRADICTIONS)
def test_a_budget_refuses_by_name_what_its_controller_cannot_steer(model, setting, message) -> None:
    with pytest.raises(DeliberateError, match=message):
        generate(model, latency_budget="L3", **setting)


@pytest.mark.parametrize("name", ["epsilon", "delta"])
def test_a_risk_level_is_refused_where_no_certificate_is_used(model, name) -> None:
    with pytest.raises(DeliberateError, match=f"{name}=0.1 with fidelity 'exact'"):
        generate(model, fidelity="exact", **{name: 0.1})


def test_certified_refuses_more_pending_tokens_than_it_was_tested_with(model) -> None:
    certificates = [
        replace(c, conditions={**c.conditions, "max_pending": 12})
        for c in model.calibration.certificates
    ]
    model.set_calibration(model.calibration.with_certificates(*certificates))
    assert generate(model, fidelity="certified").trace.tokens
    before = model.exit_config
    model.set_exit_config(replace(before, max_pending=100))
    with pytest.raises(DeliberateError, match="certificate is for max_pending=12, not 100"):
        generate(model, fidelity="certified")
