"""The rooms of the house: imports point one way, modules stay small, the docs list the same
rooms."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Import name of the room -> its folder; each may import only from itself and those before it.
ROOMS = {
    "utils": "deliberate/utils",
    "config": "deliberate/config.py",
    "trace": "deliberate/trace.py",
    "kernels": "kernels",
    "cache": "deliberate/cache",
    "modeling": "deliberate/modeling",
    "executors": "deliberate/executors",
    "engine": "deliberate/engine",
    "cost": "deliberate/cost",
    "calibration": "deliberate/calibration",
    "policies": "deliberate/policies",
    "reasoning": "deliberate/reasoning",
    "data": "deliberate/data",
    "api": "deliberate/api",
    "kernels.tools": "kernels/tools",
    "train": "train",
    "export": "deliberate/export",
    "eval": "eval",
    "lifecycle": "deliberate/lifecycle",
    "serving": "deliberate/serving",
    "cli": "deliberate/cli",
}
# Data, and the package's own face with the check that it is installed: they belong to no room.
NO_ROOM = {"deliberate", "configs", "checkpoints", "installation"}
MOST_LINES = 400


def modules() -> dict[str, Path]:
    """Import name without the leading ``deliberate.`` -> file, of everything in the wheel."""
    found = {}
    for base, prefix in (
        ("deliberate", ""),
        ("kernels", "kernels"),
        ("train", "train"),
        ("eval", "eval"),
        ("configs", "configs"),
    ):
        for path in sorted((ROOT / base).rglob("*.py")):
            parts = [prefix, *path.relative_to(ROOT / base).with_suffix("").parts]
            name = ".".join(part for part in parts if part and part != "__init__")
            found[name or "deliberate"] = path
    return found


def room(module: str) -> str | None:
    if module.startswith("kernels.tools"):
        return "kernels.tools"
    top = module.split(".")[0]
    assert top in ROOMS or top in NO_ROOM, f"{module} is in no room: {', '.join(ROOMS)}"
    return top if top in ROOMS else None


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Every module of ours that a file imports: lazily and for types only, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room they enter"
            for one in node.names:
                whole = f"{node.module}.{one.name}"
                own = whole.removeprefix("deliberate.") in known
                found.add(whole if own else str(node.module))
    ours = {
        name.removeprefix("deliberate.") for name in found if name.split(".")[0] == "deliberate"
    }
    return ours & known.keys()


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def test_every_import_points_to_the_same_room_or_one_below(graph):
    order = list(ROOMS)
    upward = [
        f"{module} ({room(module)}) imports {target} ({room(target)})"
        for module, targets in graph.items()
        for target in sorted(targets)
        if room(module) and room(target)
        if order.index(str(room(target))) > order.index(str(room(module)))
    ]
    assert not upward


def test_evaluation_imports_nothing_of_training(graph):
    found = {
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in targets
        if room(module) == "eval" and room(target) == "train"
    }
    assert not found


def test_no_import_goes_round(graph):
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            pytest.fail("a cycle: " + " -> ".join((*path[path.index(module) :], module)))
        if module in done:
            return
        for target in sorted(graph[module] - {"deliberate"}):
            follow(target, (*path, module))
        done.add(module)

    for module in sorted(graph):
        follow(module, ())


def test_the_check_sees_lazy_and_type_only_imports(tmp_path):
    path = tmp_path / "one.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from deliberate.api.model import AdaptiveModel\n"
        "def run():\n    from deliberate.eval import statistics\n"
    )
    assert imports(path, modules()) == {"api.model", "eval.statistics"}


def test_modules_stay_under_the_limit_of_lines():
    long = {
        name: count
        for name, path in modules().items()
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert not long


def test_the_concepts_page_lists_the_rooms_in_their_order():
    page = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    table = page.split("## Rooms", 1)[1].split("\n## ", 1)[0]
    assert re.findall(r"^\| `([\w.]+)` \|", table, re.M) == list(ROOMS)
