"""The report says what the figures say, escapes what it is given, and needs no network."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from html_page import Page
from synthetic_runs import LAYERS, MODES, make_records, make_result

from deliberate.eval.report import figures
from deliberate.eval.report.numbers import number, statements, visible
from deliberate.eval.report.page import (
    choose_samples,
    depth_colours,
    differences,
    render_report,
    write_report,
)
from deliberate.eval.runner.results import read_results, write_results
from deliberate.eval.runner.summary import summarise
from deliberate.utils.errors import DeliberateError


@pytest.fixture(scope="module")
def run():
    records = make_records(40)
    return make_result(records), records


@pytest.fixture(scope="module")
def html(run):
    return render_report([run])


@pytest.fixture(scope="module")
def html_of_two(run):
    return render_report([run, run])


def _changed(records, mode, change):
    return [
        replace(record, modes=record.modes | {mode: change(index, record.modes[mode])})
        for index, record in enumerate(records)
    ]


def _says(records, mode):
    return {m: (text, tone) for m, text, tone in statements(make_result(records))}[mode]


def test_the_page_is_well_formed_and_refers_to_nothing_outside(html):
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert "://" not in html
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "img", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert "@import" not in html


def test_ids_are_unique_and_references_resolve(html_of_two):
    ids = re.findall(r'\bid="([^"]+)"', html_of_two)
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html_of_two)
    used = ["".join(pair) for pair in used]
    assert used and set(used) <= set(ids)


def test_the_same_results_give_the_same_bytes(run, html):
    assert render_report([run]) == html


def test_the_page_follows_light_and_dark(html):
    assert "prefers-color-scheme: dark" in html
    variables = set(re.findall(r"var\((--[\w-]+)", html))
    light, dark = html.split("@media (prefers-color-scheme: dark)", 1)
    dark = dark[: dark.index("* { box-sizing")]
    for variable in variables - {"--mode"}:
        assert f"{variable}:" in light and f"{variable}:" in dark, variable


def test_figures_keep_text_as_text_and_colours_as_variables(run):
    svg = figures.accuracy_figure(run[0].modes)
    assert "<metadata" not in svg and "<?xml" not in svg and "xmlns" not in svg
    assert ">threshold</text>" in svg
    assert "DejaVu" not in svg
    assert "var(--mode-exact, #009e73)" in svg


def test_figures_without_content_are_left_out():
    records = [replace(r, difficulty=None) for r in make_records(4, modes=MODES[:2])]
    modes = summarise(records, num_layers=LAYERS)
    assert figures.exit_figure(modes, LAYERS) is None
    assert figures.accuracy_by_difficulty_figure(modes) is None
    assert render_report([(make_result(records), records)]).count("<figure>") == 3


def test_a_mode_of_another_name_gets_a_colour(run):
    records = [
        replace(r, modes={"dense": r.modes["dense"], "wide": r.modes["threshold"]}) for r in run[1]
    ]
    html = render_report([(make_result(records), records)])
    assert figures.OTHER_COLOURS[0] in html and "wide" in html


def test_the_page_says_what_times_include_and_the_same_of_speed(run, html):
    result, _ = run
    exact, dense = (result.modes[mode].shown_ms_per_token.median for mode in ("exact", "dense"))
    ratio = f"{dense / exact:.2f}×"
    table = html[html.index("<h2>Modes</h2>") : html.index("More per mode")]
    assert ratio in table and number(exact) in table and number(dense) in table
    assert table.count("prompt pass<br>included") == 3
    assert "ms per token, prompt pass included" in html[: html.index("<h2>Modes</h2>")]
    assert "ms / token<br>without the<br>prompt pass" in html


def test_tokens_that_nothing_verifies_are_no_drafts(run):
    result, records = run
    # as earlier releases recorded it
    old = [
        replace(r, modes={m: replace(o, drafted=max(o.drafted, 5)) for m, o in r.modes.items()})
        for r in records
    ]
    for given in (records, old):
        page = render_report([(result, given)])
        start = page.index('<section class="sample">')
        answers = page[start:].split('<div class="answer">')[1:]
        for answer in answers:
            mode = answer[answer.index(">") + 1 :].split("<")[0]
            assert ("drafts rejected" in answer) == (mode == "exact")
            if mode == "threshold":
                assert "tokens exited early, none verified" in answer
        assert {a[a.index(">") + 1 :].split("<")[0] for a in answers} == {"exact", "threshold"}
    assert "refused" not in page


def test_exact_states_identity_and_its_speed(run):
    text, tone = _says(run[1], "exact")
    versus = run[0].modes["exact"].versus_dense
    assert text.startswith("40 of 40 problems token-identical to dense")
    assert f"{versus.speedup.value:.2f}× [" in text
    assert "accuracy" not in text and tone == "good"


def test_exact_that_differs_is_called_not_exact(run):
    def spoil(index, outcome):
        tokens = [*outcome.tokens[:-1], 0] if index == 3 else outcome.tokens
        return replace(outcome, tokens=tokens)

    text, tone = _says(_changed(run[1], "exact", spoil), "exact")
    assert text.startswith("not exact: only 39 of 40") and tone == "bad"


def test_a_difference_that_may_be_chance_is_called_indistinguishable(run):
    def few_wrong(index, outcome):
        right = run[1][index].modes["dense"].correct
        return replace(outcome, correct=right and index not in (1, 7))

    text, tone = _says(_changed(run[1], "threshold", few_wrong), "threshold")
    assert "cannot distinguish" in text and "a loss" not in text and tone == "good"


def test_a_loss_of_accuracy_is_called_a_loss(run):
    records = _changed(run[1], "threshold", lambda i, o: replace(o, correct=False))
    text, tone = _says(records, "threshold")
    assert "a loss" in text and tone == "bad"


def test_noise_in_time_is_no_speedup(run):
    def like_dense(index, outcome):
        dense = run[1][index].modes["dense"]
        factor = 1.03 if index % 2 else 0.97
        return replace(outcome, seconds=dense.seconds * factor)

    text, tone = _says(_changed(run[1], "exact", like_dense), "exact")
    assert "cannot be distinguished" in text and tone == ""


def test_a_slower_mode_is_called_slower(run):
    records = _changed(run[1], "exact", lambda i, o: replace(o, seconds=o.seconds * 3))
    text, tone = _says(records, "exact")
    assert "slower than dense" in text and tone == "bad"


def test_faster_tokens_in_longer_answers_are_no_speedup(run):
    def ramble(index, outcome):
        return replace(
            outcome,
            tokens=outcome.tokens * 4,
            pieces=outcome.pieces * 4,
            exit_layers=outcome.exit_layers * 4,
            confidences=[],
            seconds=outcome.seconds * 3,
        )

    records = _changed(run[1], "threshold", ramble)
    comparison = make_result(records).modes["threshold"].versus_dense
    assert comparison.speedup.interval.low > 1 > comparison.time_ratio
    text, tone = _says(records, "threshold")
    assert "yet no speedup" in text and tone != "good"


def test_every_token_is_shown_with_layer_and_confidence(run, html):
    records = run[1]
    page = Page(html)
    shown = [a for tag, a in page.elements if tag == "span" and "title" in a]
    samples = choose_samples(records, ["exact", "threshold"])
    outcomes = [record.modes[mode] for record in samples for mode in ("exact", "threshold")]
    assert len(shown) == sum(len(outcome.tokens) for outcome in outcomes)
    layers = [layer for outcome in outcomes for layer in outcome.exit_layers]
    for attributes, layer in zip(shown, layers, strict=True):
        assert f"depth-{layer}" in attributes["class"].split()
        assert re.match(rf"layer {layer}, confidence [01]\.\d{{3}}", attributes["title"])
    assert sum("diverges" in attributes["class"] for attributes in shown) == sum(
        record.modes["threshold"].tokens != record.modes["dense"].tokens for record in samples
    )


def test_what_the_model_wrote_cannot_become_markup():
    evil = '<script>alert("x")</script>'

    def inject(index, outcome):
        return replace(outcome, pieces=[evil] * len(outcome.pieces), predicted=evil, text=evil)

    records = _changed(make_records(6), "threshold", inject)
    records = [
        replace(r, question=evil, answer=evil, subject=evil, id=evil + r.id) for r in records
    ]
    result = make_result(records, name=evil, notes=[evil], config={evil: evil})
    html = render_report([(result, records)])
    assert "<script" not in html
    assert evil in "".join(Page(html).text)


def test_invisible_letters_are_made_visible():
    assert visible("a\n") == "a↵\n"
    assert visible("\t") == "⇥"
    assert visible("") == "∅"
    assert visible("\u202e") == "⟨202E⟩"
    assert visible(" ") == " "


def test_samples_spread_over_difficulty_and_include_a_failure():
    records = make_records(60)
    chosen = choose_samples(records, ["exact", "threshold"])
    assert 3 <= len(chosen) <= 6
    assert {1, 6} <= {record.difficulty for record in chosen}
    assert choose_samples(records, ["exact", "threshold"]) == chosen
    only = _changed(records, "exact", lambda i, o: replace(o, correct=True))
    only = _changed(only, "threshold", lambda i, o: replace(o, correct=i != 57))
    assert only[57] in choose_samples(only, ["exact", "threshold"])


def test_samples_without_difficulty_and_few_problems():
    records = [replace(record, difficulty=None) for record in make_records(9)]
    assert len(choose_samples(records, ["exact"])) >= 3
    assert len(choose_samples(records[:2], ["exact"])) == 2


def test_deeper_layers_are_shown_stronger():
    def luminance(colour):
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue

    scale = depth_colours([2, 4, 6, 8])
    light = [luminance(depth.light[0]) for depth in scale]
    dark = [luminance(depth.dark[0]) for depth in scale]
    assert light == sorted(light, reverse=True) and dark == sorted(dark)
    for depth in scale + depth_colours([8]):
        for page, ink in (depth.light, depth.dark):
            assert abs(luminance(page) - luminance(ink)) > 90


def test_runs_on_other_data_model_or_machine_are_flagged(run, html_of_two):
    result, records = run
    assert differences([run]) == [] and differences([run, run]) == []
    assert "not like for like" not in html_of_two
    other = make_result(
        records[:30],
        name="other",
        model=result.model | {"sha256": "b2" * 32},
        environment=result.environment | {"threads": 4},
    )
    found = "\n".join(differences([run, (other, records[:30])]))
    assert "model hash" in found and "environment threads" in found and "set of problems" in found
    assert "data hash" not in found
    assert "not like for like" in render_report([run, (other, records[:30])])


def test_the_same_number_of_other_problems_is_flagged(run):
    result, records = run
    middle = [*records[:5], replace(records[5], id="word-005b"), *records[6:]]
    assert any("set of problems" in line for line in differences([run, (result, middle)]))


def test_modes_on_fewer_problems_state_their_number(run):
    records = [
        r if i < 8 else replace(r, modes={m: r.modes[m] for m in MODES[1:]})
        for i, r in enumerate(run[1])
    ]
    assert "n = 8" in render_report([(make_result(records), records)])


def test_one_problem_and_one_mode_still_give_a_report():
    for records in (make_records(1), make_records(1, modes=("exact",))):
        Page(render_report([(make_result(records), records)]))


def test_report_is_written_from_files_that_were_read_back(run, html, tmp_path):
    result, records = run
    write_results(tmp_path / "run", result, records)
    path = write_report(tmp_path / "out", [read_results(tmp_path / "run")])
    assert path.name == "report.html"
    assert path.read_text(encoding="utf-8") == html


def test_no_results_is_an_error():
    with pytest.raises(DeliberateError, match="at least one"):
        render_report([])
