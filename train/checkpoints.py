"""Checkpoints of a run, written atomically, and the newest that is intact.

A checkpoint is written to a staging folder, sealed with a manifest of its files (size and SHA-256
of each), and renamed into place. A checkpoint that a kill, a full disk or a lost file left
incomplete has no manifest or does not match it; it is skipped, and the log names it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError

from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text
from deliberate.utils.json_files import read

MANIFEST_NAME = "manifest.json"
STAGING_NAME = "saving"
"""Folder in the run's folder where a checkpoint is until it is sealed."""
KEPT = 2
"""Intact checkpoints that a run keeps."""
UNFINISHED = f"it has no {MANIFEST_NAME}: it was not saved completely"
_PREFIX = "checkpoint-"
# Errors of the disk, not of one file: full, over quota, read-only or broken.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@dataclass(frozen=True)
class SavedFile:
    """Size and content of one file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Content of ``manifest.json``: the optimizer step, and every file by its path."""

    step: int
    files: dict[str, SavedFile]


def step_of(checkpoint: Path) -> int:
    """The optimizer step in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def all_checkpoints(folder: Path) -> list[Path]:
    """Every checkpoint of a run, intact or not, by ascending step."""
    found = [p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=step_of)


def seal(staged: Path, target: Path) -> None:
    """Writes the manifest of a complete checkpoint and moves it to `target`, replacing that."""
    files = {
        str(path.relative_to(staged)): SavedFile(path.stat().st_size, _digest(path))
        for path in sorted(staged.rglob("*"))
        if path.is_file()
    }
    text = json.dumps(asdict(Manifest(step_of(target), files)), indent=1) + "\n"
    write_text(staged / MANIFEST_NAME, text)
    if target.exists():
        shutil.rmtree(target)
    os.replace(staged, target)


def fault(checkpoint: Path, *, digests: bool = True) -> str | None:
    """Why a checkpoint cannot be used, or None where it is intact.

    Args:
        digests: compare the contents of the files too, not only their sizes.
    """
    path = checkpoint / MANIFEST_NAME
    if not path.is_file():
        return UNFINISHED
    try:
        manifest = read(Manifest, path)
    except DeliberateError as error:
        return str(error)
    for name, saved in manifest.files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != saved.bytes:
            return f"{name} has {file.stat().st_size:,} bytes of {saved.bytes:,}"
        if digests and _digest(file) != saved.sha256:
            return f"{name} is not what was saved (another SHA-256)"
    return None


def newest_intact(folder: Path, *, verbose: bool = False) -> Path | None:
    """The last intact checkpoint of a run, or None where none was completed.

    Args:
        folder: of the run.
        verbose: print a line for each newer one that is skipped.

    Raises:
        DeliberateError: checkpoints were completed, and none of them is intact now.
    """
    faults: dict[str, str] = {}
    for checkpoint in reversed(all_checkpoints(folder)):
        found = fault(checkpoint)
        if found is None:
            return checkpoint
        faults[checkpoint.name] = found
        if verbose:
            print(f"resume: {checkpoint} is skipped: {found}", flush=True)
    damaged = {name: text for name, text in faults.items() if text != UNFINISHED}
    if damaged:
        listed = "; ".join(f"{name}: {text}" for name, text in damaged.items())
        raise DeliberateError(
            f"output_dir={folder} has no intact checkpoint ({listed}): restore the files, or "
            "delete these folders to start anew"
        )
    return None


def remove_old(folder: Path, *, newest: int) -> None:
    """Removes what is older than the last `KEPT` intact checkpoints up to step `newest`."""
    past = [p for p in all_checkpoints(folder) if step_of(p) <= newest]
    intact = [p for p in past if fault(p, digests=False) is None]
    if len(intact) < KEPT:
        return
    for checkpoint in past:
        if step_of(checkpoint) < step_of(intact[-KEPT]):
            shutil.rmtree(checkpoint, ignore_errors=True)


@contextmanager
def writing(folder: Path, what: str) -> Iterator[None]:
    """Turns a failure to write below `folder` into one line that names the last intact checkpoint.

    Raises:
        DeliberateError: in place of a write error; other errors are not caught.
    """
    try:
        yield
    except DeliberateError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = write_failure(error, folder)
        if reason is None:
            raise
        raise DeliberateError(f"cannot write {what} in {folder}: {reason}") from None


def write_failure(error: Exception, folder: Path) -> str | None:
    """Why a file could not be written, or None where the error is not of that kind."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        named = Path(os.fsdecode(error.filename or ""))
        whole = folder.absolute()
        below = named.is_absolute() and (whole.is_relative_to(named) or named.is_relative_to(whole))
        below = below or (error.filename is not None and named.is_relative_to(folder))
        if error.errno is None or not (below or error.errno in _DISK):
            return None
        reason = os.strerror(error.errno) + (f" ({named})" if error.filename else "")
    elif isinstance(error, SafetensorError):
        reason = text[:120]
    elif "PytorchStreamWriter" in text or "inline_container" in text:  # of torch.save
        reason = "writing failed"
    else:
        return None
    done = [p for p in all_checkpoints(folder) if fault(p, digests=False) is None]
    rest = f"; {done[-1].name} is intact: resume from it with resume=true" if done else ""
    return reason + rest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
