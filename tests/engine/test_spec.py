"""What a request chooses about its decoding: checked once, hashed, and data."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deliberate.config import Fidelity, KVMode, Risk
from deliberate.engine.long_text_config import LongTextConfig
from deliberate.engine.scheduler import DeepSchedule
from deliberate.engine.spec import DecodingSpec, spec_of
from deliberate.utils.errors import DeliberateError

THRESHOLD = st.one_of(st.floats(0.01, 1.0), st.just(math.inf))
SPECS = st.fixed_dictionaries(
    {},
    optional={
        "fidelity": st.sampled_from([None, "dense", "exact", "threshold"]),
        "thresholds": st.one_of(st.none(), THRESHOLD, st.lists(THRESHOLD, max_size=4)),
        "max_pending": st.one_of(st.none(), st.integers(1, 40)),
        "online": st.booleans(),
        "gate": st.booleans(),
        "schedule": st.one_of(
            st.none(), st.builds(DeepSchedule, max_wait=st.integers(0, 9), join=st.just(math.inf))
        ),
        "long_text": st.one_of(st.none(), st.builds(LongTextConfig, window=st.integers(1, 30))),
    },
)


@given(SPECS)
def test_a_spec_survives_json_with_its_hash(fields):
    spec = DecodingSpec(**fields)
    text = json.dumps(spec.to_dict(), allow_nan=False)
    back = DecodingSpec.from_dict(json.loads(text))
    assert back == spec and hash(back) == hash(spec) and back.sha256 == spec.sha256
    assert DecodingSpec(**spec.given()) == spec


@given(SPECS, SPECS)
def test_two_specs_are_equal_where_every_field_is(one, other):
    a, b = DecodingSpec(**one), DecodingSpec(**other)
    assert (a == b) == (a.to_dict() == b.to_dict())


def test_the_hash_of_a_spec_does_not_change_between_releases():
    # It is stored in certificates: a change here makes them those of another spec.
    assert DecodingSpec().sha256.startswith("44136fa355b3")
    spec = DecodingSpec(fidelity="threshold", thresholds=(0.5, math.inf), kv_mode="skip")
    assert spec.sha256.startswith("e466216c4982")
    assert DecodingSpec(
        fidelity=Fidelity.THRESHOLD, thresholds=[0.5, math.inf], kv_mode="skip"
    ) == (spec)


def test_numbers_that_python_calls_equal_to_truth_values_are_other_specs():
    off, zero = DecodingSpec(strict=False), DecodingSpec(strict=0.0)
    assert off != zero and DecodingSpec(strict=True) != DecodingSpec(strict=1.0)
    assert DecodingSpec.from_dict(zero.to_dict()) == zero


def test_a_spec_cannot_be_changed_and_holds_members_of_the_enumerations():
    spec = DecodingSpec(fidelity="certified", risk="token", kv_mode="defer", thresholds=None)
    assert (spec.fidelity, spec.risk) == (Fidelity.CERTIFIED, Risk.TOKEN)
    assert spec.kv_mode is KVMode.DEFER
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.online = False


WRONG = [
    ({"fidelity": "fast"}, "fidelity 'fast' is unknown; it is one of dense"),
    ({"kv_mode": "drop"}, "kv_mode 'drop' is unknown"),
    ({"risk": "speed"}, "risk 'speed' is unknown; it is one of token, accuracy"),
    ({"thresholds": 0.0}, r"threshold 0.0 is outside \(0, 1\]"),
    ({"thresholds": (0.5, math.nan)}, "threshold nan is outside"),
    ({"thresholds": "high"}, "thresholds='high': a number"),
    ({"lambda_": -1.0}, "lambda_=-1.0 must be 0 or more"),
    ({"lambda_": math.nan}, "lambda_=nan must be"),
    ({"max_pending": 0}, "max_pending=0 must be a whole number of at least 1"),
    ({"max_pending": 2.5}, "max_pending=2.5 must be a whole"),
    ({"lookup_tokens": -1}, "lookup_tokens=-1 must be a whole number of at least 0"),
    ({"lookup_tokens": True}, "lookup_tokens=True must be a whole"),
    ({"online": 1}, "online=1: use True or False"),
    ({"gate": None}, "gate=None: use True or False"),
    ({"schedule": 3}, "schedule=3 is not a DeepSchedule"),
    ({"long_text": True}, "long_text=True is not a LongTextConfig"),
    ({"strict": "often"}, "strict='often': use True, False"),
    ({"strict": -1}, "strict=-1: use True"),
    ({"epsilon": 2}, r"epsilon=2 must lie in \(0, 1\)"),
    ({"delta": 0.0}, "delta=0.0 must lie in"),
    ({"lambda_": 1.0, "thresholds": 0.5}, "lambda_=1.0 and thresholds=0.5: .* one of the two"),
    ({"fidelity": "exact", "lambda_": 1.0}, "lambda_=1.0 with fidelity 'exact': use fidelity 'thr"),
    ({"fidelity": "exact", "risk": "token"}, "risk='token' with fidelity 'exact'"),
    ({"fidelity": "dense", "epsilon": 0.1}, "epsilon=0.1 with fidelity 'dense': it needs 'cert"),
    ({"fidelity": "budget", "delta": 0.1}, "delta=0.1 with fidelity 'budget'"),
    ({"fidelity": "exact", "kv_mode": "skip"}, "kv_mode 'skip' with fidelity 'exact'"),
    ({"fidelity": "threshold", "strict": True}, "strict=True with fidelity 'threshold': it is for"),
    ({"fidelity": "dense", "lookup_tokens": 4}, "lookup_tokens=4: fidelity 'dense' verifies no"),
    (
        {"fidelity": "threshold", "kv_mode": "skip", "long_text": LongTextConfig()},
        "long_text with kv_mode 'skip'",
    ),
    *(
        ({"fidelity": fidelity} | fields, message)
        for fidelity in ("certified", "budget")
        for fields, message in (
            ({"thresholds": [0.5, 0.6]}, rf"thresholds=\[0.5, 0.6\] with fidelity '{fidelity}'"),
            ({"lambda_": 1.0}, f"lambda_=1.0 with fidelity '{fidelity}': its calibration"),
            ({"kv_mode": "propagate"}, f"kv_mode='propagate' with fidelity '{fidelity}'"),
            ({"long_text": LongTextConfig()}, f"long_text with fidelity '{fidelity}'"),
            ({"strict": True}, "strict=True with"),
            ({"lookup_tokens": 2}, "lookup_tokens=2"),
        )
    ),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_what_is_not_allowed_is_refused_in_one_line(fields, message):
    with pytest.raises(DeliberateError, match=message) as caught:
        DecodingSpec(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"), [one for one in WRONG if len(one[0]) > 1 and "fidelity" in one[0]]
)
def test_the_models_own_fidelity_is_checked_like_a_named_one(fields, message):
    rest = {name: value for name, value in fields.items() if name != "fidelity"}
    spec = DecodingSpec(**rest)
    with pytest.raises(DeliberateError, match=message):
        spec.resolved(Fidelity(fields["fidelity"]))


def test_a_named_fidelity_is_kept_and_another_is_taken_over():
    assert DecodingSpec(fidelity="dense").resolved(Fidelity.EXACT).fidelity is Fidelity.DENSE
    spec = DecodingSpec(thresholds=0.5).resolved(Fidelity.EXACT)
    assert spec == DecodingSpec(fidelity="exact", thresholds=0.5)


def test_a_setting_is_given_in_the_spec_or_beside_it():
    spec = DecodingSpec(fidelity="threshold", thresholds=0.5)
    assert spec_of(spec, {"online": False}) == dataclasses.replace(spec, online=False)
    assert spec_of(None, {"fidelity": "exact"}) == DecodingSpec(fidelity="exact")
    assert spec_of(spec, {}) is spec
    with pytest.raises(DeliberateError, match=r"thresholds=0.7 and spec.thresholds=0.5: give"):
        spec_of(spec, {"thresholds": 0.7})
    with pytest.raises(DeliberateError, match="spec='exact' is not a DecodingSpec"):
        spec_of("exact", {})
    with pytest.raises(DeliberateError, match="strict=True with fidelity 'threshold'"):
        spec_of(spec, {"strict": True})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "an object is needed"),
        ({"fidelty": "exact"}, "unknown key 'fidelty'; known: fidelity, thresholds"),
        ({"schedule": {"wait": 3}}, "schedule has the unknown key 'wait'; known: fullness"),
        ({"long_text": 3}, "long_text=3 is not a LongTextConfig"),
    ],
)
def test_foreign_data_is_no_spec(raw, message):
    with pytest.raises(DeliberateError, match=message):
        DecodingSpec.from_dict(raw)
