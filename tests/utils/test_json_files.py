"""Every file that is read: a malformed one gives an object or one line, never a traceback."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_examples import FILES, RUN, Example, write_example
from safetensors.torch import load_file, save_file
from synthetic_recordings import synthetic_recording
from tiny_models import tiny_model

from deliberate.api.checkpoint import CONFIG_NAME, EXITS_NAME
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.exit_traces import Recording
from deliberate.modeling.exit_config import ExitConfig
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import MAX_NESTING, build, parse_json


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Example:
    return write_example(tmp_path_factory.mktemp("files"))


def test_the_valid_files_are_read(example):
    for name, use in FILES.items():
        if name.startswith("adapter/"):
            with pytest.raises(DeliberateError, match="nowhere"):
                use(example.folder)
        else:
            use(example.folder)


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Paths of every value inside JSON data; the first few of a long list."""
    yield at
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*at, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:3]):
            yield from places(item, (*at, index))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from([1.5, 0.0, -1.0, 1e300, 2**31, 2**63, 2**70, "", "x", "1", ".", "a/b", "\x00"]),
    st.sampled_from([[], {}, [[]], [None], [1, 2, 3], {"a": 1}, [0.5], [1.5], [True], ["1"]]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=3),
    st.recursive(
        st.none() | st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=4
    ),
)
RAW = st.sampled_from(
    ["NaN", "-Infinity", "1e999", "9" * 5000, "[" * 3000 + "]" * 3000, "[" * 100_000,
     '{"a":' * 99 + "1" + "}" * 99, '"\\ud800"', "\ufeff", "", "nul",
     '{"a":1,"a":2}', "0x10", "1_0", "\udcff"]
)  # fmt: skip


@st.composite
def mutation(draw) -> Callable[[str], str]:
    """A change of JSON text: a value replaced, left out or added; raw text put in; cut off."""
    kind = draw(st.sampled_from(["replace", "replace", "remove", "add", "raw", "cut"]))
    seed, value, raw = draw(st.integers(0, 2**32)), draw(VALUES), draw(RAW)

    def change(text: str) -> str:
        chosen = random.Random(seed)
        lines = text.strip().split("\n")
        number = chosen.randrange(len(lines)) if _is_lines(lines) else None
        body = text if number is None else lines[number]
        changed = _changed(body, kind, value, raw, chosen)
        if number is None:
            return changed
        return "\n".join([*lines[:number], changed, *lines[number + 1 :]])

    return change


def _is_lines(lines: list[str]) -> bool:
    try:
        return len(lines) > 1 and all(isinstance(json.loads(line), dict) for line in lines)
    except ValueError:
        return False


def _changed(text: str, kind: str, value: Any, raw: str, chosen: random.Random) -> str:
    if kind == "cut":
        return text[: chosen.randrange(len(text))]
    data = json.loads(text)
    everywhere = list(places(data))
    at = everywhere[chosen.randrange(len(everywhere))]
    if not at:
        return json.dumps(value) if kind != "raw" else raw
    holder = data
    for step in at[:-1]:
        holder = holder[step]
    if kind == "remove":
        del holder[at[-1]]
    elif kind == "add" and isinstance(holder, dict):
        holder["added by nobody"] = value
    elif kind == "add":
        holder.insert(at[-1], value)
    else:
        holder[at[-1]] = value if kind == "replace" else "@raw@"
    return json.dumps(data).replace('"@raw@"', raw)


@pytest.mark.parametrize("name", FILES)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(change=mutation())
def test_a_mutated_file_is_an_object_or_one_line(example, name, change):
    path = example.folder / name
    path.write_text(change(example.texts[name]), encoding="utf-8", errors="surrogateescape")
    try:
        FILES[name](example.folder)
    except DeliberateError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 700
        message.encode("utf-8")
    finally:
        path.write_text(example.texts[name], encoding="utf-8")


# What was found by attack, by name, so that it stays mended whatever the fuzzer draws.
@pytest.mark.parametrize(
    ("name", "at", "value", "named"),
    [
        (CONFIG_NAME, ("exits", "thresholds"), None, "thresholds"),
        (CONFIG_NAME, ("exits", "thresholds"), "ab", "thresholds"),
        (CONFIG_NAME, ("exits", "layers"), None, "layers"),
        (CONFIG_NAME, ("exits", "layers"), [1, 1.5], r"layers\[1\]"),
        (CONFIG_NAME, ("exits", "rank"), 1.5, "rank: expected int, found 1.5"),
        (CONFIG_NAME, ("exits", "rank"), "8", "rank: expected int"),
        (CONFIG_NAME, ("exits", "max_pending"), True, "max_pending: expected int"),
        (CONFIG_NAME, ("exits",), [], "exits: expected an object"),
        (CONFIG_NAME, ("gate",), 3, "gate: expected an object"),
        (CONFIG_NAME, ("gate", "heads"), 1.5, "heads=1.5"),
        (CONFIG_NAME, ("base",), 7, "base: expected str"),
        (CONFIG_NAME, ("colour",), 7, "colour: unknown key; known are exits, base"),
        ("calibration.json", ("certificates", 0, "thresholds"), [0.9], "1 thresholds of a certif"),
        ("calibration.json", ("certificates", 0, "thresholds", 1), "x", "expected float"),
        ("calibration.json", ("policy", "rows", 0), None, "expected a list"),
        ("calibration.json", ("calibrators", 0, "tokens"), -1, "tokens"),
        ("calibration.json", ("layers",), None, "layers: expected a list"),
        ("calibration.json", ("others",), [], "others: expected an object"),
        ("certificate.json", ("thresholds",), None, "thresholds: expected a list"),
        ("certificate.json", ("n",), "many", "n: expected int"),
        ("cost-0000000000000000.json", ("layers",), [[1]], r"layers\[0\]: expected int"),
        ("cost-0000000000000000.json", ("memory",), "x", "memory: expected float"),
        ("recording.json", ("layers",), None, "layers: expected a list"),
        ("recording.json", ("groups",), 5, "groups: expected a list"),
        ("run.json", ("config", "trainer"), None, "config.trainer: expected an object"),
        ("exits.jsonl", ("model",), [], "model: expected an object"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_what_is_allowed(example, name, at, value, named):
    path, text = example.folder / name, example.texts[name]
    first, *rest = text.split("\n") if name.endswith(".jsonl") else (text,)
    data = json.loads(first)
    holder = data
    for step in at[:-1]:
        holder = holder[step]
    holder[at[-1]] = value
    path.write_text("\n".join([json.dumps(data), *rest]))
    try:
        with pytest.raises(DeliberateError, match=named) as caught:
            FILES[name](example.folder)
        assert "\n" not in str(caught.value)
    finally:
        path.write_text(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("9" * 5000, "5000 digits"),
        (str(2**64), "64 bits"),
        ("[" * (MAX_NESTING + 1) + "]" * (MAX_NESTING + 1), f"more than {MAX_NESTING} deep"),
        ("[" * 10_000, "not valid JSON"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ("NaN", "NaN is not"),
        ("1e999", "1e999"),
        ('"\\udfff"', "surrogate"),
        ("", "truncated"),
    ],
)
def test_json_beyond_the_limits_is_one_line(text, named):
    with pytest.raises(DeliberateError, match=named) as caught:
        parse_json(text, "a.json")
    assert str(caught.value).startswith("a.json: ") and "\n" not in str(caught.value)


def test_a_training_log_may_hold_nan_but_a_number_of_the_schema_may_not():
    assert parse_json('{"loss": NaN}', "a", finite=False)["loss"] != 0
    with pytest.raises(DeliberateError, match="seconds"):
        text = json.dumps(RUN | {"seconds": float("nan")})
        from deliberate.utils.training_record import RunRecord

        build(RunRecord, text, "run.json", others="ignore", finite=False)


def test_a_recording_with_arrays_of_another_kind_is_refused(tmp_path):
    synthetic_recording(2, 2).save(tmp_path / "r.npz")
    stored = dict(np.load(tmp_path / "r.npz"))
    for name, wrong in (
        ("tokens", stored["tokens"].astype(np.float64)),
        ("scores", stored["scores"].astype(np.complex64)),
        ("final", np.int32(3)),
        ("sequence", stored["sequence"].astype("U3")),
    ):
        np.savez(tmp_path / "bad.npz", **(stored | {name: wrong}))
        with pytest.raises(DeliberateError, match=name):
            Recording.load(tmp_path / "bad.npz")
    whole = bytearray((tmp_path / "r.npz").read_bytes())
    for place in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[place] ^= 0x5A
        (tmp_path / "bad.npz").write_bytes(damaged)
        try:
            Recording.load(tmp_path / "bad.npz")
        except DeliberateError as error:
            assert "\n" not in str(error)


def test_no_other_module_parses_json():
    """One reader: limits and schema hold for every file, of later modules too."""
    root = Path(__file__).parents[2]
    # Not files: text that the same process wrote a moment ago.
    own_text = {"deliberate/data/sources.py"}
    found = set()
    for folder in ("deliberate", "eval", "train", "kernels"):
        for path in (root / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8").replace("json.loads(json.dumps(", "copy((")
            if re.search(r"\bjson\.loads?\(", text):
                found.add(str(path.relative_to(root)))
    assert found - own_text == {"deliberate/utils/json_files.py"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", None),
        ("num_hidden_layers", -1),
        ("hidden_size", "wide"),
        ("num_attention_heads", 0),
        ("vocab_size", [1]),
        ("model_type", {"a": 1}),
        ("model_type", "nothing"),
        ("torch_dtype", 5),
    ],
)
def test_a_base_checkpoint_with_a_malformed_config_is_one_line(tmp_path, key, value):
    tiny_model("llama").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    try:
        AdaptiveModel.from_pretrained(tmp_path)
    except DeliberateError as error:
        assert "\n" not in str(error)


def test_exits_whose_file_holds_no_finite_floats_are_refused(tmp_path):
    config = ExitConfig.build(4, [1], translator="full")
    AdaptiveModel(tiny_model("llama"), config).save_pretrained(tmp_path, merge=True)
    path = tmp_path / EXITS_NAME
    whole = load_file(path)
    for wrong in (float("nan"), float("inf")):
        save_file({name: torch.full_like(t, wrong) for name, t in whole.items()}, path)
        with pytest.raises(DeliberateError, match="no finite floats"):
            AdaptiveModel.from_pretrained(tmp_path)
    save_file({name: t.to(torch.int64) for name, t in whole.items()}, path)
    with pytest.raises(DeliberateError, match="holds int64"):
        AdaptiveModel.from_pretrained(tmp_path)
