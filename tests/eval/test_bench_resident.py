"""`deliberate bench resident`: the memory that an answer's tokens touch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deliberate.eval.benchmarks.resident import Pages, pages
from deliberate.eval.benchmarks.settings import run_benchmark

SMAPS = """\
7f00-7f10 r--p 00000000 08:01 12 /models/my model.gguf
Size:                 64 kB
Rss:                  40 kB
Referenced:           12 kB
7f10-7f20 rw-p 00000000 00:00 0
Rss:                 900 kB
Referenced:          100 kB
"""


def test_pages_of_all_regions_are_added_up():
    assert pages(SMAPS) == Pages(940 * 1024, 112 * 1024)
    assert pages("") == Pages(0, 0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux marks pages")
def test_the_command_writes_what_each_way_of_decoding_reads(tmp_path):
    out = tmp_path / "out.json"
    run_benchmark(["resident", "model=tiny", "weights=float", "answer_tokens=6", f"out={out}"])
    found = json.loads(out.read_text())["pages"]
    assert list(found) == ["dense", "threshold, 12 may be pending", "threshold, 64 may be pending"]
    assert all(0 < one["touched"] < one["resident"] for one in found.values())
