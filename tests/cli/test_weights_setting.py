"""`weights=` of the commands that decode, and the demo with a real model."""

from pathlib import Path

import pytest
from random_checkpoint import save_checkpoint

from deliberate.api.model import AdaptiveModel
from deliberate.cli import app as cli
from deliberate.eval.benchmarks.harness import load_model
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.runner.results import read_results
from deliberate.eval.tasks.registry import demo_config
from deliberate.executors.quantization import Storage


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        found = capsys.readouterr()
        return int(ended.value.code or 0), found.out, found.err

    return call


@pytest.fixture
def loaded(monkeypatch) -> list[AdaptiveModel]:
    """Models that a command loads."""
    models = []
    load = AdaptiveModel.from_pretrained.__func__
    noted = classmethod(lambda cls, *a, **k: models.append(load(cls, *a, **k)) or models[-1])
    monkeypatch.setattr(AdaptiveModel, "from_pretrained", noted)
    return models


def test_eval_decodes_with_the_weights_named_and_records_them(run, checkpoint, loaded) -> None:
    modes = "modes=[transformers,dense,exact]"
    few = ("limit=1", "warmup=0", "task.max_new_tokens=6", "device=cpu", modes)
    for given, kept in (("float", Storage.NATIVE), ("Q4_1", Storage.INT4)):
        status, _, err = run(
            "eval", f"model={checkpoint}", f"weights={given}", f"out={given}", *few
        )
        assert status == 0, err
        assert set(loaded[-1].backbone.plan.layers) == {kept}
        result = read_results(given)[0]
        assert result.config["weights"] == given
        noted = [note for note in result.notes if note.startswith(f"weights={given} are rounded")]
        assert len(noted) == (given != "float")


def test_a_run_with_other_weights_does_not_go_on_from_the_one_before(
    run, checkpoint, monkeypatch
) -> None:
    few = ("limit=1", "warmup=0", "task.max_new_tokens=6", "modes=[dense]", "out=run")
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr("deliberate.eval.runner.command.write_results", lambda *_: 1 / 0)
        cli.main(["eval", f"model={checkpoint}", "weights=int8", *few])
    _, _, err = run("eval", f"model={checkpoint}", "weights=q8_0", "resume=true", *few)
    assert "weights" in err and err.startswith("error: ")


def test_generate_takes_weights(run, checkpoint, loaded) -> None:
    said = run(
        *("generate", "1 + 1?", "--model", str(checkpoint)),
        *("--max-new-tokens", "3", "--weights", "int8"),
    )
    assert said[0] == 0, said[2]
    assert set(loaded[-1].backbone.plan.layers) == {Storage.INT8}


def test_bench_decode_takes_weights(checkpoint) -> None:
    cfg = bench_config("bench", [f"model={checkpoint}", "weights=Q8_0"], verbatim=("model",))
    assert set(load_model(cfg).backbone.plan.layers) == {Storage.Q8_0}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["eval", "weights=int3"], "weights 'int3' are unknown"),
        (["eval", "weights=FILE"], "needs a GGUF file"),
        (["eval", "weights=int4", "executor=generic"], "need the fused executor"),
        (["generate", "x", "--weights", "2"], "weights '2' are unknown"),
        (["serve", "{model}", "--weights", "float8"], "weights 'float8' are unknown"),
        (["generate", "x", "--threads", "0"], "threads=0"),
        (["serve", "{model}", "--threads", "-1"], "threads=-1"),
        (["bench", "decode", "weights=int4", "widen=2"], "widen=2 takes weights=float"),
    ],
)
def test_weights_that_cannot_be_had_are_one_line(run, checkpoint, given, named) -> None:
    model = {"eval": [f"model={checkpoint}"], "generate": ["--model", str(checkpoint)]}
    arguments = [one.replace("{model}", str(checkpoint)) for one in given]
    status, _, err = run(*arguments, *model.get(given[0], []))
    assert status == 2 and named in err and err.count("\n") == 1


def test_a_demo_of_a_real_model_asks_gsm8k_where_it_is(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("DELIBERATE_DATA", raising=False)
    assert demo_config(5, "out").task.name == "words"
    apart = demo_config(5, "out", "smollm2-draft")
    assert (apart.task.name, apart.task.size) == ("words", 5)
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").touch()
    monkeypatch.setenv("DELIBERATE_DATA", str(tmp_path))
    assert demo_config(5, "out").task.name == "words"
    real = demo_config(5, "out", "smollm2-draft")
    assert (real.task.name, real.limit, real.model) == ("gsm8k", 5, "smollm2-draft")
    assert list(real.modes) == ["transformers", "dense", "exact"] and real.transformers_limit == 8
