"""`deliberate bench chains` from a model to figures, and from a file of chains to figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from random_checkpoint import save_checkpoint
from synthetic_chains import synthetic_chains

from deliberate.eval.benchmarks.chain_setup import answers_of
from deliberate.eval.benchmarks.public import public_chains
from deliberate.eval.benchmarks.settings import bench_config, run_benchmark
from deliberate.eval.grading.equality import same_answer
from deliberate.eval.tasks.registry import command_task
from deliberate.reasoning.chain_calibration import ChainCalibration
from deliberate.reasoning.chain_runner import ChainRunner
from deliberate.reasoning.recorded_chains import ChainSet, RecordingHeader
from deliberate.utils.errors import DeliberateError

SMALL = ("task.size=4", "task.steps=[1,1]", "task.max_new_tokens=40", "answer_tokens=4", "timed=1")
SMALL += ("places.chunk=4", "bands.boundaries=[]", "bands.chunk=8", "executor=generic", "cuts=[8]")
SMALL += ("rules=[{probe: {agree: 2, chunk: 8}}]", "places.answer_tokens=3", "resamples=20")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("random"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_chains_are_recorded_replayed_and_replayed_again_from_their_file(
    checkpoint, tmp_path, capsys
):
    out = tmp_path / "run"
    run_benchmark(["chains", f"model={checkpoint}", f"out={out}", "open_tag=null", *SMALL])
    text = capsys.readouterr().out
    assert "every rule on the same ones" in text and "resampled testing sets" in text
    chains = ChainSet.load(out / "chains.jsonl")
    assert len(chains.chains) == 4 and all(chain.probes for chain in chains.chains)
    assert chains.header.costs is not None and chains.header.weights
    figures = json.loads((out / "figures.json").read_text())
    names = [row["name"] for row in figures["rules"]]
    assert names[:4] == ["whole chain", "cut 8", "probe agree=2 chunk=8", "bands"]
    assert figures["rules"][0]["speedup"] == 1.0
    assert "<svg" in (out / "index.html").read_text()
    ChainCalibration.load(out)
    again = tmp_path / "again"
    read = f"chains={out / 'chains.jsonl'}"
    run_benchmark(["chains", f"model={checkpoint}", f"out={again}", read, *SMALL])
    assert json.loads((again / "figures.json").read_text())["rules"] == figures["rules"]


def test_a_recording_that_was_broken_off_goes_on_and_gives_the_same_chains(
    checkpoint, tmp_path, monkeypatch
):
    given = ["chains", f"model={checkpoint}", "open_tag=null", *SMALL, "batch=1"]
    run_benchmark([*given, f"out={tmp_path / 'whole'}"])
    whole = ChainSet.load(tmp_path / "whole" / "chains.jsonl")
    out, probe, probed = tmp_path / "parts", ChainRunner.probe, []

    def breaking(self, *args, **how):
        probed.append(1)
        if len(probed) == 3:  # of the third chain
            raise KeyboardInterrupt
        return probe(self, *args, **how)

    monkeypatch.setattr(ChainRunner, "probe", breaking)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark([*given, f"out={out}"])
    (part,) = out.glob("recording-*.jsonl")
    kept = ChainSet.load(part)
    assert kept.chains == whole.chains[:2]
    # A part of other settings is neither gone on with nor removed.
    run_benchmark([*given, f"out={out}", "places.switches=[Well]"])
    assert len(probed) == 3 + 4 and part.is_file()
    run_benchmark([*given, f"out={out}"])
    assert len(probed) == 3 + 4 + 2
    again = ChainSet.load(out / "chains.jsonl")
    assert again.chains == whole.chains and again.header.costs == kept.header.costs
    assert not list(out.glob("recording-*.jsonl"))


def test_a_file_of_chains_needs_no_model_and_gives_a_certificate(tmp_path, capsys):
    path = tmp_path / "chains.jsonl"
    ChainSet(RecordingHeader(), tuple(synthetic_chains(400))).save(path)
    given = [f"chains={path}", "model=tiny", "bands.boundaries=[]", "bands.chunk=8", "cuts=[16]"]
    given += ["rules=[{probe: {agree: 3, chunk: 8}}]", "epsilon=0.1", "resamples=100"]
    run_benchmark(["chains", *given, f"out={tmp_path / 'out'}"])
    text = capsys.readouterr().out
    assert "certified (loss: accuracy): stop from probability" in text
    assert "bands, certified" in text and "time: tokens" in text
    (certificate,) = ChainCalibration.load(tmp_path / "out").certificates
    assert certificate.epsilon == 0.1 and certificate.n == 200


def test_answers_are_equal_as_the_grader_says():
    assert same_answer("1,000", "1000") and same_answer("5.0", "5")
    assert not same_answer("7", "8") and not same_answer("", "7")
    cfg = bench_config("bench_chains", ["task.size=1", "model=tiny"], verbatim=("model",))
    for before in ("\n#### ", "</think>\n#### "):
        answer_of = answers_of(command_task(cfg), before)
        assert answer_of("#### 12") == "12" and answer_of(" 12\n") == "12" and answer_of(" ") == ""


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("samples=0", "samples=0"),
        ("clock=sun", "clock=sun"),
        ("chains=/nowhere.jsonl", "cannot be read"),
        ("places.chunk=0", "chunk=0"),
        ("rules={probe: {agree: 2}}", "rules={probe: {agree: 2}} must be a list"),
        ("rules=[probe]", "rules: 'probe' must be {policy: settings}"),
        ("rules=[{prob: {}}]", "reasoning policy 'prob' is unknown"),
        ("rules=[{probe: {agre: 2}}]", "agre"),
        ("bands=[32]", r"bands=\[32\] must be settings by name"),
        ("places.chunk=16", r"places\.chunk=16 records no probe every 8 tokens"),
    ],
)
def test_settings_that_cannot_work_are_refused(checkpoint, override, words):
    with pytest.raises(DeliberateError, match=words):
        run_benchmark(["chains", f"model={checkpoint}", *SMALL, override])


def outputs_file(folder: Path) -> Path:
    lines = [
        {
            "id": str(number),
            "question": "How many?",
            "output": f"<think>{'the answer is 7. so ' * (4 + number)}</think>It is 7.",
            "answer": "7",
            "expected": "7",
        }
        for number in range(4)
    ]
    path = folder / "outputs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_rules_are_replayed_on_outputs_of_another_system(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    given = [f"outputs={outputs_file(tmp_path)}", f"model={checkpoint}", f"out={out}"]
    run_benchmark(["chains", *given, *SMALL[3:], "longest=80"])
    assert "recorded chains" in capsys.readouterr().out
    rules = {one["name"]: one for one in json.loads((out / "figures.json").read_text())["rules"]}
    assert rules["whole chain"]["accuracy"] == 1.0
    probed = rules["probe agree=2 chunk=8"]  # the text states its answer at once, for nothing
    assert probed["saved"] > 0.3 and probed["probe_share"] == 0.0 and probed["changed"] == 0.0
    assert all(chain.probes for chain in ChainSet.load(out / "chains.jsonl").chains)


def test_another_model_is_asked_at_the_same_places(checkpoint, tmp_path):
    given = [f"outputs={outputs_file(tmp_path)}", f"model={checkpoint}", *SMALL[3:]]
    verbatim = ("model", "outputs")
    found = {}
    for probes in ("stated", "model"):
        cfg = bench_config(
            "bench_chains", [*given, f"probes={probes}"], verbatim=verbatim, folder=True
        )
        found[probes] = public_chains(cfg)[0].chains
    for stated, asked in zip(found["stated"], found["model"], strict=True):
        assert stated.tokens == asked.tokens
        places = [one.at for one in stated.probes if one.at < len(stated.tokens)]
        assert [one.at for one in asked.probes if one.at < len(asked.tokens)] == places
        assert all(0 < one.tokens <= 3 for one in asked.probes)


def test_chains_are_kept_where_no_band_can_be_fitted(checkpoint, tmp_path):
    given = [f"outputs={outputs_file(tmp_path)}", f"model={checkpoint}", "probes=model"]
    with pytest.raises(DeliberateError, match="no probe of these chains gave an answer"):
        run_benchmark(["chains", *given, *SMALL[3:], f"out={tmp_path / 'out'}"])
    assert len(ChainSet.load(tmp_path / "out" / "chains.jsonl").chains) == 4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("longest=2", "longest=2: none of 4 chains"),
        ("probes=all", "probes=all is not one of stated, model"),
        ("chains=x.jsonl", "give one of them"),
        ("fields.output=text", "no text in fields.output=text"),
    ],
)
def test_outputs_that_cannot_be_replayed_are_refused(checkpoint, tmp_path, override, words):
    given = [f"outputs={outputs_file(tmp_path)}", f"model={checkpoint}", *SMALL[3:], override]
    with pytest.raises(DeliberateError, match=words):
        run_benchmark(["chains", *given])
