"""lm-evaluation-harness runs our models: the same answers as dense, our data sets, our grader."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.eval.lm_evaluation import command, task_functions
from deliberate.eval.lm_evaluation.model import DeliberateLM
from deliberate.utils.errors import DeliberateError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder with three problems of GSM8K's form."""
    root = tmp_path_factory.mktemp("data")
    rows = [{"question": f"What is {n} plus 1?", "answer": f"{n} + 1.\n#### {n + 1}"}
            for n in range(3)]  # fmt: skip
    (root / "gsm8k").mkdir()
    (root / "gsm8k" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return root


def run(fidelity: str) -> tuple[dict, list[str]]:
    """Results of our task, and the model's answers."""
    model = DeliberateLM("tiny", fidelity=fidelity)
    done = simple_evaluate(
        model,
        tasks=["deliberate_gsm8k"],
        task_manager=TaskManager(include_path=str(command.TASKS), include_defaults=False),
        gen_kwargs="max_gen_toks=24",
        bootstrap_iters=0,
    )
    return done, [one["resps"][0][0] for one in done["samples"]["deliberate_gsm8k"]]


def test_exact_gives_the_answers_of_dense_and_says_how_deep_it_went(folder, monkeypatch):
    monkeypatch.setenv("DELIBERATE_DATA", str(folder))
    dense, plain = run("dense")
    exact, made = run("exact")
    assert made == plain and len(made) == 3 and all(made)
    assert exact["results"] == dense["results"]
    assert dense["config"]["deliberate_decoding"]["layers_per_token"] == 8
    assert exact["config"]["deliberate_decoding"]["layers_per_token"] < 8
    assert exact["config"]["deliberate_fidelity"] == "exact"


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (["--tasks", "x"], ["run", "--model deliberate", f"--include_path {command.TASKS}"]),
        (["run", "--model=hf", "--tasks", "x"], ["--model=hf", f"--include_path {command.TASKS}"]),
        (["ls", "tasks"], ["ls tasks"]),
    ],
)
def test_the_command_hands_the_harness_its_own_options(given, added, monkeypatch) -> None:
    from lm_eval import _cli

    seen: list[str] = []
    monkeypatch.setattr(_cli.HarnessCLI, "execute", lambda self, args: None)
    monkeypatch.setattr(_cli.HarnessCLI, "parse_args", lambda self: seen.extend(sys.argv))
    command.main(given)
    text = " ".join(seen)
    assert all(part in text for part in added)
    assert text.count("--model") == (given[0] != "ls")


def test_answers_are_graded_by_our_grader() -> None:
    doc = {"question": "", "answer": "1/2"}
    assert task_functions.score(doc, ["So it is \\boxed{0.5}."]) == {"exact_match": 1.0}
    assert task_functions.score(doc, ["So it is \\boxed{2}."]) == {"exact_match": 0.0}


def test_log_likelihoods_are_those_of_the_full_depth_model_and_it_says_so(caplog) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = AdaptiveModel.from_pretrained("tiny")
    tokenizer = checkpoint.load_tokenizer("tiny")
    requests = [
        Instance("loglikelihood", {}, ("Question: 1 plus 1?\nAnswer:", f" {n}"), n) for n in (2, 3)
    ]
    ours = DeliberateLM(model, tokenizer=tokenizer).loglikelihood(requests)
    assert "exits gain nothing" in caplog.text
    own = HFLM(pretrained=model.base, tokenizer=tokenizer, device="cpu").loglikelihood(requests)
    assert ours == own


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"fidelity": "perfect"}, "perfect"), ({"pretrained": "no-such-model"}, "no-such-model")],
)
def test_wrong_settings_are_one_line(settings, message) -> None:
    with pytest.raises(DeliberateError, match=message) as error:
        DeliberateLM(**({"pretrained": "tiny"} | settings))
    assert "\n" not in str(error.value)
