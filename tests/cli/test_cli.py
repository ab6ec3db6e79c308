from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from random_checkpoint import save_checkpoint

from deliberate import __version__
from deliberate.cli import app as cli
from deliberate.eval.benchmarks.settings import BENCHES
from deliberate.eval.runner import command as app
from deliberate.eval.runner.results import read_results
from deliberate.eval.runner.runner import Runner
from deliberate.utils.hydra_config import compose

COMMANDS = ("train", "eval", "report", "generate", "bench", "demo", "env")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs the command in an empty folder; gives status, stdout and stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("DELIBERATE_DATA", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        found = capsys.readouterr()
        return int(ended.value.code or 0), found.out, found.err

    return call


def test_help_lists_the_commands_without_importing_torch(tmp_path) -> None:
    code = (
        "import sys; from deliberate.cli.app import main\n"
        "try: main(['--help'])\n"
        "finally: print('heavy:', sorted({'torch', 'transformers', 'hydra'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert all(f"  {command} " in found.stdout for command in COMMANDS), found.stdout
    assert found.stdout.endswith("heavy: []\n")


def test_version_and_a_bare_call(run) -> None:
    assert run("--version") == (0, f"deliberate {__version__}\n", "")
    status, out, _ = run()
    assert status == 0 and "Commands:" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["bogus"], "bogus"),
        (["eval", "task=nix"], "task 'nix' is unknown: one of asdiv_a, chain_sum"),
        (["eval", "limits=3"], "did you mean limit"),
        (["eval", "limit=0", "model={model}"], "limit=0"),
        (["eval", "model=nix"], "model 'nix'"),
        (["eval", "model=./gone"], "model './gone'"),
        (["eval", "task=gsm8k", "model={model}"], "DELIBERATE_DATA"),
        (["eval", "task=gsm8k", "model={model}", "data.dir=gone"], "'gone' does not exist"),
        (["eval", "--fast"], "--fast"),
        (["report"], "DIR"),
        (["report", "gone"], "gone/results.json"),
        (["report", "gone", "--fancy"], "--fancy"),
        (["generate"], "question"),
        (["generate", "  "], "the question is empty"),
        (["generate", "x", "--fidelity", "exat"], "dense, exact, threshold"),
        (["generate", "x", "--model", "nix"], "model 'nix'"),
        (["generate", "x", "--model", "{model}", "--threshold", "3"], "threshold 3.0"),
        (["generate", "x", "--model", "{model}", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["generate", "word " * 400, "--model", "{model}"], "the model's context is 160"),
        (["generate", "x", "--model", "{model}", "--chat", "always"], "no chat template"),
        (["generate", "x", "--raw", "--chat", "always"], "give one of the two"),
        (["demo", "--problems", "0"], "problems=0"),
        (["demo", "--problems", "many"], "--problems"),
        (["train", "recipe.layers=3"], "recipe.layers"),
    ],
)
def test_a_mistake_is_one_line_with_status_2_and_leaves_nothing_behind(
    run, checkpoint, arguments, named
) -> None:
    status, out, err = run(*[a.replace("{model}", str(checkpoint)) for a in arguments])
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err
    assert list(Path.cwd().iterdir()) == []


def test_training_gets_its_arguments_untouched(run, monkeypatch) -> None:
    got = []
    monkeypatch.setattr("deliberate.train.app.main", lambda arguments: got.extend(arguments))
    given = ["+experiment=tiny", "--multirun", "trainer.max_steps=1,2", "--cfg", "job", "-p", "a.b"]
    assert run("train", *given, "--help")[0] == 0
    assert got == [*given, "--help"]


def test_eval_prints_its_table_and_report_and_report_rebuilds_it(run, checkpoint) -> None:
    status, out, err = run(
        "eval", f"model={checkpoint}", "limit=3", "task.max_new_tokens=12", "device=cpu"
    )
    assert status == 0, err
    assert "reports/words/report.html" in out and "exact" in out and "3/3" in out
    page = Path("reports/words/report.html")
    before = page.read_text()
    page.unlink()
    status, out, _ = run("report", "reports/words")
    assert (status, out) == (0, "reports/words/report.html\n") and page.read_text() == before
    status, out, _ = run("report", "reports/words", "reports/words")
    assert (status, out) == (0, "reports/compare/report.html\n")


def test_demo_runs_the_bundled_model_in_all_modes(run, checkpoint, monkeypatch) -> None:
    requested = []
    monkeypatch.setattr(
        "deliberate.api.checkpoint.resolve", lambda name: requested.append(name) or str(checkpoint)
    )
    monkeypatch.setattr(app, "write_report", lambda folder, _runs: folder / "report.html")
    status, out, err = run("demo", "--problems", "2", "--out", "a b")
    assert status == 0, err
    assert set(requested) == {"tiny"} and "a b/report.html" in out
    result, records = read_results("a b")
    assert list(result.modes) == ["transformers", "dense", "exact", "threshold"]
    assert len(records) == 2
    # The dense baseline is the fastest there is, not transformers' modules.
    assert result.environment["executor"].startswith("fused: llama")


def test_a_broken_promise_is_a_warning_with_status_1(run, checkpoint, monkeypatch) -> None:
    decode = Runner.decode

    def off_by_one(self, prompt, mode):
        done = decode(self, prompt, mode)
        if mode == "exact":
            done.tokens[4] = (done.tokens[4] + 1) % 300
        return done

    monkeypatch.setattr(Runner, "decode", off_by_one)
    monkeypatch.setattr(app, "write_report", lambda folder, _runs: folder / "report.html")
    status, out, err = run(
        "eval", f"model={checkpoint}", "limit=2", "task.max_new_tokens=12", "modes=[dense,exact]"
    )
    assert status == 1
    assert err.startswith("warning: exact departs from dense in words/") and "at token 4" in err
    assert "report.html" in out


def test_an_interrupt_is_quiet_and_says_what_was_kept(run, checkpoint, monkeypatch) -> None:
    def interrupted(*_arguments, **_settings):
        raise app.Interrupted("interrupted: 3 of 5 problems are in x")

    monkeypatch.setattr(app, "evaluate", interrupted)
    status, out, err = run("eval")
    assert (status, out, err) == (130, "", "interrupted: 3 of 5 problems are in x\n")

    def stopped(*_arguments, **_settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "evaluate", stopped)
    assert run("eval")[::2] == (130, "")


def test_bench_help_lists_every_bench_and_the_first_question_to_ask(run) -> None:
    for arguments in (("bench",), ("bench", "--help"), ("bench", "-h")):
        status, out, _ = run(*arguments)
        listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
        assert status == 0 and listed == list(BENCHES) and listed[0] == "agreement"
        assert re.search("agreement +ask this first", out)
    for name, bench in BENCHES.items():
        status, out, _ = run("bench", name, "--help", "seed=7")
        assert status == 0 and bench.question in out and "seed: 7" in out
    for wrong, named in ((["--fast"], "--fast"), (["nix"], "'nix'"), (["cost", "nix=1"], "nix")):
        status, _, err = run("bench", *wrong)
        assert status == 2 and named in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["eval", "calibrate", *(b.config for b in BENCHES.values())])
def test_the_fastest_executor_is_the_default_of_every_command(command) -> None:
    # Some measure several executors, two change what is inside the layers, and one runs no model.
    others = ("bench_floor", "bench_rate", "bench_precision", "bench_skip", "bench_qat")
    if command not in others:
        assert compose(command, []).executor == "auto"


def test_eval_help_shows_settings_and_tasks(run) -> None:
    status, out, _ = run("eval", "--help", "task=math")
    assert status == 0 and "gsm_symbolic" in out and "style: auto" in out and "warmup: 2" in out


@pytest.mark.parametrize("fidelity", ["exact", "threshold", "dense"])
def test_generate_prints_the_answer_and_where_its_tokens_were_chosen(
    run, checkpoint, fidelity
) -> None:
    status, out, err = run(
        "generate", "How many?", "--model", str(checkpoint), "--fidelity", fidelity,
        "--max-new-tokens", "15",
    )  # fmt: skip
    assert status == 0, err
    assert "\x1b" not in out and "chosen at layer" in out and "of 4 layers run per token" in out
    assert ("drafted" in out) == (fidelity == "exact")
    assert ("exited early, none verified" in out) == (fidelity == "threshold")
    assert "ms per token, prompt pass included" in out


def test_generate_colours_each_token_by_its_layer_and_prints_what_generate_returns(
    run, checkpoint, monkeypatch
) -> None:
    import re

    from deliberate.api.checkpoint import load_tokenizer
    from deliberate.api.model import AdaptiveModel
    from deliberate.data.prompts import Encoder

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    requested = ("generate", "How many?", "--model", str(checkpoint), "--max-new-tokens", "15")
    _, coloured, _ = run(*requested)
    monkeypatch.setenv("NO_COLOR", "1")
    _, plain, _ = run(*requested)
    assert len(set(re.findall(r"48;2;\d+;\d+;\d+", coloured))) == 3 and "48;2" not in plain
    model, tokenizer = AdaptiveModel.from_pretrained(checkpoint), load_tokenizer(checkpoint)
    import torch

    ids = torch.tensor([Encoder(tokenizer, max_tokens=99).prompt("How many?")])
    made = model.generate(ids, max_new_tokens=15)[0, ids.shape[1] :]
    text = tokenizer.decode(made, skip_special_tokens=True).strip()
    assert plain.startswith(text)
    assert text in re.sub(r"\x1b\[[0-9;]*m", "", coloured)


def test_raw_sends_the_text_without_the_question_template(run, checkpoint) -> None:
    requested = ("generate", "How many?", "--model", str(checkpoint), "--max-new-tokens", "8")
    raw = run(*requested, "--raw")[1]
    asked_raw = ("generate", "Question: How many?\nAnswer:", *requested[2:], "--raw")
    assert raw != run(*requested)[1]
    assert run(*asked_raw)[1].split("tokens")[0] == run(*requested)[1].split("tokens")[0]


def test_a_chat_template_is_used_unless_told_otherwise(run, checkpoint, tmp_path) -> None:
    chatty = tmp_path / "chatty"
    shutil.copytree(checkpoint, chatty)
    (chatty / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}Question: {{ m['content'] }}\nReply:{% endfor %}"
    )
    requested = ("generate", "How many?", "--max-new-tokens", "8", "--model")
    as_text = ("generate", "Question: How many?\nReply:", *requested[2:], str(checkpoint), "--raw")

    def answer(*arguments):
        return run(*arguments)[1].split("tokens")[0]

    # A template writes the mark of the beginning itself.
    assert answer(*requested, str(chatty)) == answer(*as_text)
    assert answer(*requested, str(chatty), "--chat", "never") == answer(*requested, str(checkpoint))
    assert answer(*requested, str(chatty)) != answer(*requested, str(checkpoint))


def test_env_is_machine_readable_and_names_the_data_sets(run, tmp_path, monkeypatch) -> None:
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    (tmp_path / "data" / "gsm8k" / "test.jsonl").touch()
    monkeypatch.setenv("DELIBERATE_DATA", str(tmp_path / "data"))
    facts = json.loads(run("env", "--json")[1])
    assert facts["deliberate"] == __version__ and facts["data_sets"] == ["gsm8k/test"]
    assert {"versions", "missing", "threads", "bundled_models"} <= set(facts)
    status, out, _ = run("env")
    assert status == 0 and "gsm8k/test" in out and "DELIBERATE_DATA" in out


def test_the_command_works_as_a_module_from_another_folder(checkpoint, tmp_path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "deliberate.cli.app", "eval", f"model={checkpoint}", "limit=1",
         "task.max_new_tokens=4", "modes=[dense]", "warmup=0"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "reports" / "words" / "results.json").is_file()
