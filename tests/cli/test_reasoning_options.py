"""`deliberate generate --reasoning --thinking-token-budget --votes`."""

from __future__ import annotations

import pytest

from deliberate.cli.app import main
from deliberate.cli.reasoning_options import reasoning_arguments

QUESTION = "Tom has 3 apples and buys 4 more. How many apples does Tom have?"


def run(*options: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["generate", QUESTION, *options])
    return int(ended.value.code or 0)


def test_no_option_is_no_reasoning_and_each_becomes_its_argument():
    assert reasoning_arguments(None, None, None) == {}
    assert reasoning_arguments("probe", 40, None) == {"reasoning": {"probe": None, "budget": 40}}
    assert reasoning_arguments("none", None, None) == {"reasoning": {}}
    assert reasoning_arguments('{"variance": {"tokens": 8}, "probe": null}', 40, None) == {
        "reasoning": {"variance": {"tokens": 8}, "probe": None, "budget": 40}
    }
    sampled = {"do_sample": True, "temperature": 0.7}
    assert reasoning_arguments(None, None, "4") == {"votes": 4} | sampled
    assert reasoning_arguments(None, None, "adaptive") == {"votes": "adaptive"} | sampled
    limited = {"votes": {"fixed": {"most": 4}, "tokens": 90}} | sampled
    assert reasoning_arguments(None, None, "4", 90) == limited


def test_a_limit_and_votes_are_kept_and_printed(capsys):
    assert run("--reasoning", "probe", "--thinking-token-budget", "6", "--votes", "3") == 0
    printed = capsys.readouterr().out
    assert "6 tokens of reasoning" in printed and "####" in printed
    assert "3 chains," in printed and "votes " in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--reasoning", '{"variance": {"size": 1}}'), "'variance' has no setting 'size'"),
        (("--reasoning", '{"variance": '), "--reasoning"),
        (
            ("--reasoning", '{"budget": 3}', "--thinking-token-budget", "4"),
            "budget in --reasoning: give one of them",
        ),
        (("--reasoning", "prob"), "'prob' is neither a stop policy"),
        (("--votes", "most"), "votes='most' is unknown"),
        (("--votes", "0"), "votes=0 must be"),
        (("--vote-tokens", "90"), "without --votes"),
        (("--reasoning", "probe", "--regex", "a"), "structured with reasoning="),
        (("--reasoning", "probe", "--tier", "L1"), "latency_budget with reasoning="),
    ],
)
def test_what_cannot_be_obeyed_is_one_line_that_names_it(options, words, capsys):
    assert run(*options) == 2
    assert words in capsys.readouterr().err
