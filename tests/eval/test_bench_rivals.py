"""`deliberate bench rivals` with rivals that are made up, and one process of the bundled model."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from deliberate.api.checkpoint import load_tokenizer
from deliberate.eval.benchmarks import rivals
from deliberate.eval.benchmarks.rival_figures import Variant, picture, report, show
from deliberate.eval.benchmarks.rivals import Field, RivalProcess, measure
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.utils.errors import DeliberateError

PROMPTS = [[1, 2, number] for number in range(5)]
SECONDS = {"dense": 1.0, "exact lookup": 0.5, "transformers": 4.0, "llama.cpp": 2.0}


class MadeUp:
    """Takes a time of its own; a token is the prompt's sum and its place."""

    missing = None

    def __init__(self, asked: list[str], *, wrong: bool = False, fails: str | None = None) -> None:
        self.asked, self.wrong, self.fails = asked, wrong, fails

    def ask(self, **request):
        if request.get("memory"):
            return {"bytes": 30_000_000, "before": 10_000_000}
        if self.fails:
            return {"failed": self.fails}
        self.asked.append(request["system"])
        first = sum(request["prompt"]) + self.wrong
        seconds = SECONDS[request["system"]] * (1 + request["prompt"][-1] / 10)
        if request["new"] == 1 and request["system"] == "transformers":
            seconds /= 4
        elif request["new"] == 1:
            seconds /= 2
        tokens = [first + place for place in range(request["new"])]
        return {"tokens": tokens, "seconds": seconds, "own": seconds / 2}

    def close(self) -> None:
        self.asked.append("closed")


def settings(**given):
    cfg = bench_config("bench_rivals", [], verbatim=())
    return OmegaConf.merge(cfg, {"answer_tokens": 4, "warmup": 1, "prefill_rounds": 2} | given)


def run(**rival):
    asked: list[str] = []
    field = Field({Variant(name, "float32", 1): MadeUp(asked) for name in SECONDS})
    field.of |= {Variant(name, "float32", 1): one for name, one in rival.items()}
    return report(measure(field, PROMPTS, [7] * 9, settings()), field.absent, 0), asked


def row(figures, system: str):
    return next(one for one in figures["variants"] if one["system"] == system)


def test_variants_answer_a_prompt_in_rotating_order_before_the_next(tmp_path) -> None:
    figures, asked = run()
    names = list(SECONDS)
    for turn in range(len(PROMPTS)):
        first = turn % len(names)
        own = names[first:] + names[:first]
        # Each with all tokens, and then with one.
        assert asked[8 * turn : 8 * turn + 8] == [name for name in own for _ in range(2)]
    # Exact has no long prompt's pass of its own.
    assert "exact lookup" not in asked[8 * len(PROMPTS) :]
    assert row(figures, "dense")["prompts"] == len(PROMPTS) - 1


def test_ratios_are_of_medians_and_memory_is_beyond_the_process_itself() -> None:
    figures, _ = run()
    ratios = {(one["variant"], one["against"]): one for one in figures["ratios"]}
    key = ("dense, float32, 1 thread", "transformers, float32, 1 thread")
    assert ratios[key]["wall"]["value"] == pytest.approx(4.0)
    assert ratios[key]["wall"]["range"] == pytest.approx([4.0, 4.0])
    key = ("exact lookup, float32, 1 thread", "dense, float32, 1 thread")
    assert ratios[key]["own"]["value"] == pytest.approx(2.0)
    assert row(figures, "dense")["ms_per_token"] == pytest.approx(1e3 * 1.25 / 4)
    assert row(figures, "dense")["peak_bytes"] == 20_000_000
    # Half of dense's answer is its prompt pass, a quarter of transformers'.
    decode = {(one["variant"], one["against"]): one for one in figures["decode_ratios"]}
    key = ("dense, float32, 1 thread", "transformers, float32, 1 thread")
    assert decode[key]["wall"]["value"] == pytest.approx(6.0)
    assert row(figures, "dense")["decode_ms_per_token"] == pytest.approx(1e3 * 1.25 / 2 / 3)
    assert row(figures, "dense")["same_as"] == "transformers"
    assert row(figures, "exact lookup")["same"] == len(PROMPTS) - 1
    assert json.dumps(figures, allow_nan=False)


def test_other_tokens_and_failures_are_told_and_the_others_go_on() -> None:
    other = MadeUp([], wrong=True)
    figures, _ = run(**{"exact lookup": other, "llama.cpp": MadeUp([], fails="Error: no")})
    assert row(figures, "exact lookup")["same"] == 0
    assert row(figures, "llama.cpp")["failure"] == "Error: no"
    assert row(figures, "dense")["prompts"] == len(PROMPTS) - 1
    console = Console(record=True, width=160)
    show(figures | {"missing": {"x": "x is left out: not installed"}}, console)
    text = console.export_text()
    assert "x is left out: not installed" in text and "1 thread failed: Error: no" in text
    drawn = ElementTree.fromstring(picture(figures))
    words = "".join(drawn.itertext())
    assert drawn.tag.endswith("svg") and "dense, float32" in words and "llama" not in words


def test_a_process_answers_as_generate_does_and_names_what_it_lacks(monkeypatch) -> None:
    given = {
        "library": "ours", "systems": ["dense", "exact lookup", "exact int4"], "model": "tiny",
        "file": None, "precision": "float32", "threads": 1, "context": 64, "lookup_tokens": 10,
        "early_exit_layer": None, "executor": "auto", "draft": None, "rotate": True,
    }  # fmt: skip
    rival = RivalProcess(given)
    try:
        assert rival.missing is None
        answers = [rival.ask(system=name, prompt=[5, 9, 4, 7], new=6) for name in given["systems"]]
        padded = [5, load_tokenizer("tiny").pad_token_id, 4, 7]  # as markers of a chat may be
        assert len(rival.ask(system="dense", prompt=padded, new=6)["tokens"]) == 6
        assert len(answers[0]["tokens"]) == 6
        assert all(one["tokens"] == answers[0]["tokens"] for one in answers)
        assert all(one["seconds"] > 0 and one["own"] > 0 for one in answers)
        memory = rival.ask(memory=True)
        # Its own, whatever the process that started it held; what it imported is no model's.
        assert 100_000_000 < memory["before"] < memory["bytes"]
        assert memory["bytes"] - memory["before"] < 150_000_000
        assert "failed" in rival.ask(system="dense", prompt=[10**9], new=2)
        assert rival.ask(system="dense", prompt=[5, 9, 4, 7], new=6)["tokens"]  # goes on
    finally:
        rival.close()


def test_a_rival_that_is_not_there_is_left_out_by_name(monkeypatch) -> None:
    class Absent:
        missing = "llama-cpp-python is not installed"

        def __init__(self, given) -> None:
            self.missing = Absent.missing if given["library"] == "llama.cpp" else None

        def close(self) -> None:
            pass

    monkeypatch.setattr(rivals, "RivalProcess", Absent)
    cfg = settings(model="tiny", systems=["dense", "exact layer", "llama.cpp"], draft=None)
    found = rivals.start(cfg, 10)
    assert {variant.system for variant in found.of} == {"dense"}
    assert len(found.of) == 8
    assert found.absent["llama.cpp"].endswith("llama-cpp-python is not installed")
    assert "draft=null" in found.absent["exact layer"]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("systems=[dense,vllm]", "vllm"),
        ("rotate=true", "rotate=true is of our own"),
        ("precisions=[3 bit]", "3 bit"),
        ("threads=[1,0]", "threads=0"),
        ("threads=[1,1]", "each once"),
        ("prompts=0", "prompts"),
    ],
)
def test_a_mistaken_setting_is_named_before_anything_is_loaded(override, named) -> None:
    with pytest.raises(DeliberateError, match=named):
        rivals.main([override])
