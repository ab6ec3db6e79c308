"""`deliberate generate` with a description of its answer."""

from __future__ import annotations

import json
import re

import pytest

from deliberate.cli.app import main

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"apples": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["apples"],
    "additionalProperties": False,
}


def answer(capsys, *options):
    with pytest.raises(SystemExit) as ended:
        main(["generate", "Tom has 3 apples. How many?", "--max-new-tokens", "40", *options])
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


@pytest.mark.parametrize("fidelity", ["exact", "dense", "threshold"])
def test_the_answer_obeys_the_schema_in_the_file(tmp_path, capsys, fidelity):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA), encoding="utf-8")
    status, out, _ = answer(capsys, "--json-schema", str(path), "--fidelity", fidelity)
    assert status == 0
    first, figures = out.splitlines()[:2]
    assert json.loads(first)["apples"] in range(100)
    assert re.search(r"\d+ looked up, drafted by the model itself or forced", figures)
    if fidelity == "dense":
        assert "exited early" not in figures


def test_choices_a_regex_and_a_grammar_are_obeyed(tmp_path, capsys):
    path = tmp_path / "answer.ebnf"
    path.write_text('root ::= "It is " [0-9] "."', encoding="utf-8")
    for options, fits in (
        (("--choice", "yes", "--choice", "no"), {"yes", "no"}),
        (("--regex", "[ab]{3}x"), {f"{a}{b}{c}x" for a in "ab" for b in "ab" for c in "ab"}),
        (("--grammar", str(path)), {f"It is {digit}." for digit in range(10)}),
    ):
        status, out, _ = answer(capsys, *options)
        assert status == 0 and out.splitlines()[0] in fits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--regex", "a", "--choice", "b"), "--regex and --choice describe the answer twice"),
        (("--json-schema", "nowhere.json"), "--json-schema nowhere.json cannot be read: No such"),
        (("--regex", "(a"), "structured regex: "),
        (("--regex", "a", "--tier", "L1"), "reasoning, with fidelity 'budget'"),
    ],
)
def test_a_mistake_is_one_line(capsys, options, message):
    status, _, err = answer(capsys, *options)
    assert status == 2 and message in err and err.count("\n") == 1
