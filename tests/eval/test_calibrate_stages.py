"""The stages of a calibration: what they record, how long they may take, and what they tell."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_checkpoint import save_checkpoint
from synthetic_recordings import synthetic_recording
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.baselines import policy_exits
from deliberate.calibration.collect import record_sequences
from deliberate.cost.grid import Grid
from deliberate.cost.measure import measure
from deliberate.engine.exit_policy import ExitPolicy
from deliberate.eval.calibrate import progress, traces
from deliberate.eval.calibrate.command import calibrate, calibration_config
from deliberate.utils.errors import DeliberateError

SMALL = ("size=60", "task.steps=[1,2]", "task.max_new_tokens=20", "device=cpu", "epsilon=0.5")


def test_full_depth_tokens_are_those_of_the_weights_as_the_executor_keeps_them() -> None:
    """Recorded by transformers' modules, int8 answers would be compared with float32 ones."""
    torch.manual_seed(0)
    model = AdaptiveModel(
        tiny_model("llama", layers=4, dtype=torch.float32), [1, 2], weights="int8"
    )
    prompts = [random_ids(5 + seed, seed=seed) for seed in range(12)]
    made = [
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            fidelity="dense",
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )[0].tolist()
        for ids in prompts
    ]
    recorded = record_sequences(model, made, [ids.shape[1] for ids in prompts])
    answers = [ids[prompt.shape[1] :] for ids, prompt in zip(made, prompts, strict=True)]
    assert recorded.final.tolist() == [token for answer in answers for token in answer]
    by_modules = AdaptiveModel(model.base, [1, 2], executor="generic")
    whole = record_sequences(by_modules, made, [ids.shape[1] for ids in prompts])
    assert (whole.final != recorded.final).any()


def test_progress_counts_every_sequence_once() -> None:
    model = AdaptiveModel(tiny_model("llama", layers=4, dtype=torch.float32), [1, 2])
    sequences = [list(range(1, 6 + n)) for n in range(5)]
    for one in (model, AdaptiveModel(model.base, [1, 2], executor="generic")):
        told: list[int] = []
        record_sequences(one, sequences, [2] * 5, note=told.append)
        assert sum(told) == 5


def test_a_rule_that_reads_no_earlier_answers_has_no_lists_of_them_made() -> None:
    """Tens of thousands of small lists for each setting took 113 of 121 s of a comparison."""
    listed: list[int] = []

    class Counted(np.ndarray):
        def tolist(self):
            listed.append(self.size)
            return super().tolist()

    class ByConfidence(ExitPolicy):
        constant = True

        def decide(self, reading):
            return [confidence >= 0.5 for confidence in reading.confidences]

    class ByEarlier(ByConfidence):
        def decide(self, reading):
            return [len(earlier) == reading.exit > 0 for earlier in reading.earlier]

    recording = synthetic_recording(30)
    recording = replace(recording, tokens=recording.tokens.view(Counted))
    policy_exits(recording, ByConfidence())
    assert listed == []
    assert set(policy_exits(recording, ByEarlier()).tolist()) == {1}
    assert listed


def test_a_slow_model_has_fewer_steps_timed_and_a_fast_one_all() -> None:
    model = AdaptiveModel(tiny_model("llama", layers=4, dtype=torch.float32), [1, 2])
    grid = Grid(
        tokens=(1, 3), contexts=(8,), batches=(1, 2), prompts=(4,), steps=40, rounds=1, seconds=1e9
    )
    parts = model.backbone, model.reader(), model.exit_config
    fast = measure(*parts, grid=grid)
    slow = measure(*parts, grid=replace(grid, seconds=1e-6))
    assert slow.facts["points"] < 0.6 * fast.facts["points"]
    assert slow.facts["rounds"] == fast.facts["rounds"] == 1


def test_every_stage_over_a_few_seconds_is_named_with_its_time(
    tmp_path, monkeypatch, capsys
) -> None:
    """And a certificate of int8 weights refuses others by name."""
    monkeypatch.setattr(progress, "_WORTH_A_LINE", 0.0)
    monkeypatch.setenv("DELIBERATE_CACHE", str(tmp_path / "cache"))
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    out = tmp_path / "out"
    cfg = calibration_config(
        [f"model={checkpoint}", *SMALL, "weights=int8", "costs=layers", f"out={out}"]
    )
    run = calibrate(cfg)
    told = capsys.readouterr().err
    for stage in ("what the exits say of them", "calibrators and policy", "comparison of rules"):
        assert re.search(rf"^{stage}: \d+ s$", told, re.MULTILINE)
    stated = {str(c.risk): c.conditions["storage"] for c in run.calibration.certificates}
    assert stated and set(stated.values()) == {"int8"}
    model = AdaptiveModel.from_pretrained(checkpoint)
    model.set_calibration(run.calibration)
    with pytest.raises(DeliberateError, match=r"storage='int8', not 'native'.*weights='int8'"):
        model.generate(
            torch.ones((1, 4), dtype=torch.int64), max_new_tokens=4, fidelity="certified",
            risk="token", epsilon=0.5, delta=0.05,
        )  # fmt: skip


def test_weights_that_the_model_has_no_file_for_are_refused_by_name(tmp_path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    cfg = calibration_config(
        [f"model={checkpoint}", *SMALL, "weights=file", f"out={tmp_path / 'o'}"]
    )
    with pytest.raises(DeliberateError, match="weights='file' needs a GGUF file"):
        calibrate(cfg, progress=False)


def test_an_interrupted_recording_goes_on_with_the_parts_it_has(tmp_path, monkeypatch) -> None:
    model = AdaptiveModel(tiny_model("llama", layers=4, dtype=torch.float32), [1, 2])
    sequences = [random_ids(12 + seed, seed=seed)[0].tolist() for seed in range(7)]
    lengths, groups = [3, 3, 14, 3, 3, 3, 3], list("abababa")  # the third has no answer
    whole = record_sequences(model, sequences, lengths, groups=groups, meta={"a": 1})
    monkeypatch.setattr(traces, "PART_SEQUENCES", 3)
    made: list[int] = []

    def once(*given, **settings):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(len(given[1]))
        return record_sequences(*given, **settings)

    told: list[int] = []
    settings = {"run": "r", "groups": groups, "meta": {"a": 1}, "note": told.append}
    given = model, sequences, lengths, tmp_path
    monkeypatch.setattr(traces, "record_sequences", once)
    with pytest.raises(KeyboardInterrupt):
        traces._recorded(*given, **settings)
    monkeypatch.setattr(traces, "record_sequences", record_sequences)
    assert made == [3, 3] and sum(told) == 6
    told.clear()
    found = traces._recorded(*given, **settings)
    assert told == [3, 3, 1] and found.meta == {"a": 1} and found.groups == tuple(groups)
    for name in ("scores", "tokens", "final", "sequence", "position", "similarities"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    told.clear()
    traces._recorded(*given, **settings | {"run": "of other settings"})
    assert told == [1] * 7  # nothing of another run is taken
