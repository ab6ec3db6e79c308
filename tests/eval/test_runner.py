from __future__ import annotations

import copy
import dataclasses
import functools
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from random_checkpoint import CONTEXT, LAYERS, save_checkpoint

from deliberate.api.checkpoint import load_tokenizer
from deliberate.api.model import AdaptiveModel
from deliberate.data.problem import Problem
from deliberate.eval.grading.graders import GraderPool
from deliberate.eval.report.detokenize import decode_text, split_text
from deliberate.eval.report.page import REPORT_FILE
from deliberate.eval.runner import command
from deliberate.eval.runner.departures import departures
from deliberate.eval.runner.results import PARTIAL_FILE, PROBLEMS_FILE, RESULTS_FILE, read_results
from deliberate.eval.runner.runner import (
    Runner,
    RunSettings,
    model_info,
    weights_sha256,
)
from deliberate.eval.tasks.registry import build_task, evaluation_config
from deliberate.eval.tasks.task import Task
from deliberate.utils.errors import DeliberateError

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> AdaptiveModel:
    return AdaptiveModel.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path):
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def task() -> Task:
    cfg = evaluation_config(["task.size=8", f"task.max_new_tokens={NEW_TOKENS}"])
    return build_task(cfg.task)


@pytest.fixture(scope="module")
def records(model, tokenizer, task):
    # Exits of random weights lose time; on a slow machine exact mode would notice and ask none.
    with pytest.MonkeyPatch.context() as patch, GraderPool(1) as pool:
        patch.setattr(AdaptiveModel, "planner", lambda *_: None)
        return list(Runner(model, tokenizer, task, RunSettings()).records(pool))


@functools.cache
def defaults():
    return evaluation_config(["task.size=5", f"task.max_new_tokens={NEW_TOKENS}", "device=cpu"])


def config(checkpoint: Path, out: Path, *overrides: str):
    settings = {"model": str(checkpoint), "out": str(out)}
    return OmegaConf.merge(defaults(), OmegaConf.from_dotlist(list(overrides)), settings)


def test_every_mode_answers_the_same_problems_and_the_dense_ones_agree(records, task) -> None:
    assert [r.id for r in records] == [p.id for p in task.problems]
    for record in records:
        assert set(record.modes) == {"transformers", "dense", "exact", "threshold"}
        dense = record.modes["dense"]
        assert record.modes["transformers"].tokens == dense.tokens
        assert set(dense.exit_layers) == {LAYERS} and dense.confidences == []
        assert dense.layer_passes == LAYERS * dense.steps
        for outcome in record.modes.values():
            assert 0 < outcome.prefill_seconds < outcome.seconds
            assert "".join(outcome.pieces) == outcome.text
    assert departures(records, "transformers") == []


def test_exact_repeats_dense_while_leaving_early_and_threshold_departs(records) -> None:
    assert departures(records) == []
    exact = [r.modes["exact"] for r in records]
    assert sum(o.drafted for o in exact) > 20 and sum(o.rejected for o in exact) > 0
    assert any(layer < LAYERS for o in exact for layer in o.exit_layers)
    assert departures(records, "threshold") != []
    assert all(len(o.confidences) == len(o.tokens) for o in exact)


@pytest.mark.parametrize("mode", ["exact", "threshold"])
def test_layer_passes_of_a_record_are_the_calls_that_hooks_count(
    mode, model, tokenizer, task, monkeypatch
) -> None:
    # Exits of random weights lose time, which exact mode would notice and stop asking them.
    monkeypatch.setattr(AdaptiveModel, "planner", lambda *_: None)
    calls: list[list[int]] = [[] for _ in range(LAYERS)]
    handles = [
        layer.register_forward_hook(
            lambda _module, arguments, _output, seen=seen: seen.append(arguments[0].shape[1])
        )
        for layer, seen in zip(model.base.model.layers, calls, strict=True)
    ]
    try:
        runner = Runner(model, tokenizer, task, RunSettings(modes=(mode,)))
        with GraderPool(1) as pool:
            record = next(runner.records(pool))
    finally:
        for handle in handles:
            handle.remove()
    after_prompt = [seen[1:] for seen in calls]
    assert record.modes[mode].layer_passes == sum(map(len, after_prompt))
    assert record.modes[mode].layer_positions == sum(map(sum, after_prompt))
    assert len(after_prompt[-1]) < len(after_prompt[0])


def test_modes_take_turns_so_that_each_comes_first_equally_often(
    model, tokenizer, task, monkeypatch
) -> None:
    runner = Runner(model, tokenizer, task, RunSettings(modes=("dense", "exact")))
    order: list[str] = []
    decode = runner.decode

    def noting(prompt, mode):
        order.append(mode)
        return decode(prompt, mode)

    monkeypatch.setattr(runner, "decode", noting)
    with GraderPool(1) as pool:
        list(runner.records(pool))
    firsts = order[::2]
    assert firsts.count("dense") == firsts.count("exact") == 4
    # Problems 1 and 7 have the same number of steps, and meet the modes in another order.
    assert firsts[0] != firsts[6]


def test_grading_is_not_in_the_measured_time(model, tokenizer, task, monkeypatch) -> None:
    grade, clock, hours = Task.verdicts, time.perf_counter, []

    def slowly(*arguments):
        hours.append(3600.0)
        return grade(*arguments)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(hours))
    monkeypatch.setattr(Task, "verdicts", slowly)
    runner = Runner(model, tokenizer, task, RunSettings(modes=("dense", "exact")))
    with GraderPool(1) as pool:
        record = next(runner.records(pool))
    assert hours and all(outcome.seconds < 3600 for outcome in record.modes.values())


def test_a_checkpoints_own_sampling_settings_do_not_reach_any_mode(
    model, tokenizer, task, records
) -> None:
    before = model.base.generation_config
    spoilt = type(before)(do_sample=True, temperature=3.0, repetition_penalty=1.9, use_cache=False)
    model.base.generation_config = spoilt
    try:
        runner = Runner(model, tokenizer, task, RunSettings(warmup=0))
        with GraderPool(1) as pool:
            record = next(runner.records(pool))
        assert model.base.generation_config is spoilt
    finally:
        model.base.generation_config = before
    for mode, outcome in record.modes.items():
        assert outcome.tokens == records[0].modes[mode].tokens


def test_a_prompt_that_fills_the_context_counts_as_wrong_and_the_run_goes_on(
    model, tokenizer, task
) -> None:
    long = Problem(id="long", question="apples " * CONTEXT, answer="1", difficulty=1)
    tight = Problem(id="tight", question="a" * (CONTEXT - 30), answer="1", difficulty=1)
    mixed = dataclasses.replace(task, problems=(long, task.problems[0], tight))
    runner = Runner(model, tokenizer, mixed, RunSettings(warmup=1))
    assert runner.warm_up() > 0
    with GraderPool(1) as pool:
        first, second, third = runner.records(pool)
    assert runner.unfit == ["long"] and runner.cramped == 1
    assert not any(o.correct or o.tokens or o.text for o in first.modes.values())
    assert all(o.tokens for o in second.modes.values())
    assert {len(o.tokens) for o in third.modes.values()} == {CONTEXT - third.prompt_tokens}
    with pytest.raises(DeliberateError, match="no problem of 'words' fits the model's context"):
        Runner(model, tokenizer, dataclasses.replace(task, problems=(long,)), RunSettings())


def test_the_slow_baseline_may_run_on_the_first_problems_only(model, tokenizer, task) -> None:
    settings = RunSettings(modes=("transformers", "dense"), transformers_limit=2, warmup=0)
    with GraderPool(1) as pool:
        found = list(Runner(model, tokenizer, task, settings).records(pool))
    assert ["transformers" in r.modes for r in found] == [True] * 2 + [False] * 6


def test_a_departure_names_the_problem_and_the_first_other_token(records) -> None:
    exact = records[2].modes["exact"]
    tokens = [*exact.tokens]
    tokens[5] += 1
    modes = records[2].modes | {"exact": dataclasses.replace(exact, tokens=tokens)}
    broken = departures([*records[:2], dataclasses.replace(records[2], modes=modes)])
    assert [(d.problem, d.position) for d in broken] == [(records[2].id, 5)]
    assert f"{records[2].id} at token 5" in command.departure_text(broken)


def test_pieces_add_up_to_the_text_when_a_character_takes_several_tokens(tokenizer) -> None:
    text = " caf\u00e9 \u2192 \U0001f600\n#### 42"
    tokens = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    pieces = split_text(tokenizer, tokens)
    assert len(pieces) == len(tokens) and "".join(pieces) == text
    assert "\U0001f600" in pieces and "\ufffd" not in "".join(pieces)
    broken = split_text(tokenizer, tokens[: tokens.index(tokenizer.encode("\n")[-1]) - 1])
    assert "".join(broken) == decode_text(tokenizer, tokens[: len(broken)])
    assert split_text(tokenizer, []) == []


def test_the_weights_hash_follows_the_weights(checkpoint, model) -> None:
    again = AdaptiveModel.from_pretrained(checkpoint)
    assert weights_sha256(again) == model_info(model, "x")["sha256"]
    with torch.no_grad():
        again.base.model.layers[-1].mlp.down_proj.weight[0, 0] += 1e-3
    assert weights_sha256(again) != weights_sha256(model)


@pytest.fixture
def no_report(monkeypatch) -> None:
    """Drawing figures takes most of a small run: left out where nobody looks at them."""
    monkeypatch.setattr(command, "write_report", lambda folder, _runs, **_: folder / REPORT_FILE)


def test_an_evaluation_writes_results_that_read_back_and_a_report(checkpoint, tmp_path) -> None:
    done = command.evaluate(config(checkpoint, tmp_path / "new" / "out"), progress=False)
    out = tmp_path / "new" / "out"
    assert {p.name for p in out.iterdir()} == {RESULTS_FILE, PROBLEMS_FILE, REPORT_FILE}
    result, records = read_results(out)
    assert result == done.result and len(records) == result.task["problems"] == 5
    assert done.broken == [] and done.report == out / REPORT_FILE
    assert result.modes["exact"].versus_dense.identical == 5
    assert result.model["exits"] == [1, 2] and result.model["num_layers"] == LAYERS
    assert result.config["thresholds"] == [0.1, 0.1] and result.config["limit"] is None
    assert result.environment["executor"].startswith("fused: llama")
    assert result.environment["device"] == "cpu" and result.warmup_seconds > 0
    assert "words" in done.report.read_text() and done.report == command.rebuild_report([out])


def test_where_results_are_written_is_not_part_of_the_configuration(
    checkpoint, tmp_path, monkeypatch, no_report
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    a, b = (
        command.evaluate(config(checkpoint, folder, "modes=[dense]"), progress=False).result
        for folder in folders
    )
    assert a.config_sha256 == b.config_sha256
    c = command.evaluate(config(checkpoint, folders[0], "modes=[exact]"), progress=False).result
    assert c.config_sha256 != a.config_sha256
    shown = []
    monkeypatch.setattr(command, "write_report", lambda _folder, runs: shown.extend(runs))
    command.rebuild_report([folders[1], folders[1]], tmp_path)
    assert [r.name for r, _ in shown] == [f"{b.name} ({folders[1]})"] * 2


def test_thresholds_of_the_configuration_are_in_force_and_recorded(
    checkpoint, tmp_path, no_report
) -> None:
    cfg = config(checkpoint, tmp_path / "o", "thresholds=1.0", "modes=[dense,threshold]")
    done = command.evaluate(cfg, progress=False)
    assert done.result.config["thresholds"] == [1.0, 1.0]
    # Nothing is that certain, so nothing leaves.
    assert set(done.result.modes["threshold"].exit_histogram) == {LAYERS}
    with pytest.raises(DeliberateError, match="3 thresholds for 2 exits"):
        command.evaluate(config(checkpoint, tmp_path / "p", "thresholds=[0.5,0.5,0.5]"))
    assert not (tmp_path / "p").exists()


def test_an_interrupted_run_keeps_the_old_results_and_what_was_done(
    checkpoint, tmp_path, monkeypatch, no_report
) -> None:
    out = tmp_path / "out"
    command.evaluate(config(checkpoint, out, "modes=[dense]"), progress=False)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    decode, calls = Runner.decode, []

    def interrupted(self, prompt, mode):
        calls.append(mode)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return decode(self, prompt, mode)

    monkeypatch.setattr(Runner, "decode", interrupted)
    cfg = config(checkpoint, out, "modes=[dense]", "warmup=1")
    with pytest.raises(
        command.Interrupted, match=r"3 of 5 problems are in .*problems\.partial\.jsonl"
    ):
        command.evaluate(cfg, progress=False)
    head, session, *done = (out / PARTIAL_FILE).read_text().splitlines()
    assert "settings" in head and "session" in session and len(done) == 3
    assert {name: (out / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["modes=[]"], "modes is empty"),
        (["modes=[dens]"], "mode 'dens'"),
        (["modes=[dense,dense]"], "name one twice"),
        (["modes=dense"], "must be a list"),
        (["warmup=-1"], "warmup=-1"),
        (["transformers_limit=0"], "transformers_limit=0"),
        (["modes=[transformers]", "transformers_limit=2"], "use limit instead"),
        (["threads=0"], "threads=0"),
        (["graders.processes=0"], "graders.processes=0"),
        (["graders.time_limit=0"], "time_limit=0"),
        (["thresholds=high"], "thresholds=high"),
        (["dtype=int8"], "dtype=int8"),
        (["device=tpu9"], "device=tpu9"),
        (["device=cuda:77"], "device=cuda:77"),
    ],
)
def test_an_impossible_setting_is_named_before_anything_is_written(
    checkpoint, tmp_path, overrides, named
) -> None:
    with pytest.raises(DeliberateError, match=named):
        command.evaluate(config(checkpoint, tmp_path / "out", *overrides))
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_is_refused(checkpoint, tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DeliberateError, match="is a file"):
        command.evaluate(config(checkpoint, tmp_path / "file" / "deeper"))


def chatting(tokenizer):
    """The same tokenizer with a chat template."""
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    return copied


def test_questions_stand_in_the_chat_template_where_the_tokenizer_has_one(
    model, tokenizer, task
) -> None:
    chatty = chatting(tokenizer)

    def requested(tokens, **settings):
        runner = Runner(model, tokens, task, RunSettings(**settings))
        return runner.chat, tokens.decode(runner._prompts[0], skip_special_tokens=True)

    question = task.problems[0].question.strip()
    plain = (False, task.template.format(question=question))
    assert requested(tokenizer) == requested(chatty, chat="never") == plain
    assert requested(chatty) == requested(chatty, chat="always") == (True, f"<user>{question}")
    with_system = requested(chatty, system="Be brief.")
    assert with_system == (True, f"<system>Be brief.<user>{question}")
    with pytest.raises(DeliberateError, match="chat=always: the tokenizer has no chat template"):
        requested(tokenizer, chat="always")
    with pytest.raises(DeliberateError, match="chat=maybe is not one of"):
        RunSettings(chat="maybe")


def test_the_form_of_the_prompts_is_recorded_with_a_run(checkpoint, tmp_path) -> None:
    cfg = config(checkpoint, tmp_path / "out", "limit=1", "modes=[dense]", "warmup=0")
    done = command.evaluate(cfg, progress=False)
    assert done.result.config["chat"] == "never", "what was in force, not 'auto'"
