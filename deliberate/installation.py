"""The name of the installed package, and checks that its files are its own.

The registry has another project named `deliberate`, whose files have the same places as ours. This
module is imported before anything else, so it imports nothing of the package.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import MutableSequence
from pathlib import Path

DISTRIBUTION = "deliberate-depth"
"""The name to install by; what is imported and the command are `deliberate`."""

_FOREIGN = "deliberate"
# Before it was renamed, this project was installed as `deliberate` too.
_OUR_SUMMARY = "Adaptive-depth inference for causal language models"


def install_extra(extra: str) -> str:
    """The command that installs an optional part, quoted for every shell."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


@functools.cache
def other_project() -> str | None:
    """Version of the other project named `deliberate`, where it is installed beside this one."""
    try:
        found = importlib.metadata.metadata(_FOREIGN)
    except importlib.metadata.PackageNotFoundError:
        return None
    if str(found["Summary"] or "").startswith(_OUR_SUMMARY):
        return None
    return str(found["Version"])


def refuse_other_project() -> None:
    """Ends the command, or raises, where files of the other project may be among ours.

    Raises:
        ImportError: in Python; the message is one line that says what to do.
        SystemExit: in the command `deliberate`, after that line.
    """
    version = other_project()
    if version is None:
        return
    problem = (
        f"another project is installed as {_FOREIGN!r} ({version}) and overwrites files of this "
        f"one, which is {DISTRIBUTION!r}: pip uninstall {_FOREIGN}, then pip install "
        f"--force-reinstall --no-deps {DISTRIBUTION} (or the path of your clone)"
    )
    if Path(sys.argv[0] if sys.argv else "").stem == "deliberate":
        print(problem, file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(problem)


def add_clone_folders(path: MutableSequence[str], file: str) -> None:
    """Makes the folders of a clone importable where Python runs inside it.

    There ./deliberate hides an installed package, and its `kernels`, `configs`, `train` and `eval`
    are beside it, not in it; only an editable installation knows their places.

    Args:
        path: `__path__` of the package.
        file: its `__file__`.
    """
    root = Path(file).absolute().parent.parent
    if not (root / "pyproject.toml").is_file() or not (root / "kernels" / "registry.py").is_file():
        return
    if importlib.util.find_spec("deliberate.kernels") is None:
        path.append(str(root))
