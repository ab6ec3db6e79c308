"""Rules from a file: what breaks one is refused by name, and a change counts at once."""

from __future__ import annotations

import math
import os
import time

import pytest

from deliberate.serving.errors import ApiError
from deliberate.serving.precheck import Precheck, RuleFile, Rules
from deliberate.serving.protocol import ChatRequest, CompletionRequest
from deliberate.utils.errors import DeliberateError

RULES = """
max_characters: 100
max_messages: 2
max_prompt_tokens: 50
max_tokens: 20
max_equal: 2
control_characters: false
forbidden:
  - name: card-number
    pattern: '\\b\\d{16}\\b'
"""


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "rules.yaml"
    made.write_text(RULES)
    return made


def text(prompt="What is 2 plus 2?", **given):
    return CompletionRequest(model="m", prompt=prompt, **given)


def chat(*contents):
    return ChatRequest(model="m", messages=[{"role": "user", "content": one} for one in contents])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (text("a" * 101), "the texts have 101 characters: 100 at most"),
        (chat("a" * 60, "b" * 60), "the texts have 120 characters"),
        (chat("a", "b", "c"), "messages: 3 of them: 2 at most"),
        (text(max_tokens=21), "max_tokens=21: this server makes 20 at most"),
        (text("a\x00b"), "the control character U+0000 at 1"),
        (text("my card is 1234567812345678"), "the rule 'card-number' forbids"),
        (chat("hi", "1234567812345678"), "the rule 'card-number' forbids"),
    ],
)
def test_what_breaks_a_rule_is_refused_by_name(path, body, message) -> None:
    with pytest.raises(ApiError) as error:
        Precheck.of(path).enter(body)
    assert error.value.status == 400 and message in error.value.message
    assert "\n" not in error.value.message


def test_what_keeps_to_them_passes_and_its_length_is_checked_once_it_is_known(path) -> None:
    passed = Precheck.of(path).enter(text("line\none\ttwo", max_tokens=20))
    passed.check_length(50)
    with pytest.raises(ApiError, match="a prompt of 51 tokens: 50 at most"):
        passed.check_length(51)


def test_equal_requests_in_flight_are_limited_and_others_are_not(path) -> None:
    checks = Precheck.of(path)
    first, second = checks.enter(text()), checks.enter(text())
    with pytest.raises(ApiError) as error:
        checks.enter(text())
    assert error.value.status == 429 and error.value.retry_after == 1
    checks.enter(text("another"))
    first.close()
    first.close()  # once is enough: the second's place stays taken
    checks.enter(text())
    with pytest.raises(ApiError):
        checks.enter(text())
    second.close()


def test_a_changed_file_counts_at_the_next_request_and_a_wrong_one_not_at_all(path, caplog) -> None:
    rules = RuleFile(path)
    assert rules.rules().max_characters == 100
    path.write_text("max_characters: 7\n")
    assert rules.rules() == Rules(max_characters=7)
    path.write_text("max_characters: many\n")
    assert rules.rules().max_characters == 7
    assert "max_characters: 'many' must be a whole number" in caplog.text
    os.remove(path)
    assert rules.rules().max_characters == 7
    path.write_text("max_characters: 9\n")
    assert rules.rules().max_characters == 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a", "names with values are needed"),
        ("max_caracters: 3", "'max_caracters' is not one of max_characters"),
        ("max_equal: 0", "max_equal: 0 must be a whole number from 1"),
        ("max_tokens: true", "max_tokens: True"),
        ("control_characters: 1", "must be true or false"),
        ("forbidden: [{name: a}]", "must have a name and a pattern"),
        ("forbidden: [{name: a, pattern: '('}]", "forbidden 'a': not a pattern"),
        ("pattern_seconds: 0", "pattern_seconds"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_file_is_one_line_at_the_start(tmp_path, content, message) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(content)
    with pytest.raises(DeliberateError, match="rules ") as error:
        Precheck.of(path)
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(DeliberateError, match="cannot be read"):
        Rules.read(tmp_path / "none.yaml")


def test_a_pattern_that_takes_exponential_time_is_stopped(tmp_path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("pattern_seconds: 0.02\nforbidden: [{name: slow, pattern: '(.*a){12}b'}]\n")
    with pytest.raises(ApiError, match="the rule 'slow' takes too long"):
        Precheck.of(path).enter(text("a" * 400))  # by itself it would not end in a year


def test_a_check_of_a_long_prompt_takes_as_long_as_a_few_loops_over_its_characters(path) -> None:
    path.write_text(RULES.replace("max_characters: 100", "max_characters: 40000"))
    checks, body = Precheck.of(path), text("What is 2 plus 2? " * 1800)
    least = [math.inf, math.inf]  # by turns, so that both meet the same machine
    for turn in range(40):
        began = time.thread_time()
        if turn % 2:
            checks.enter(body).close()
        else:
            for _ in body.prompt:
                pass
        least[turn % 2] = min(least[turn % 2], time.thread_time() - began)
    assert least[1] < 20 * least[0]
