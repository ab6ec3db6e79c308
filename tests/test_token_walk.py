"""docs/concepts.md lists the modules that one generation runs through, in the order of first calls.

`python tests/test_token_walk.py` prints the order.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType

import torch
from test_structure import ROOMS, room

from deliberate.api.model import AdaptiveModel

PAGE = Path(__file__).parent.parent / "docs" / "concepts.md"
PROMPT, NEW_TOKENS = [[5, 6, 7, 8] * 5], 12


def modules_called() -> list[str]:
    """Modules in the order in which an exact generation of one prompt first calls them.

    With the bundled model and the executor "generic"; an earlier generation does the lazy imports.
    """
    model = AdaptiveModel.from_pretrained("tiny", executor="generic")
    prompt = torch.tensor(PROMPT)
    model.generate(prompt, max_new_tokens=NEW_TOKENS)
    called: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.startswith("deliberate."):
            called.setdefault(name.removeprefix("deliberate."))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        model.generate(prompt, max_new_tokens=NEW_TOKENS)
    finally:
        sys.setprofile(before)
    return list(called)


def modules_listed() -> list[str]:
    """Modules of the table under the page's "One token's way"."""
    section = PAGE.read_text(encoding="utf-8").split("## One token's way", 1)[1]
    return re.findall(r"^\| `([\w.]+)` \|", section.split("\n## ", 1)[0], re.MULTILINE)


def test_the_page_lists_the_modules_of_a_generation_in_their_order():
    assert modules_listed() == modules_called()


def test_no_call_of_a_generation_turns_back_to_a_room_above_its_callers():
    order = list(ROOMS)
    model = AdaptiveModel.from_pretrained("tiny", executor="generic")
    prompt = torch.tensor(PROMPT)
    model.generate(prompt, max_new_tokens=NEW_TOKENS)
    calls: set[tuple[str, str]] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        caller = frame.f_back
        name = frame.f_globals.get("__name__", "")
        if event != "call" or not name.startswith("deliberate."):
            return
        # transformers' frames between two of ours are passed over: it calls the cache's update.
        while caller and not caller.f_globals.get("__name__", "").startswith("deliberate."):
            caller = caller.f_back
        if caller:
            ours = (caller.f_globals["__name__"], name)
            calls.add((ours[0].removeprefix("deliberate."), ours[1].removeprefix("deliberate.")))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        model.generate(prompt, max_new_tokens=NEW_TOKENS)
    finally:
        sys.setprofile(before)
    between = [(room(one), room(other)) for one, other in calls]
    assert ("api", "engine") in between and ("engine", "cache") in between
    back = [
        f"{one} -> {other}"
        for (one, other), (low, high) in zip(calls, between, strict=True)
        if low and high and order.index(high) > order.index(low)
    ]
    assert not back


if __name__ == "__main__":
    print(*modules_called(), sep="\n")
