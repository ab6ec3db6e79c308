"""The summary counts what it says, and files come back as written or not at all."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from synthetic_runs import LAYERS, MODES, make_records, make_result

from deliberate.eval.runner.outcomes import ModeOutcome, ProblemRecord, first_difference
from deliberate.eval.runner.results import read_results, write_results
from deliberate.eval.runner.summary import summarise
from deliberate.utils.errors import DeliberateError


def outcome(tokens, layers, *, seconds=1.0, prefill=0.2, correct=True, passes=0, **more):
    return ModeOutcome(
        text="t", predicted="1", correct=correct, tokens=tokens, pieces=[str(t) for t in tokens],
        exit_layers=layers, confidences=[], seconds=seconds, prefill_seconds=prefill,
        layer_passes=passes, layer_positions=2 * passes, **more,
    )  # fmt: skip


def problem(name, modes, difficulty=1, subject=None):
    return ProblemRecord(name, "q", "1", "s", difficulty, subject, 5, modes)


@pytest.fixture
def by_hand():
    """Two problems whose summary is worked out in the tests below."""
    return [
        problem(
            "a",
            {
                "dense": outcome([1, 2, 3, 4, 9], [8] * 5, seconds=1.0, passes=32),
                "threshold": outcome(
                    [1, 2, 7, 4, 9], [2, 2, 4, 8, 8], seconds=0.6, passes=22, correct=False
                ),
            },
        ),
        problem(
            "b",
            {
                "dense": outcome([5, 9], [8, 8], seconds=0.6, passes=8),
                "threshold": outcome([5, 9], [8, 2], seconds=0.4, passes=2, finish="length"),
            },
            difficulty=2,
        ),
    ]


def test_summary_equals_the_sums_by_hand(by_hand):
    modes = summarise(by_hand, num_layers=8)
    dense, threshold = modes["dense"], modes["threshold"]
    assert (dense.total, dense.correct, dense.accuracy) == (2, 2, 1.0)
    assert (threshold.correct, threshold.tokens, threshold.truncated) == (1, 7, 1)
    assert dense.layers_per_token == 8.0  # 40 calls over 4 + 1 steps after the first token
    assert threshold.layers_per_token == pytest.approx(24 / 5)
    assert threshold.positions_per_token == pytest.approx(48 / 5)
    assert threshold.exit_histogram == {2: 3, 4: 1, 8: 3}
    assert threshold.mean_exit_layer == pytest.approx(34 / 7)
    assert dense.ms_per_token.median == pytest.approx((200 + 400) / 2)  # 0.8 s / 4, 0.4 s / 1
    assert threshold.seconds_total == pytest.approx(1.0)
    assert threshold.tokens_per_second == pytest.approx(7.0)


def test_comparison_equals_the_sums_by_hand(by_hand):
    versus = summarise(by_hand, num_layers=8)["threshold"].versus_dense
    assert (versus.problems, versus.identical) == (2, 1)
    # Problem a agrees for 2 of 5 tokens (what follows the difference does not count), b for 2.
    assert versus.token_agreement == pytest.approx(4 / 7)
    # Median seconds per token: dense (0.2 + 0.3) / 2, threshold (0.12 + 0.2) / 2.
    assert versus.speedup.value == pytest.approx(0.25 / 0.16)
    assert versus.time_ratio == pytest.approx(1.6 / 1.0)
    assert versus.accuracy_difference == -0.5
    assert (versus.mcnemar.b, versus.mcnemar.c) == (1, 0)


def test_dense_is_not_compared_with_itself(by_hand):
    dense = summarise(by_hand, num_layers=8)["dense"]
    assert dense.versus_dense is None and dense.versus_transformers is None


def test_groups_partition_the_problems():
    records = make_records(31)
    for summary in summarise(records, num_layers=LAYERS).values():
        for rows in (summary.by_difficulty, summary.by_subject):
            assert sum(row.total for row in rows) == summary.total
            assert sum(row.correct for row in rows) == summary.correct
        assert [int(row.group) for row in summary.by_difficulty] == [1, 2, 3, 4, 5, 6]


def test_problems_without_difficulty_are_in_no_group():
    records = [replace(record, difficulty=None, subject=None) for record in make_records(4)]
    summary = summarise(records, num_layers=LAYERS)["dense"]
    assert summary.total == 4 and summary.by_difficulty == [] and summary.by_subject == []


def test_a_mode_that_ran_on_some_problems_is_compared_on_those():
    records = make_records(20)
    cut = [
        record
        if index < 5
        else replace(record, modes={m: o for m, o in record.modes.items() if m != "transformers"})
        for index, record in enumerate(records)
    ]
    modes = summarise(cut, num_layers=LAYERS)
    assert modes["transformers"].total == 5 and modes["dense"].total == 20
    assert modes["exact"].versus_transformers.problems == 5
    first = summarise(records[:5], num_layers=LAYERS)
    assert modes["exact"].versus_transformers == first["exact"].versus_transformers


def test_a_mode_that_counts_no_layers_reports_none_not_zero():
    summary = summarise(make_records(3), num_layers=LAYERS)["transformers"]
    assert summary.layers_per_token is None and summary.mean_exit_layer is None


def test_an_answer_of_one_token_divides_by_nothing():
    record = problem("a", {"dense": outcome([9], [8], seconds=0.2, prefill=0.2)})
    summary = summarise([record], num_layers=8)["dense"]
    assert summary.ms_per_token.median == 0 and summary.layers_per_token is None


def test_acceptance_is_one_minus_refused_over_drafted():
    record = problem("a", {"exact": outcome([1, 9], [2, 8], drafted=10, rejected=3)})
    assert summarise([record], num_layers=8)["exact"].acceptance_rate == pytest.approx(0.7)
    assert summarise(make_records(2), num_layers=8)["dense"].acceptance_rate is None


def test_a_mode_that_verifies_nothing_has_no_acceptance():
    # as earlier releases recorded it: tokens that exited early, counted as drafts
    record = problem("a", {"threshold": outcome([1, 9], [2, 8], drafted=10)})
    assert summarise([record], num_layers=8)["threshold"].acceptance_rate is None


def test_shown_times_and_speed_include_the_same(by_hand):
    modes = summarise(by_hand, num_layers=8)
    shown = {mode: summary.shown_ms_per_token.median for mode, summary in modes.items()}
    # prompt pass included: dense (1.0 s / 5 + 0.6 s / 2) / 2
    assert shown["dense"] == pytest.approx(250) and shown["threshold"] == pytest.approx(160)
    assert shown["dense"] / shown["threshold"] == pytest.approx(
        modes["threshold"].versus_dense.speedup.value
    )


def test_results_of_earlier_releases_are_shown_alike(by_hand, tmp_path):
    result = make_result(by_hand)
    old = {
        mode: replace(summary, ms_per_token_whole=None, acceptance_rate=1.0)
        for mode, summary in result.modes.items()
    }
    write_results(tmp_path, replace(result, modes=old), by_hand)
    assert "ms_per_token_whole" not in (tmp_path / "results.json").read_text()
    read, _ = read_results(tmp_path)
    assert read.modes == result.modes


def test_modes_come_in_reading_order():
    assert tuple(summarise(make_records(2), num_layers=LAYERS)) == MODES


def test_first_difference_is_the_common_prefix():
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2], [1, 2, 4]) == 2
    assert first_difference([], [1]) == 0


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "at least one record"),
        ([problem("a", {"dense": outcome([1], [8])})] * 2, "'a' occurs more than once"),
        ([problem("a", {"dense": outcome([1], [9])})], "exit layer 9 is not in 0..8"),
    ],
)
def test_records_that_cannot_be_summarised_are_refused(records, message):
    with pytest.raises(DeliberateError, match=message):
        summarise(records, num_layers=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pieces": ["1"]}, "pieces has 1 entries for 2 tokens"),
        ({"exit_layers": [8]}, "exit_layers has 1 entries for 2 tokens"),
        ({"seconds": 0.1}, "prefill_seconds <= seconds"),
        ({"seconds": float("nan")}, "seconds = nan"),
        ({"drafted": 1, "rejected": 2}, "rejected = 2"),
        ({"finish": "eos"}, "finish = 'eos'"),
    ],
)
def test_an_impossible_outcome_is_refused(changes, message):
    with pytest.raises(DeliberateError, match=message):
        replace(outcome([1, 2], [8, 8]), **changes)


def test_files_come_back_as_written(tmp_path):
    records = make_records(7)
    result = make_result(records, notes=["naïve \u2028 note"])
    write_results(tmp_path / "run", result, records)
    assert read_results(tmp_path / "run") == (result, records)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "problems.jsonl",
        "results.json",
    ]


def test_a_failed_write_leaves_the_old_files(tmp_path):
    records = make_records(3)
    write_results(tmp_path, make_result(records), records)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    others = make_records(3, seed=5)
    broken = make_result(others, config={"threshold": float("nan")})
    with pytest.raises(ValueError):
        write_results(tmp_path, broken, others)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_writing_fewer_records_than_stated_is_refused(tmp_path):
    records = make_records(3)
    with pytest.raises(DeliberateError, match=r"task\.problems is 3 but .* has 2"):
        write_results(tmp_path, make_result(records), records[:2])


def _edit_results(change):
    def edit(folder):
        path = folder / "results.json"
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))

    return edit


def _edit_problems(change):
    def edit(folder):
        path = folder / "problems.jsonl"
        path.write_text(change(path.read_text()))

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            _edit_results(lambda raw: raw.update(schema_version=2, colour=1)),
            r"results\.json: schema_version is 2, this version reads 1",
        ),
        (_edit_results(lambda raw: raw.update(colour=1)), r"results\.json: colour: unknown key"),
        (_edit_results(lambda raw: raw.pop("load")), r"results\.json: load: missing key"),
        (
            _edit_results(lambda raw: raw["modes"]["dense"].pop("tokens")),
            r"modes\.dense\.tokens: missing key",
        ),
        (
            _edit_results(lambda raw: raw["task"].update(problems="three")),
            r"task\.problems: expected int, found \"three\"",
        ),
        (
            _edit_results(lambda raw: raw["model"].update(exits=[2, True])),
            r"model\.exits\[1\]: expected int, found true",
        ),
        (_edit_results(lambda raw: raw.update(created="today")), "created = 'today'"),
        (
            _edit_results(lambda raw: raw["modes"]["dense"].update(exit_histogram={"x": 1})),
            r"exit_histogram: every key must be int",
        ),
        (_edit_problems(lambda text: text[:-40]), r"problems\.jsonl line 3: not valid JSON"),
        (
            _edit_problems(lambda text: text[: text.index("\n") + 1]),
            r"task\.problems is 3 but problems\.jsonl has 1",
        ),
        (
            _edit_problems(lambda text: text.replace('"finish"', '"end"', 1)),
            r"problems\.jsonl line 1: modes\.transformers\.end: unknown key",
        ),
        (
            _edit_problems(lambda text: text.replace('"finish": "stop"', '"finish": "eos"', 1)),
            r"line 1: modes\.transformers: finish = 'eos'",
        ),
        (lambda folder: (folder / "problems.jsonl").unlink(), r"problems\.jsonl: cannot be read"),
        (lambda folder: (folder / "results.json").write_bytes(b"\xff"), "not UTF-8"),
    ],
)
def test_a_damaged_or_foreign_file_is_a_one_line_error(tmp_path, edit, message):
    records = make_records(3)
    write_results(tmp_path, make_result(records), records)
    edit(tmp_path)
    with pytest.raises(DeliberateError, match=message) as caught:
        read_results(tmp_path)
    assert "\n" not in str(caught.value)


def test_strict_and_flexible_accuracy_and_what_was_not_found_are_counted():
    answers = [
        outcome([1, 9], [8, 8], strict=True, flexible=True),
        outcome([1, 9], [8, 8], strict=False, flexible=True),
        outcome([1, 2], [8, 8], strict=False, flexible=False, correct=False, finish="length"),
    ]
    answers[2] = replace(answers[2], predicted=None)
    records = [problem(str(i), {"dense": answer}) for i, answer in enumerate(answers)]
    found = summarise(records, num_layers=8)["dense"].answers
    assert (found.total, found.strict, found.flexible) == (3, 1, 2)
    assert (found.no_answer, found.cut_off) == (1, 1)
    earlier = [problem("old", {"dense": outcome([1, 9], [8, 8])})]
    assert summarise(earlier, num_layers=8)["dense"].answers is None
