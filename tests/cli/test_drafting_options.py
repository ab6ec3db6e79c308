"""`deliberate generate --drafts --draft-tokens --lookup-tokens --kv-storage --reasoning-tags`."""

from __future__ import annotations

import pytest

from deliberate.api.generation import AdaptiveDecoding
from deliberate.cli.app import main
from deliberate.cli.drafting_options import drafting_arguments
from deliberate.cli.reasoning_options import reasoning_arguments

QUESTION = "Tom has 3 apples and buys 4 more. How many apples does Tom have?"


def run(*options: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["generate", QUESTION, "--max-new-tokens", "12", *options])
    return int(ended.value.code or 0)


def test_each_option_becomes_its_argument_and_none_is_none():
    assert drafting_arguments(None, None, None, None) == {}
    assert drafting_arguments("int4", 3, 0, "int8") == {
        "drafts": "int4", "draft_tokens": 3, "lookup_tokens": 0, "kv_storage": "int8",
    }  # fmt: skip
    assert drafting_arguments("1, 2,5", None, None, None) == {"drafts": [1, 2, 5]}
    tags = {"tags": ("<a>\n", "</a>")}
    assert reasoning_arguments("none", None, None, None, ("<a>\\n", "</a>")) == {"reasoning": tags}
    named = reasoning_arguments('{"probe": {}}', None, None, None, ("<a>\n", "</a>"))
    assert named == {"reasoning": {"probe": {}} | tags}
    assert reasoning_arguments(None, None, "2", None, ("<a>\n", "</a>"))["reasoning"] == tags


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (("--drafts", "1,2", "--draft-tokens", "3"), {"drafts": (1, 2), "draft_tokens": 3}),
        (("--lookup-tokens", "4", "--kv-storage", "int8"),
         {"lookup_tokens": 4, "kv_storage": "int8"}),
    ],
)  # fmt: skip
def test_what_is_given_decodes_the_answer(options, given, capsys, monkeypatch):
    specs, loop = [], AdaptiveDecoding.loop

    def seen(self, *args, **kwargs):
        specs.append(self.spec)
        return loop(self, *args, **kwargs)

    assert run() == 0
    plain = capsys.readouterr().out.splitlines()[0]
    monkeypatch.setattr(AdaptiveDecoding, "loop", seen)
    assert run(*options) == 0
    printed = capsys.readouterr().out
    assert specs and all(getattr(s, name) == v for s in specs for name, v in given.items())
    assert "drafted" in printed
    if "kv_storage" not in given:  # exact mode's answer, whatever drafts
        assert printed.splitlines()[0] == plain


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--drafts", "1,x"), "--drafts 1,x: give int4, int8, bf16, or layers such as 1,2,5"),
        (("--drafts", "int5"), "drafts='int5': give 'int4'"),
        (("--drafts", "int4", "--fidelity", "threshold"), "verifies no drafts, use 'exact'"),
        (("--drafts", "int4", "--tier", "L1"), "fidelity 'budget' verifies no drafts"),
        (("--drafts", "int4", "--kv-storage", "int8"), "with kv_storage='int8'"),
        (("--draft-tokens", "3"), "draft_tokens=3: the model has no draft layer"),
        (("--lookup-tokens", "4", "--threshold", "0.9"), "lookup_tokens=4: thresholds"),
        (("--lookup-tokens", "-1"), "lookup_tokens=-1 must be a whole number"),
        (("--kv-storage", "int9"), "kv_storage 'int9' is unknown"),
        (("--reasoning-tags", "<a>", "</a>"), "--reasoning-tags <a> </a> alone: give --reasoning"),
        (
            ("--reasoning", '{"tags": ["<a>", "</a>"]}', "--reasoning-tags", "<b>", "</b>"),
            "--reasoning-tags and tags in --reasoning",
        ),
        (("--reasoning", "none", "--reasoning-tags", "<a>", ""), "give an opening and a closing"),
    ],
)
def test_what_cannot_be_obeyed_is_one_line_that_names_it(options, words, capsys):
    assert run(*options) == 2
    printed = capsys.readouterr().err
    assert words in printed and printed.count("\n") == 1
