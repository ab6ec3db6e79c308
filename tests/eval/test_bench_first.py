"""`deliberate bench first` with processes that are made up, and two of the bundled model."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from deliberate.api.model import AdaptiveModel
from deliberate.eval.benchmarks import first
from deliberate.eval.benchmarks.first import Pairs, description, observe, show
from deliberate.eval.benchmarks.rivals import RivalProcess
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.utils.errors import DeliberateError


def settings(**given):
    return OmegaConf.merge(bench_config("bench_first", [], verbatim=()), {"model": "tiny"} | given)


class MadeUp:
    """A process that takes a time of its own, and writes down what happened to it."""

    missing = None
    happened: ClassVar[list[str]] = []

    def __init__(self, given) -> None:
        self.mode = given["systems"][0]
        self.asked = 0
        self.happened.append(f"start {self.mode}")

    def ask(self, **request):
        assert self.asked == 0  # only a first answer is timed
        self.asked += 1
        self.happened.append(f"ask {request['system']}")
        seconds = {"dense": 2.0, "exact": 1.0}[self.mode]
        return {"tokens": [1] * request["new"], "seconds": seconds, "own": seconds / 2}

    def close(self) -> None:
        self.happened.append(f"end {self.mode}")


def test_every_answer_is_the_first_of_its_process_and_the_order_alternates(monkeypatch) -> None:
    monkeypatch.setattr(first, "RivalProcess", MadeUp)
    monkeypatch.setattr(MadeUp, "happened", [])
    pairs = Pairs()
    for number in range(4):
        observe(settings(), [1, 2, 3], pairs, reverse=number % 2 == 1)
    begin, end = ["start dense", "start exact"], ["end dense", "end exact"]
    forth, back = ["ask dense", "ask exact"], ["ask exact", "ask dense"]
    assert MadeUp.happened == [*begin, *forth, *end, *begin, *back, *end] * 2
    figures = pairs.figures(0)
    assert figures["wall"]["ratio"] == pytest.approx(2.0) and figures["same"] == 4
    assert figures["wall"]["interval"] == pytest.approx([2.0, 2.0])
    assert figures["own"]["dense_ms"] == pytest.approx(1000.0)
    console = Console(record=True, width=120)
    show({"questions": figures}, console)
    assert "2.000x" in console.export_text() and json.dumps(figures, allow_nan=False)


def test_a_process_that_fails_is_named(monkeypatch) -> None:
    class Failing(MadeUp):
        def ask(self, **request):
            return {"failed": "ValueError: no"}

    monkeypatch.setattr(first, "RivalProcess", Failing)
    with pytest.raises(DeliberateError, match="bench first: dense: ValueError: no"):
        observe(settings(), [1], Pairs(), reverse=False)
    with pytest.raises(DeliberateError, match="precision"):
        first.main(["model=tiny", "precision=half"])


def test_a_process_of_the_bundled_model_answers_as_dense_does() -> None:
    # Dense in this process: a second one would answer by the same code after seconds of imports.
    process = RivalProcess(description(settings(answer_tokens=6), "exact"))
    assert process.missing is None
    found = process.ask(system="exact", prompt=[5, 9, 2], new=6)
    process.close()
    assert found["seconds"] > 0
    given = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "fidelity": "dense"}
    made = AdaptiveModel.from_pretrained("tiny").generate(torch.tensor([[5, 9, 2]]), **given)
    assert found["tokens"] == made[0, 3:].tolist() and len(found["tokens"]) == 6
    both = [description(settings(), mode) for mode in first.MODES]
    assert [one["systems"] for one in both] == [["dense"], ["exact"]]
    assert both[0] | {"systems": 0} == both[1] | {"systems": 0}
