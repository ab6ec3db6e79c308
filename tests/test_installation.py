"""What the package is called, the other project of that name, and Python inside a clone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from deliberate.installation import DISTRIBUTION, install_extra

ROOT = Path(__file__).parent.parent
PARTS = ("deliberate", "kernels", "configs", "train", "eval", "pyproject.toml")


@pytest.fixture
def clone(tmp_path) -> Path:
    folder = tmp_path / "clone"
    folder.mkdir()
    for part in PARTS:
        (folder / part).symlink_to(ROOT / part)
    return folder


def python(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess:
    """Python as after a plain installation: `-S` leaves out what an editable one adds."""
    packages = [str(path)] if path else []
    packages += [sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(packages)}
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def foreign(folder: Path, name: str = "deliberate", summary: str = "Think before acting") -> Path:
    info = folder / f"{name}-0.1.3.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.3\nSummary: {summary}\n"
    (info / "METADATA").write_text(text)
    return folder


def test_python_inside_a_clone_finds_every_folder_without_an_editable_installation(clone):
    script = (
        "import deliberate.kernels, deliberate.configs, deliberate.train, deliberate.eval;"
        "import deliberate; print(deliberate.eval.__file__)"
    )
    done = python("-c", script, cwd=clone)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(clone / "eval" / "__init__.py")


def test_beside_the_other_project_an_import_says_in_one_line_what_to_do(clone, tmp_path):
    site = foreign(tmp_path / "site")
    done = python("-c", "import deliberate.kernels.registry", cwd=clone, path=site)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and "pip uninstall deliberate" in last and DISTRIBUTION in last


def test_beside_the_other_project_the_command_is_one_line(clone, tmp_path):
    site = foreign(tmp_path / "site")
    command = clone / "deliberate.py"  # by its name, as the command; Python prefers the package
    command.write_text("from deliberate.cli.app import main\nmain()\n")
    done = python(str(command), "env", cwd=clone, path=site)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "another project is installed as 'deliberate' (0.1.3)" in done.stderr


@pytest.mark.parametrize("lost", ["__init__.py"])
def test_the_other_project_is_noticed_where_it_overwrote_our_first_module(tmp_path, lost):
    site = foreign(tmp_path / "site")
    package = site / "deliberate"
    package.mkdir()
    for entry in (ROOT / "deliberate").iterdir():
        if entry.name != lost:
            (package / entry.name).symlink_to(entry)
    (package / lost).write_text("VERSION = '0.1.3'\n")
    done = python("-c", "import deliberate.utils.errors", cwd=tmp_path, path=site)
    assert "pip uninstall deliberate" in done.stderr.strip().splitlines()[-1]


def test_an_earlier_release_of_this_project_under_that_name_is_no_other_project(clone, tmp_path):
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["description"]
    site = foreign(tmp_path / "site", summary=ours)
    done = python("-c", "import deliberate.utils.errors", cwd=clone, path=site)
    assert done.returncode == 0, done.stderr


def test_one_name_to_install_by_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == DISTRIBUTION and "deliberate" in project["scripts"]
    wrong = []
    files = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    for folder in ("deliberate", "kernels", "train", "eval", "configs"):
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml", ".md")]
    for path in files:
        text = path.read_text(encoding="utf-8")
        for extra in re.findall(r"\bdeliberate(?:-depth)?\[(\w+)\]", text):
            if extra not in project["optional-dependencies"]:
                wrong.append(f"{path}: no extra {extra}")
        if re.search(r"\bdeliberate\[|pip install '?deliberate(?!-depth)", text):
            wrong.append(str(path))
    assert not wrong


def test_every_extra_that_an_error_names_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = set()
    for folder in ("deliberate", "kernels", "train", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            named |= set(re.findall(r"install_extra\(['\"](\w+)['\"]\)", path.read_text()))
    assert named and named <= set(extras)
    assert install_extra("lora") == "pip install 'deliberate-depth[lora]'"
