"""What "certified" and "budget" promise in `generate`, and when they refuse to."""

from __future__ import annotations

import json
import math
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from tiny_calibration import keep_tiny_cost, tiny_calibration
from tiny_models import random_ids, tiny_model

from deliberate.api.checkpoint import resolve
from deliberate.api.generation import AdaptiveDecoding
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibration import Calibration
from deliberate.calibration.conditions import conditions_sha256
from deliberate.engine.exit_policy import FixedPolicy
from deliberate.engine.request import Request
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.scheduler import DeepSchedule
from deliberate.engine.spec import DecodingSpec
from deliberate.modeling.exit_config import ExitConfig
from deliberate.policies.budget import LatencyBudget
from deliberate.policies.exit_policies import COMPARE_EVERY
from deliberate.policies.guarantee_settings import decoding_conditions
from deliberate.utils.errors import DeliberateError

LAYER = 1e-3  # seconds, of the made-up cost model
NEW = 24
PROMPT = 12


@pytest.fixture(scope="module")
def base():
    return tiny_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def calibration(base):
    return tiny_calibration(AdaptiveModel(base, ExitConfig((1, 2), (0.1, 0.1), translator="none")))


@pytest.fixture
def model(base, calibration, tmp_path, monkeypatch):
    """Calibrated, with a cost model in a cache of its own."""
    monkeypatch.setenv("DELIBERATE_CACHE", str(tmp_path))
    exits = ExitConfig((1, 2), (0.1, 0.1), translator="none")
    made = AdaptiveModel(base, exits, executor="generic")
    made.set_calibration(calibration)
    keep_tiny_cost(made, tmp_path, LAYER)
    return made


def generate(model, **how):
    return model.generate(
        random_ids(PROMPT), max_new_tokens=NEW, return_dict_in_generate=True, **how
    )


class Ticking:
    """A clock that a test sets: so many seconds at every reading."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now = seconds, 0.0

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


# -- certified -------------------------------------------------------------------------------------


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


WORDS = {"prompt": "<q>{question}", "prompt_ends": [[1, 2], [3]]}


@pytest.fixture
def bound(model):
    """The calibrated model with certificates as calibration writes them today."""
    conditions = decoding_conditions(model, DecodingSpec(), max_new_tokens=NEW) | WORDS
    certificates = [
        replace(c, conditions=conditions, conditions_sha256=conditions_sha256(conditions))
        for c in model.calibration.certificates
    ]
    model.set_calibration(model.calibration.with_certificates(*certificates))
    return model


def certified(model, prompt=(1, 2, 7, 8, 3), **how):
    given = {"max_new_tokens": NEW, "return_dict_in_generate": True} | how
    return model.generate(torch.tensor([prompt]), fidelity="certified", **given)


def test_a_request_under_the_conditions_of_its_certificate_is_decoded(bound) -> None:
    assert certified(bound).trace.tokens
    assert certified(bound, max_new_tokens=3).trace.tokens, "fewer tokens are covered"
    # Without sampling transformers takes no notice of a temperature, and the output is greedy.
    same = certified(bound, temperature=5.0, do_sample=False)
    assert same.sequences.tolist() == certified(bound).sequences.tolist()
    spec = DecodingSpec(fidelity="certified", risk="token", epsilon=0.1, schedule=DeepSchedule())
    assert bound.generate(torch.tensor([[1, 2, 9, 3]]), spec=spec, max_new_tokens=4).numel() == 8


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_new_tokens": 100}, "max_new_tokens=24, not 100: give max_new_tokens=24 or fewer"),
        ({"max_new_tokens": NEW + 1}, "max_new_tokens=24, not 25"),
        ({"do_sample": True, "temperature": 5.0, "top_k": 0}, "not 'sampling and Temperature"),
        ({"repetition_penalty": 5.0}, "sampling='greedy', not 'RepetitionPenaltyLogitsProcessor'"),
        ({"bad_words_ids": [[5]]}, "not 'NoBadWordsLogitsProcessor'"),
        ({"kv_mode": "skip"}, "kv_mode='skip' with fidelity 'certified'"),
        ({"max_pending": 100}, "max_pending=12, not 100: use max_pending=12"),
        ({"schedule": DeepSchedule(max_wait=3)}, r"schedule={}, not {'max_wait': 3}"),
        ({"decide": lambda *_: True}, "decide='function' with fidelity 'certified'"),
        ({"exit_policy": "nonsense"}, "exit_policy='nonsense' with fidelity 'certified'"),
        ({"pacer": "nonsense"}, "pacer='nonsense' is now called exit_policy"),
        ({"prompt": (5, 6, 7)}, "prompts of the form '<q>{question}', and prompt 0 is of another"),
    ],
)
def test_a_request_under_other_conditions_is_refused_in_one_line_that_names_them(
    bound, how, message
) -> None:
    with pytest.raises(DeliberateError, match=message) as caught:
        certified(bound, **how)
    assert "\n" not in str(caught.value)


def test_the_conditions_of_a_request_name_its_constraint_and_its_executor(bound) -> None:
    class Grammar:
        pass

    spec = DecodingSpec(schedule=DeepSchedule(join=math.inf))
    found = decoding_conditions(bound, spec, max_new_tokens=4, constraint=Grammar())
    assert (found["constraint"], found["executor"]) == ("Grammar", "generic")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["schedule"] == {"join": "infinity"}
    mixed = AdaptiveModel(bound.base, [1, 2], executor="fused", weights={"int8": [0]})
    storage = decoding_conditions(mixed, DecodingSpec(), max_new_tokens=4)["storage"]
    assert storage == ["int8", "native", "native", "native", "native"]
    mixed.attach_gate()
    for gate in (True, False):
        spec = DecodingSpec(gate=gate)
        assert decoding_conditions(mixed, spec, max_new_tokens=4)["gate"] is gate


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            Request([1, 2, 7, 3], NEW + 1, DecodingSpec(fidelity="certified")),
            "not 25: give max_new",
        ),
        (Request([7, 8], NEW, DecodingSpec(fidelity="certified")), "prompt 0 is of another"),
        (
            Request([1, 2, 3], 4, DecodingSpec(fidelity="certified"), TokenChooser(sample=True)),
            "not 'sampling': pass do_sample=False",
        ),
    ],
)
def test_a_request_to_the_engine_is_compared_too(bound, request_, message) -> None:
    engine = bound.engine()
    engine.add(Request([1, 2, 7, 3], NEW, DecodingSpec(fidelity="certified")))
    with pytest.raises(DeliberateError, match=message):
        engine.add(request_)


def test_padding_is_no_part_of_the_prompts_form(bound) -> None:
    ids = torch.tensor([[0, 0, 1, 2, 3], [1, 2, 7, 8, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    how = {"fidelity": "certified", "max_new_tokens": 4}
    assert bound.generate(ids, attention_mask=mask, **how).shape[0] == 2
    ids[1, 0] = 9
    with pytest.raises(DeliberateError, match="prompt 1 is of another"):
        bound.generate(ids, attention_mask=mask, **how)


def test_a_certificate_is_for_the_executor_that_calibrated(bound, base, calibration) -> None:
    stated = bound.calibration
    fused = AdaptiveModel(
        base, ExitConfig((1, 2), (0.1, 0.1), translator="none"), executor="fused", engine="eager"
    )
    fused.set_calibration(stated)
    with pytest.raises(DeliberateError, match="executor='generic', not 'fused eager': load the"):
        certified(fused)
    fused.set_calibration(calibration)
    assert certified(fused).trace.tokens, "a certificate that does not state it is not compared"


def test_a_certificate_without_a_limit_is_warned_of_once(model) -> None:
    certificates = [replace(c, conditions={}) for c in model.calibration.certificates]
    model.set_calibration(model.calibration.with_certificates(*certificates))
    with pytest.warns(UserWarning, match="does not state max_new_tokens, so no request is comp"):
        generate(model, fidelity="certified")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, fidelity="certified")


def test_the_bundled_certificates_hold_up_to_the_tokens_that_they_were_made_with() -> None:
    bundled = AdaptiveModel.from_pretrained("tiny", executor="generic")
    prompt = torch.tensor([[5, 6, 7]])
    assert bundled.generate(prompt, fidelity="certified", max_new_tokens=4).numel() > 3
    for how, message in (
        ({"max_new_tokens": 193}, "max_new_tokens=192, not 193"),
        ({"max_new_tokens": 4, "repetition_penalty": 5.0}, "sampling='greedy'"),
        ({"max_new_tokens": 4, "schedule": DeepSchedule(join=2.0)}, "schedule={}"),
    ):
        with pytest.raises(DeliberateError, match=message):
            bundled.generate(prompt, fidelity="certified", **how)


def test_certified_refuses_weights_that_are_stored_smaller() -> None:
    small = AdaptiveModel.from_pretrained("tiny", executor="fused", weights="int8", engine="eager")
    with pytest.raises(DeliberateError, match="for storage='native', not 'int8': load the"):
        small.generate(torch.tensor([[5, 6]]), fidelity="certified", max_new_tokens=4)


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"epsilon": 0.01}, r"no certificate for risk accuracy, epsilon <= 0.01; there is"),
        ({"delta": 0.01}, "delta <= 0.01"),
    ],
)
def test_a_promise_that_no_certificate_makes_is_refused_with_those_there_are(
    model, requested, message
) -> None:
    with pytest.raises(DeliberateError, match=message) as caught:
        generate(model, fidelity="certified", **requested)
    assert "accuracy (epsilon 0.1, delta 0.05)" in str(caught.value)


def test_a_risk_that_there_is_none_of_is_refused_with_those_there_are(model) -> None:
    with pytest.raises(DeliberateError, match="risk 'speed' is unknown; it is one of token, acc"):
        generate(model, fidelity="certified", risk="speed")


def test_a_certificate_expires_when_the_traffic_disagrees_more_than_it_allows(model) -> None:
    limit = 0.01  # a random model's exits disagree far more often
    certificates = [replace(c, disagreement=limit) for c in model.calibration.certificates]
    model.set_calibration(model.calibration.with_certificates(*certificates))
    with pytest.raises(DeliberateError, match=r"certificate has expired: .* tokens disagree"):
        for _ in range(40):
            generate(model, fidelity="certified")
    certificate = model.calibration.certificate("accuracy")
    drift = model.guarantees.drift(certificate)
    assert drift.alarm and drift.disagreements > limit * drift.tokens > 0
    assert generate(model, fidelity="exact").trace.tokens, "the other fidelities go on"
    model.set_calibration(model.calibration)
    assert generate(model, fidelity="certified").trace.tokens, "a new calibration starts afresh"


def test_the_monitor_looks_at_different_passes_of_successive_answers(model) -> None:
    pacers = [model.guarantees.certified(model) for _ in range(2 * COMPARE_EVERY)]
    assert [one.compare_offset for one in pacers] == [
        *range(COMPARE_EVERY),
        *range(COMPARE_EVERY),
    ]


# -- budget ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "fast", True])
@pytest.mark.parametrize("name", ["ms_per_token", "deadline_ms"])
def test_an_impossible_budget_is_one_line_that_names_the_value(model, name, value) -> None:
    with pytest.raises(DeliberateError, match=f"{name} = .*number of milliseconds") as caught:
        generate(model, latency_budget={name: value})
    assert "\n" not in str(caught.value) and str(value) in str(caught.value)


def test_an_infeasible_budget_is_refused_before_decoding_with_the_least_possible(model) -> None:
    calls = []
    handle = model.base.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(DeliberateError, match="cannot be met: the least possible") as caught:
            generate(model, latency_budget=LatencyBudget(ms_per_token=0.5))
    finally:
        handle.remove()
    assert calls == []
    stated = float(str(caught.value).split("least possible here is ")[1].split(" ms")[0])
    assert 1.0 < stated < 4.0, "between one layer and all four, at 1 ms each"
    assert generate(model, latency_budget=LatencyBudget(ms_per_token=1e4)).budget.met


def test_a_deadline_is_infeasible_for_a_long_prompt_only(model) -> None:
    budget = LatencyBudget(deadline_ms=60.0)
    feasible = [model.guarantees.feasibility(model, budget, n, NEW).feasible for n in (5, 100)]
    assert feasible == [True, False]


def test_a_budget_and_its_fidelity_belong_together(model) -> None:
    with pytest.raises(DeliberateError, match="fidelity 'budget' needs latency_budget"):
        generate(model, fidelity="budget")
    with pytest.raises(DeliberateError, match="latency_budget with fidelity 'exact'"):
        generate(model, fidelity="exact", latency_budget="L3")
    assert generate(model, latency_budget="L3").budget.budget == "deadline of 1000 ms"


def paced(model, budget, seconds: float):
    """A generation on a clock that gains `seconds` at each reading."""
    loop = AdaptiveDecoding(model, latency_budget=budget).loop(max_new_tokens=NEW, end_tokens=())
    loop.stopwatch.clock = Ticking(seconds)
    for _ in loop.run(random_ids(PROMPT)):
        pass
    return loop


def test_a_tight_budget_takes_shallower_exits_than_an_ample_one(model) -> None:
    # Exits of a random model hardly ever reach the scores that a policy asks for: the guard does.
    tight = paced(model, LatencyBudget(ms_per_token=2.4), 2e-3)
    ample = paced(model, LatencyBudget(ms_per_token=1e3), 1e-6)
    assert tight.trace.layers_per_token < ample.trace.layers_per_token
    assert 1 in tight.trace.exit_layers and tight.exit_policy.report.guarded > 0
    assert set(ample.trace.exit_layers) == {4} and ample.exit_policy.report.guarded == 0


def test_the_report_is_of_the_clock_that_the_loop_was_given(model) -> None:
    slow = paced(model, LatencyBudget(ms_per_token=5.0), 1.0).exit_policy.report
    assert not slow.met and slow.seconds > NEW and slow.tokens == NEW
    assert slow.allowed_ms == pytest.approx(5.0 * NEW)


def interleaved(model, budget, clocks: list[Ticking]):
    """Generations that take turns, token by token, each on its own clock."""
    loops = []
    for clock in clocks:
        loop = AdaptiveDecoding(model, latency_budget=budget).loop(
            max_new_tokens=NEW, end_tokens=()
        )
        loop.stopwatch.clock = clock
        loops.append(loop)
    runs = [loop.run(random_ids(PROMPT, seed=seed)) for seed, loop in enumerate(loops)]
    while runs:
        runs = [one for one in runs if next(one, None) is not None]
    return loops


def test_generations_that_take_turns_are_each_steered_and_reported_by_their_own_time(model) -> None:
    budget = LatencyBudget(ms_per_token=50.0)
    slow, fast = interleaved(model, budget, [Ticking(0.5), Ticking(1e-6)])
    assert not slow.exit_policy.report.met and slow.exit_policy.report.seconds > NEW
    assert fast.exit_policy.report.met and fast.exit_policy.report.seconds < 1e-3
    assert slow.exit_policy.report.guarded > 0 and fast.exit_policy.report.guarded == 0
    assert set(fast.trace.exit_layers) == {4} and 1 in slow.trace.exit_layers
    shared = model.guarantees.budget(model, budget).shared
    assert len(shared.lengths) == 2
    speeds = [one.exit_policy.report.speed for one in (slow, fast)]
    assert shared.speed == pytest.approx(math.sqrt(math.prod(speeds))), "of both, by their mean"


def test_threads_with_one_budget_report_what_each_of_them_took(model) -> None:
    budget = LatencyBudget(ms_per_token=50.0)
    paces = [0.5, 1e-6] * 4
    loops = []
    for pace in paces:
        loop = AdaptiveDecoding(model, latency_budget=budget).loop(
            max_new_tokens=NEW, end_tokens=()
        )
        loop.stopwatch.clock = Ticking(pace)
        loops.append(loop)

    def run(loop) -> None:
        for _ in loop.run(random_ids(PROMPT)):
            time.sleep(1e-4)  # so that all of them run at once

    with ThreadPoolExecutor(len(loops)) as pool:
        list(pool.map(run, loops))
    for pace, loop in zip(paces, loops, strict=True):
        report = loop.exit_policy.report
        assert report.tokens == NEW
        assert report.met is (pace < 1e-3)
        assert (report.seconds > NEW) is (pace > 1e-3)
    assert len(model.guarantees.budget(model, budget).shared.lengths) == len(loops)


def test_one_controller_serves_all_generations_of_a_budget(model) -> None:
    budget = LatencyBudget(ms_per_token=1e4)
    first = model.guarantees.budget(model, budget).shared
    assert model.guarantees.budget(model, LatencyBudget(ms_per_token=1e4)).shared is first
    generate(model, latency_budget=budget)
    assert len(first.lengths) == 1, "and remembers how long answers are"
    slow = paced(model, budget, 0.5).exit_policy.report
    assert first.speed == slow.speed > 2, "and how fast the machine is"
    model.set_calibration(model.calibration)
    assert model.guarantees.budget(model, budget).shared is not first


def test_the_drift_monitor_is_told_how_many_early_tokens_full_depth_would_not_choose(model) -> None:
    policy = model.guarantees.certified(model)
    policy.on_compared(3, 5)
    policy.on_compared(2, 2)
    policy.end(1.0, 9)
    assert (policy.drift.disagreements, policy.drift.tokens, policy.drift.answers) == (2, 7, 1)
    policy.end(2.0, 9)
    assert policy.drift.answers == 1, "counts are of one answer each"
