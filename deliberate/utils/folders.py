"""The cache folder, and checks that a result can be written before it is computed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from deliberate.utils.errors import DeliberateError

CACHE_VARIABLE = "DELIBERATE_CACHE"


def cache_folder() -> Path:
    """``$DELIBERATE_CACHE``, else ``deliberate`` in the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(home) if home else Path.home() / ".cache") / "deliberate"


def output_folder(name: Any, setting: str = "out") -> Path:
    """The folder to write to, not yet made, if it can be made and written to.

    Called before anything is measured, so that no result is lost for lack of a place to write.

    Raises:
        DeliberateError: a file is in the way, or the place cannot be written to.
    """
    folder = _path(name, setting)
    _require_writable(folder, setting, folder)
    return folder


def output_file(name: Any, setting: str = "out") -> Path:
    """The file to write, if it can be written; as `output_folder`.

    Raises:
        DeliberateError: it is a folder, or its folder cannot be made or written to.
    """
    path = _path(name, setting)
    if path.is_dir():
        raise DeliberateError(f"{setting}={path} is a folder: name the file to write")
    _require_writable(path.parent, setting, path)
    return path


def _path(name: Any, setting: str) -> Path:
    if name is None or not str(name).strip():
        raise DeliberateError(f"{setting} has no value: give {setting}=...")
    return Path(str(name)).expanduser()


def _require_writable(folder: Path, setting: str, path: Path) -> None:
    try:
        nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not nearest.is_dir():
            raise DeliberateError(f"{setting}={path}: {nearest} is a file, a folder is needed")
        # Permission bits do not show read-only file systems, and do not bind root.
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DeliberateError(
            f"{setting}={path} cannot be written ({reason}): give another place with {setting}=..."
        ) from None
