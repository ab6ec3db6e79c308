"""The report shows the gate's rounds at their tokens, and how answers were found."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from html_page import Page
from synthetic_runs import make_records, make_result

from deliberate.eval.report.page import (
    choose_samples,
    render_report,
)
from deliberate.eval.runner.answer_notes import answer_lines, answer_notes
from deliberate.eval.runner.results import read_results, write_results
from deliberate.utils.errors import DeliberateError


@pytest.fixture(scope="module")
def html():
    records = make_records(40)
    return render_report([(make_result(records), records)])


def _changed(records, mode, change):
    return [
        replace(record, modes=record.modes | {mode: change(index, record.modes[mode])})
        for index, record in enumerate(records)
    ]


def test_without_a_gate_nothing_is_said_of_rounds(html):
    assert "Where the gate took rounds" not in html and "round of the gate" not in html


def test_rounds_are_counted_placed_and_marked_at_their_tokens():
    def think(index, outcome):
        rounds = [0] * len(outcome.tokens)
        rounds[-1] = 2 if index % 2 else 0
        rounds[0] = 1 if index else 0
        return replace(outcome, rounds=rounds)

    records = make_records(12)
    for mode in ("dense", "exact"):
        records = _changed(records, mode, think)
    result = make_result(records)
    found = result.modes["dense"].rounds
    assert (found.total, found.tokens, found.problems) == (11 + 12, 17, 11)
    assert found.pieces["<|end|>"] == 6 and max(found.pieces.values()) <= 12
    tokens = sum(len(r.modes["dense"].tokens) for r in records if r.difficulty == 2)
    assert found.by_difficulty["2"] == pytest.approx(2 * 3 / tokens)
    assert result.modes["threshold"].rounds is None
    html = render_report([(result, records)])
    page = Page(html)
    marked = [a for _, a in page.elements if "rounds" in a.get("class", "").split()]
    titles = [a["title"] for a in marked if "title" in a]
    samples = choose_samples(records, ["exact", "threshold"])
    rounds = [n for record in samples for n in record.modes["exact"].rounds if n]
    said = [int(re.search(r"(\d) rounds? of the gate", title)[1]) for title in titles]
    assert said == rounds and len(rounds) > 3
    text = "".join(page.text)
    assert "Where the gate took rounds" in text and f"'<|end|>' {found.pieces['<|end|>']}" in text
    assert 'aria-label="Rounds against difficulty"' in html


def test_rounds_are_kept_in_the_files_and_must_fit_the_tokens(tmp_path):
    def think(index, outcome):
        return replace(outcome, rounds=[index % 2] * len(outcome.tokens))

    records = _changed(make_records(6), "dense", think)
    write_results(tmp_path, make_result(records), records)
    assert read_results(tmp_path) == (make_result(records), records)
    assert (tmp_path / "problems.jsonl").read_text().count('"rounds"') == 6  # where there are any
    outcome = records[0].modes["dense"]
    for wrong in ([1], [-1] * len(outcome.tokens)):
        with pytest.raises(DeliberateError, match="rounds"):
            replace(outcome, rounds=wrong)


def _stock(records):
    """The records of a model that was never trained on the mark, and is cut off now and then."""
    answers = [
        replace(r.modes["dense"], strict=False, flexible=i < 5, correct=i < 5,
                predicted=None if i % 2 else "1", finish="length" if i % 4 == 0 else "stop")
        for i, r in enumerate(records)
    ]  # fmt: skip
    return [replace(r, modes={"dense": a}) for r, a in zip(records, answers, strict=True)]


def test_the_report_shows_strict_and_flexible_accuracy_and_what_was_not_found():
    records = _stock(make_records(40))
    result = make_result(records)
    page = render_report([(result, records)])
    table = page[page.index("How answers were found") :]
    table = table[: table.index("</table>")]
    for figure in ("12.5 %", "5 / 40", "0.0 %", "0 / 40", "50.0 %", "20 / 40", "25.0 %", "10 / 40"):
        assert figure in table, figure
    assert "(0.0 % behind the task&#39;s mark)" in page
    assert answer_lines(result.modes) == [
        "dense: correct 12.5 % flexible, 0.0 % strict; no answer found 50.0 %, cut off 25.0 %"
    ]


def test_records_of_earlier_releases_have_no_table_of_answers(html):
    assert "How answers were found" not in html


def test_a_run_without_answers_says_so_and_what_to_set():
    modes = make_result(_stock(make_records(40))).modes
    requested = SimpleNamespace(style="gsm8k", max_new_tokens=64)
    notes = answer_notes(modes, requested, None)
    assert "No final answer was found in 20 of 40 texts of dense" in notes[0]
    assert "task.style=auto" in notes[0] and "raise task.max_new_tokens" in notes[1]
    guaranteed = SimpleNamespace(risk="accuracy", epsilon=0.2)
    assert "says nothing" in answer_notes(modes, requested, guaranteed)[2]
