"""Recorded traces and their replay."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_recordings import synthetic_recording
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.collect import record_sequences
from deliberate.calibration.exit_traces import Recording, replay
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.measures import MEASURES
from deliberate.utils.errors import DeliberateError


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    base = tiny_model("llama", layers=6)
    adaptive = AdaptiveModel(base, ExitConfig.build(6, [2, 4], measure="margin"))
    with torch.no_grad():
        for parameter in adaptive.exits.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adaptive.eval()


@pytest.fixture(scope="module")
def dense(model) -> tuple[list[list[int]], list[int]]:
    """Ragged prompts with their dense answers."""
    sequences, prompts = [], [3, 9, 5, 1]
    for seed, prompt in enumerate(prompts):
        ids = random_ids(prompt, seed=seed)
        made = model.base.generate(ids, max_new_tokens=4 + seed, do_sample=False, pad_token_id=0)
        sequences.append(made[0].tolist())
    return sequences, prompts


def test_a_dense_answer_is_its_own_full_depth_token_whatever_the_batch(model, dense) -> None:
    sequences, prompts = dense
    wide = record_sequences(model, sequences, prompts)
    narrow = record_sequences(model, sequences, prompts, batch_tokens=1)
    answers = [ids[prompt:] for ids, prompt in zip(sequences, prompts, strict=True)]
    assert wide.final.tolist() == [token for answer in answers for token in answer]
    assert wide.sequence.tolist() == [i for i, answer in enumerate(answers) for _ in answer]
    assert wide.position.tolist() == [j for answer in answers for j in range(len(answer))]
    assert (wide.tokens == narrow.tokens).all()
    np.testing.assert_allclose(wide.scores, narrow.scores, atol=1e-6)


def test_scores_and_tokens_are_those_that_decoding_reads_at_each_position(model, dense) -> None:
    sequences, prompts = dense
    recorded = record_sequences(model, sequences, prompts)
    reader, norm = model.reader(), model.backbone.norm
    row = 0
    for ids, prompt in zip(sequences, prompts, strict=True):
        for length in range(prompt, len(ids)):
            with torch.no_grad():
                states = model(torch.tensor([ids[:length]]), output_exit_states=True)
                for k, state in enumerate(states.exits):
                    token, score = reader.score(k, norm(state[0, -1]))
                    assert recorded.tokens[row, k] == int(token)
                    assert recorded.scores[row, k] == pytest.approx(float(score), abs=1e-6)
            row += 1
    assert row == len(recorded)


def test_every_measure_is_recorded_and_takes_the_place_of_the_score(model, dense) -> None:
    recorded = record_sequences(model, *dense)
    assert {recorded.measure, *recorded.others} == set(MEASURES)
    before = model.exit_config
    try:
        model.set_exit_config(replace(before, measure="gate"))
        gated = record_sequences(model, *dense)
    finally:
        model.set_exit_config(before)
    np.testing.assert_allclose(recorded.with_measure("gate").scores, gated.scores)
    back = recorded.with_measure("gate").with_measure("margin")
    np.testing.assert_array_equal(back.scores, recorded.scores)
    with pytest.raises(DeliberateError, match="'nix' was not recorded; there is margin"):
        recorded.with_measure("nix")


@pytest.mark.parametrize("prompt", [0, 6])
def test_a_prompt_that_does_not_fit_its_sequence_is_refused(model, prompt) -> None:
    with pytest.raises(DeliberateError, match=f"a prompt of {prompt} tokens"):
        record_sequences(model, [[1, 2, 3, 4, 5]], [prompt])


def test_a_sequence_without_an_answer_has_no_token(model) -> None:
    recorded = record_sequences(model, [[1, 2, 3], [1, 2, 3, 4]], [3, 3])
    assert recorded.sequence.tolist() == [1] and recorded.scores.shape == (1, 2)
    empty = record_sequences(model, [[1, 2, 3]], [3])
    assert len(empty) == 0 and empty.scores.shape == (0, 2) and empty.num_sequences == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9, 1.0, np.inf]), min_size=3, max_size=3),
    st.integers(0, 5),
)
def test_replay_is_the_decode_rule_token_by_token(thresholds, seed) -> None:
    recording = synthetic_recording(4, 6, seed=seed)
    found = replay(recording, thresholds)
    depth = [*recording.layers, recording.num_layers]
    for t in range(len(recording)):
        left = next((k for k in range(3) if recording.scores[t, k] >= thresholds[k]), 3)
        agrees = left == 3 or recording.tokens[t, left] == recording.final[t]
        assert found.exits[t] == left
        assert found.agrees[t] == agrees
        assert found.layers[t] == depth[left]
    assert sum(found.counts) == len(recording)
    assert found.risk == pytest.approx(1 - found.agrees.mean())


def test_costs_add_up_to_the_point_of_leaving_and_the_top_never_disagrees() -> None:
    recording = synthetic_recording(5, 5)
    dense = replay(recording, [np.inf] * 3)
    assert (dense.risk, dense.mean_layers, dense.counts) == (0.0, 8.0, (0, 0, 0, 25))
    np.testing.assert_allclose(dense.seconds(1.0, [2.0, 3.0, 4.0]), 10.0)
    np.testing.assert_allclose(replay(recording, [0, 0, 0]).seconds(1.0, [2, 3, 4]), 1.0)


def test_thresholds_of_another_number_of_exits_are_refused() -> None:
    with pytest.raises(DeliberateError, match="thresholds of shape"):
        replay(synthetic_recording(2, 2), [0.5, 0.5])


def test_saving_and_loading_changes_nothing(tmp_path, model, dense) -> None:
    recorded = record_sequences(
        model, *dense, groups=list("abab"), meta={"seed": 3, "weights": "ff"}
    )
    recorded.save(tmp_path / "deep" / "r.npz")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.npz"]
    loaded = Recording.load(tmp_path / "deep" / "r.npz")
    for name in ("scores", "tokens", "final", "final_scores", "sequence", "position"):
        stored, original = getattr(loaded, name), getattr(recorded, name)
        assert stored.dtype == original.dtype
        np.testing.assert_array_equal(stored, original)
    for name in ("layers", "num_layers", "measure", "meta", "groups"):
        assert getattr(loaded, name) == getattr(recorded, name)
    for name, values in recorded.others.items():
        np.testing.assert_array_equal(loaded.others[name], values)
    np.testing.assert_array_equal(loaded.similarities, recorded.similarities)
    replace(recorded, similarities=None).save(tmp_path / "old.npz")  # as earlier releases wrote it
    assert Recording.load(tmp_path / "old.npz").similarities is None


def test_similarities_are_cosines_of_the_states_at_two_exits_in_a_row(model, dense) -> None:
    sequences, prompts = dense
    recorded = record_sequences(model, sequences, prompts)
    with torch.no_grad():
        states = model(torch.tensor([sequences[0]]), output_exit_states=True)
    below, above = (state[0, prompts[0] - 1].double().numpy() for state in states.exits)
    cosine = below @ above / np.linalg.norm(below) / np.linalg.norm(above)
    assert recorded.similarities[0].tolist() == pytest.approx([0.0, cosine], abs=1e-5)
    kept = recorded.select([1, 3])
    rows = np.isin(recorded.sequence, [1, 3])
    np.testing.assert_array_equal(kept.similarities, recorded.similarities[rows])


def test_a_missing_truncated_foreign_or_pickled_file_is_one_line(tmp_path) -> None:
    recording = synthetic_recording(3, 3)
    recording.save(tmp_path / "r.npz")
    whole = (tmp_path / "r.npz").read_bytes()
    bad = {
        "cut.npz": whole[: len(whole) // 2],
        "text.npz": b"hello",
        "empty.npz": b"",
        "pickle.npz": pickle.dumps({"scores": 1}),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "foreign.npz", a=np.zeros(3))
    np.savez(tmp_path / "object.npz", head=np.array([{"a": 1}], dtype=object))
    for name in (*bad, "foreign.npz", "object.npz", "gone.npz"):
        with pytest.raises(DeliberateError, match=name) as caught:
            Recording.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    head = json.dumps({"format_version": 2, "layers": [1], "num_layers": 2, "measure": "margin",
                       "meta": {}, "groups": [], "others": []})  # fmt: skip
    arrays = {"scores": np.zeros((0, 1))} | dict.fromkeys(
        ("tokens", "final", "final_scores", "sequence", "position"), np.zeros(0)
    )
    np.savez(tmp_path / "new.npz", head=np.frombuffer(head.encode(), dtype=np.uint8), **arrays)
    with pytest.raises(DeliberateError, match="format_version 2"):
        Recording.load(tmp_path / "new.npz")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokens": np.zeros((4, 2), dtype=np.int32)}, "tokens has shape"),
        ({"scores": np.full((4, 3), np.nan, dtype=np.float32)}, "NaN"),
        ({"sequence": np.array([1, 1, 0, 0], dtype=np.int32)}, "must rise"),
        ({"similarities": np.zeros((4, 2), dtype=np.float32)}, "similarities has shape"),
        ({"groups": ("one",)}, "1 groups for 2 sequences"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, named) -> None:
    with pytest.raises(DeliberateError, match=named):
        replace(synthetic_recording(2, 2), **change)


def test_halves_share_no_sequence_and_lose_none() -> None:
    recording = synthetic_recording(11, 4)
    first, second = recording.halves(seed=1)
    assert (first.num_sequences, second.num_sequences) == (6, 5)
    both = np.sort(np.concatenate([first.scores[:, 0], second.scores[:, 0]]))
    np.testing.assert_array_equal(both, np.sort(recording.scores[:, 0]))
    chosen = recording.select([7, 2])
    np.testing.assert_array_equal(chosen.scores[:4], recording.scores[recording.sequence == 2])
    assert chosen.groups == ("even", "odd")
