"""Where the memory of an answer lies, by parts."""

from __future__ import annotations

import sys

import pytest

from deliberate.api.model import AdaptiveModel
from deliberate.eval.benchmarks.memory_parts import code_bytes, main, parts_of, weight_bytes
from deliberate.eval.benchmarks.rival_process import memory_bytes
from deliberate.kernels import native_build
from deliberate.utils.errors import DeliberateError

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_the_parts_are_those_of_the_peak() -> None:
    before = {"all": memory_bytes("VmRSS"), "code": code_bytes()}
    model = AdaptiveModel.from_pretrained("tiny").eval()
    parts = parts_of(model, 20, 4, before)
    peak = parts.pop("peak")
    assert peak == pytest.approx(sum(parts.values())) and peak > 0
    weights = sum(one.nbytes for one in model.base.parameters())
    assert parts["weights"] == pytest.approx(weights / 1e6)
    config = model.config
    a_token = 8 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    tokens = parts["keys and values"] * 1e6 / (a_token * config.num_hidden_layers)
    assert 24 <= tokens < 24 + 96
    assert parts["draft layer and its head, int8"] == 0 <= parts["pages of libraries' code"]


@pytest.mark.skipif(native_build.unavailable() is not None, reason="needs the C++ kernels")
def test_weights_in_another_form_are_counted_beside_the_model() -> None:
    plain, small = (AdaptiveModel.from_pretrained("tiny", weights=one) for one in (None, "int8"))
    floats = weight_bytes(plain)
    assert floats * 1.2 < weight_bytes(small) < floats * 1.35


def test_other_arguments_are_one_line() -> None:
    with pytest.raises(DeliberateError, match="is not MODEL WEIGHTS PROMPT_TOKENS NEW_TOKENS"):
        main(["tiny", "int8", "many", "4"])
