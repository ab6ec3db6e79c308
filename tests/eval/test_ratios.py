"""Figures of README and docs say what they include, and follow from the stored times."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest
from synthetic_runs import make_records, make_result

from deliberate.eval.report.ratios import StoredTimes, main, ratios, stored, table
from deliberate.eval.runner.results import write_results
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import read

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "docs" / "results").iterdir())
# Evaluations only: a benchmark keeps its own form there (bench rivals).
STORED = [path for path in RESULTS if '"modes"' in path.read_text(encoding="utf-8")]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INCLUDES = ("prompt pass included", "prompt pass left out")


def tables(text: str) -> list[list[list[str]]]:
    """Rows of cells of every table of a page, the line under the header left out."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    return [
        [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in block.strip().split("\n")
            if not re.fullmatch(r"[|\-]+", line)
        ]
        for block in blocks
    ]


def test_the_readme_quotes_what_the_stored_times_give():
    assert STORED
    for path in STORED:
        quoted = table(ratios(read(StoredTimes, path)))
        assert quoted in README, f"README does not hold this table of {path.name}:\n{quoted}"
        assert f"docs/results/{path.name}" in README


def test_every_kept_result_is_named_by_a_page():
    pages = README + "".join(page.read_text(encoding="utf-8") for page in ROOT.glob("docs/*.md"))
    assert [path.name for path in RESULTS if f"results/{path.name}" not in pages] == []


def test_every_time_and_ratio_of_the_readme_says_what_it_includes():
    seen = 0
    for header, *_ in tables(README):
        for cell in header:
            if "ms per" in cell or ("against" in cell and "the same" not in cell):
                seen += 1
                assert any(phrase in cell for phrase in INCLUDES), cell
    assert seen >= 5


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_a_page_that_quotes_times_of_tokens_says_what_they_include(page):
    text = page.read_text(encoding="utf-8")
    if re.search(r"ms (per|a) token|ms/token|time per token|\d x? ?of dense time", text):
        assert "prompt pass" in " ".join(text.split())


def test_ratios_of_the_readme_follow_from_the_times_beside_them():
    """Where both include the same, the ratio lies within what rounding of the times allows."""
    checked = 0
    for header, *rows in tables(README):
        times = [i for i, cell in enumerate(header) if "ms per" in cell]
        for place, cell in enumerate(header):
            if "against" not in cell:
                continue
            # "the same" goes with the time on its left
            left = [i for i in times if i < place]
            if "the same" in cell:
                of = left[-1]
            else:
                same = [i for i in times if _included(header[i]) == _included(cell)]
                if not same:
                    continue
                of = same[0]
            base = next(float(row[of]) for row in rows if row[place] == "1")
            for row in rows:
                quoted = re.match(r"([\d.]+)x", row[place])
                if not quoted:
                    continue
                own, ratio = float(row[of]), float(quoted.group(1))
                slack = 0.5 * 10.0 ** -len(quoted.group(1).partition(".")[2])
                low, high = (base - 0.005) / (own + 0.005), (base + 0.005) / (own - 0.005)
                assert low - slack <= ratio <= high + slack, (header[place], row)
                checked += 1
    assert checked >= 6


def _included(cell: str) -> str:
    return next(phrase for phrase in INCLUDES if phrase in cell)


def test_the_ratio_that_the_report_gives_is_recomputed_from_the_answers(tmp_path):
    records = make_records(24)
    result = make_result(records)
    write_results(tmp_path, result, records)
    rows = ratios(stored(tmp_path, "made up"))
    for mode, row in rows.items():
        versus = result.modes[mode].versus_dense
        if mode == "dense":
            assert row.whole_ratio == row.step_ratio == 1.0
            continue
        assert row.whole_ratio == pytest.approx(versus.speedup.value, rel=1e-4)
        assert row.low == pytest.approx(versus.speedup.interval.low, rel=1e-4)
        assert row.same == versus.identical
        dense = statistics.median(r.modes["dense"].ms_per_step for r in records)
        own = statistics.median(r.modes[mode].ms_per_step for r in records)
        assert row.step_ratio == pytest.approx(dense / own, rel=1e-3)


def test_the_script_stores_a_folder_and_prints_the_same_of_the_file(tmp_path, capsys):
    records = make_records(6)
    write_results(tmp_path / "run", make_result(records), records)
    file = tmp_path / "kept.json"
    assert main([str(tmp_path / "run"), "--store", str(file), "--command", "deliberate eval"]) == 0
    first = capsys.readouterr().out
    assert main([str(file)]) == 0
    assert capsys.readouterr().out == first and "prompt pass included" in first
    raw = json.loads(file.read_text())
    raw["modes"]["exact"]["tokens"].pop()
    file.write_text(json.dumps(raw))
    assert main([str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    del raw["modes"]["dense"], raw["modes"]["exact"]
    file.write_text(json.dumps(raw))
    with pytest.raises(DeliberateError, match="no times of dense"):
        read(StoredTimes, file)
