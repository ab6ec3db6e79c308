"""Recorded chains on disk: what is written is read, and foreign files need little."""

from __future__ import annotations

import json

import pytest
from synthetic_chains import synthetic_chains

from deliberate.reasoning.recorded_chains import (
    ChainCosts,
    ChainSet,
    ProbePlaces,
    RecordedChain,
    RecordedProbe,
    RecordingHeader,
)
from deliberate.utils.errors import DeliberateError


def test_what_is_written_is_read(tmp_path):
    header = RecordingHeader(
        model="m",
        weights="a",
        conditions={"task": "chains"},
        places=ProbePlaces(chunk=8),
        costs=ChainCosts(1e-3, 5e-3),
    )
    written = ChainSet(header, tuple(synthetic_chains(3)))
    written.save(tmp_path / "chains.jsonl")
    read = ChainSet.load(tmp_path / "chains.jsonl")
    assert read == written and read.sha256 == written.sha256


def test_a_foreign_file_has_text_alone_and_takes_a_tokenizer(tmp_path):
    line = {"id": "a", "reasoning": "one two", "answer": "2", "probes": [{"at": 1, "answer": "1"}]}
    path = tmp_path / "theirs.jsonl"
    path.write_text(json.dumps(line) + "\n")
    read = ChainSet.load(path, encode=lambda text: [len(word) for word in text.split()])
    assert read.chains[0].tokens == (3, 3) and read.costs == ChainCosts(1.0)
    with pytest.raises(DeliberateError, match="line 1: the chain has text and no token ids"):
        ChainSet.load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"probes": [{"at": 3, "answer": ""}, {"at": 2, "answer": ""}]}, "must be in order"),
        ({"probes": [{"at": 9, "answer": ""}]}, "a probe at token 9 of 4"),
        ({"probes": [{"at": 1, "answer": "", "confidence": 1.5}]}, "confidence=1.5"),
        ({"answered": "7"}, "unknown key"),
        ({"answer": None}, "expected str"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, change, words):
    path = tmp_path / "chains.jsonl"
    path.write_text(json.dumps({"id": "a", "answer": "7", "tokens": [1, 2, 3, 4]} | change) + "\n")
    with pytest.raises(DeliberateError, match=f"line 1.*{words}"):
        ChainSet.load(path)


def test_files_without_chains_and_of_other_formats_are_refused(tmp_path):
    path = tmp_path / "chains.jsonl"
    path.write_text("\n")
    with pytest.raises(DeliberateError, match="no chains"):
        ChainSet.load(path)
    path.write_text('{"format": "deliberate chains 9"}\n')
    with pytest.raises(DeliberateError, match="deliberate chains 9"):
        ChainSet.load(path)


def test_the_newest_probe_before_a_place_answers_where_it_may():
    chain = RecordedChain(
        "a", "7", tokens=(1,) * 9, probes=(RecordedProbe(2, "5"), RecordedProbe(4, "7"))
    )
    assert chain.probe_at(3) is None
    assert chain.probe_at(3, exact=False) == chain.probes[0]
    assert chain.probe_at(1, exact=False) is None
    assert chain.probe_at(4) == chain.probes[1]
