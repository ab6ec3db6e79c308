"""How many drafts of an exported exit transformers and llama.cpp accept, as the command counts."""

from __future__ import annotations

import re

import pytest

from deliberate.export import acceptance
from deliberate.export.draft import export_draft
from deliberate.utils.errors import DeliberateError


@pytest.mark.parametrize("ending", ["", ".gguf"])
def test_most_drafts_are_accepted_and_no_answer_changes(tmp_path, ending, monkeypatch, capsys):
    if ending:
        pytest.importorskip("gguf", reason="the package gguf is not installed")
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    monkeypatch.setattr(acceptance, "PROBLEMS", 3)
    whole, draft = (str(tmp_path / f"{name}{ending}") for name in ("whole", "draft"))
    how = {"dtype": "f32"} if ending else {}
    export_draft("tiny", tmp_path / f"whole{ending}", layer=8, **how)
    export_draft("tiny", tmp_path / f"draft{ending}", **how)
    acceptance.main([whole, draft])
    said = capsys.readouterr().out
    tokens, passes = map(int, re.search(r"(\d+) tokens in (\d+) passes", said).groups())
    assert tokens > 2.5 * passes and "2 of 2 answers as without drafts" in said
    assert said.startswith("llama.cpp" if ending else "transformers")


def test_answers_that_differ_are_an_error(monkeypatch, capsys):
    made = {"plain": [1, 2, 3], "drafted": [1, 2, 4]}

    def load(*_):
        return tuple(lambda _, own=made[name]: (own, 1) for name in ("plain", "drafted"))

    monkeypatch.setattr(acceptance, "by_transformers", load)
    with pytest.raises(DeliberateError, match="11 answers differ from those without"):
        acceptance.main(["whole", "draft"])


@pytest.mark.parametrize("given", [[], ["whole"], ["whole", "draft.gguf"]])
def test_what_is_no_pair_is_refused(given):
    with pytest.raises(DeliberateError, match=r"two folders, or two \.gguf files"):
        acceptance.main(given)
