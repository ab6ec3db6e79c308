"""Where exact departs from dense in an evaluation: the gap of every difference, and strict mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from random_checkpoint import save_checkpoint

from deliberate.api.checkpoint import load_tokenizer
from deliberate.api.model import AdaptiveModel
from deliberate.eval.runner import command
from deliberate.eval.runner.departures import departure_text, with_gaps
from deliberate.eval.runner.outcomes import Departure, first_difference
from deliberate.eval.runner.results import read_results
from deliberate.eval.runner.runner import Runner, RunSettings
from deliberate.eval.tasks.registry import build_task, evaluation_config
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.head_output import HeadOutput
from deliberate.utils.errors import DeliberateError

SIZE, NEW_TOKENS = 3, 14


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), threshold=0.02)


@pytest.fixture
def evaluate(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "write_report", lambda path, _runs, **_: path / "report.html")
    # Exits of random weights lose time, and a planner would notice and evaluate none.
    monkeypatch.setattr(AdaptiveModel, "planner", lambda *_: None)
    size = [f"task.size={SIZE}", f"task.max_new_tokens={NEW_TOKENS}", "device=cpu"]
    given = {"model": str(checkpoint), "out": str(tmp_path / "out")}

    def call(*overrides: str):
        modes = ["modes=[dense,exact]", "executor=generic", "warmup=0", *overrides]
        cfg = OmegaConf.merge(evaluation_config(size), OmegaConf.from_dotlist(modes), given)
        return command.evaluate(cfg, progress=False)

    return call


def rounded_otherwise(self: Backbone, hidden: torch.Tensor) -> HeadOutput:
    """Stands for another order of sums: passes over several tokens move logits by up to 3 steps."""
    logits = self.logits(hidden)
    if len(hidden) > 1:
        noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(len(hidden)))
        size = 3 * torch.finfo(logits.dtype).eps * logits.abs().amax(-1, keepdim=True)
        logits = logits + (2 * noise - 1).to(logits.dtype) * size
    return HeadOutput(logits)


def test_every_difference_in_bf16_has_its_gap_and_strict_has_none(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(Backbone, "read_full_depth", rounded_otherwise)
    done = evaluate("dtype=bfloat16")
    assert done.broken, "the comparison is empty: exact repeated dense everywhere"
    result, records = read_results(tmp_path / "out")
    assert result.departures == done.broken and departure_text(done.broken) in result.notes
    by_id = {record.id: record for record in records}
    for one in done.broken:
        assert one.near_tie and 0 <= one.steps <= 8 and one.gap >= 0
        modes = by_id[one.problem].modes
        dense, exact = modes["dense"].tokens, modes["exact"].tokens
        assert one.position == first_difference(dense, exact)
    strict = evaluate("dtype=bfloat16", "strict=true", "resume=false")
    assert strict.broken == [] and strict.result.departures is None


def test_the_gap_is_the_one_between_denses_own_logits(checkpoint):
    model = AdaptiveModel.from_pretrained(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    cfg = evaluation_config(["task.size=2", "task.max_new_tokens=8"])
    settings = RunSettings(modes=("dense",), warmup=0)
    runner = Runner(model, tokenizer, build_task(cfg.task), settings)
    problem, prompt = runner.task.problems[1], runner._prompts[1]
    scores = runner.dense_scores(problem.id, 5)
    with torch.inference_mode():
        answer = runner.decode(prompt, "dense").tokens
        expected = model.base(torch.tensor([[*prompt, *answer[:5]]])).logits[0, -1]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert int(scores.argmax()) == answer[5]


def test_a_difference_that_rounding_does_not_explain_is_called_broken():
    near = Departure("a", 3, gap=0.0625, steps=1.0, near_tie=True)
    far = Departure("b", 4, gap=2.5, steps=40.0)
    assert "strict=true executor=generic makes it hold" in departure_text([near])
    assert "(gap 0.0625 logits, 1 rounding steps)" in departure_text([near])
    assert departure_text([far]).endswith("not as guaranteed.")
    assert "1 of 2 are near-ties" in departure_text([near, far])
    assert "and 2 more" in departure_text([near] * 10) and "\n" not in departure_text([near] * 10)
    # One answer ends where the other goes on: there is no gap to measure.
    assert "(gap" not in departure_text([Departure("c", 5)])


def test_strict_without_exact_is_refused_before_anything_is_loaded():
    with pytest.raises(DeliberateError, match="'exact' is not one of the modes"):
        RunSettings(modes=("dense", "threshold"), strict=True)
    with pytest.raises(DeliberateError, match="strict='often'"):
        RunSettings(strict="often")


def test_an_answer_that_ends_early_is_a_difference_without_a_gap(checkpoint):
    class Stub:
        model, settings = None, RunSettings()

    class Modes:
        def __init__(self, tokens):
            self.tokens = tokens

    class Record:
        def __init__(self):
            self.id, self.modes = "p", {"dense": Modes([1, 2]), "exact": Modes([1, 2, 3])}

    assert with_gaps(Stub(), [Record()], [Departure("p", 2)]) == [Departure("p", 2)]
