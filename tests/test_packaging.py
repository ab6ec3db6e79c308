"""What a wheel holds and needs, by pyproject.toml: every package and file of the tree, and every
distribution that the code imports, each pinned in constraints.txt."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = {"deliberate": "deliberate"} | {
    f"deliberate.{name}": name for name in ("kernels", "configs", "train", "eval")
}


def folder_of(package: str) -> Path:
    root = max((name for name in FOLDERS if f"{package}.".startswith(f"{name}.")), key=len)
    return ROOT / FOLDERS[root] / Path(*package.removeprefix(root).strip(".").split("."))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names_of(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[\[<>=;~! ]", text, maxsplit=1)[0]) for text in requirements}


def test_the_wheel_has_every_folder_of_modules():
    found = {
        ".".join((package, *path.parent.relative_to(ROOT / folder).parts))
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(SETUPTOOLS["packages"]) == found
    assert SETUPTOOLS["package-dir"] == FOLDERS


def test_the_wheel_has_every_file_that_is_no_module():
    shipped = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in folder_of(package).glob(pattern)
        if path.is_file()
    }
    files = {
        path
        for folder in FOLDERS.values()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert sorted(map(str, files - shipped)) == []


def imported() -> set[str]:
    """Top-level names of what the modules import, this package and Python's own left out."""
    found: set[str] = set()
    for folder in FOLDERS.values():
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {one.name.partition(".")[0] for one in node.names}
                elif isinstance(node, ast.ImportFrom):
                    found.add(str(node.module).partition(".")[0])
    return found - {"deliberate", "__future__"} - set(sys.stdlib_module_names)


def test_every_distribution_that_is_imported_is_declared_and_pinned():
    # Of what only a bench imports and nobody has to compile for the tests.
    known = {"llama_cpp": ["llama-cpp-python"], **packages_distributions()}
    project = PROJECT["project"]
    extras = [text for group in project["optional-dependencies"].values() for text in group]
    declared = names_of(project["dependencies"]) | names_of(extras)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = names_of([line for line in lines if line and not line.startswith("#")])
    for module in sorted(imported()):
        names = {normal(name) for name in known.get(module, [module])}
        assert names & declared, f"{module} is imported, but {names} is no dependency"
        assert names & pinned, f"{module} is imported, but {names} is not in constraints.txt"


@pytest.mark.parametrize("name", ["pydantic", "typing-extensions"])
def test_what_reads_files_is_no_extra(name):
    assert name in names_of(PROJECT["project"]["dependencies"])
