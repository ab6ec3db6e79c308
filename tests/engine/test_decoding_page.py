"""docs/decoding.md names what is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "decoding.md"
SECTION = PAGE.read_text(encoding="utf-8").split("## One token's way through the loop")[1]
NAMES = re.findall(r"`((?:api|cache|engine|modeling)\.[\w.]+)`", SECTION.split("\n## ")[0])


@pytest.mark.parametrize("name", NAMES)
def test_every_call_on_a_tokens_way_exists(name):
    parts = name.split(".")
    found = importlib.import_module(f"deliberate.{parts[0]}.{parts[1]}")
    for part in parts[2:]:
        found = getattr(found, part)


def test_the_way_is_listed_from_generate_to_the_output():
    assert NAMES[0] == "api.model.AdaptiveModel.generate"
    assert NAMES[-1] == "api.generate_output.padded" and len(NAMES) > 20
