"""A file in parts that fit where only so many bytes travel at a time, and whole again.

``python -m deliberate.kernels.tools.parts split FILE FOLDER [--megabytes 34]`` writes
``FILE.part0``, ``FILE.part1``, ... and ``FILE.parts.json`` with sizes and SHA-256 of each and of
the whole; ``... join FOLDER FILE`` checks them and puts the file together.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from deliberate.utils.command_errors import one_line_errors
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import atomic_file, write_text
from deliberate.utils.json_files import read_json


def split(path: Path, folder: Path, size: int) -> list[Path]:
    """Writes a file's parts of at most `size` bytes and their description; the parts.

    Raises:
        DeliberateError: a size below 1, or a file that cannot be read.
    """
    if size < 1:
        raise DeliberateError(f"parts of {size} bytes: give at least 1")
    if not path.is_file():
        raise DeliberateError(f"{path} is missing: there is nothing to split")
    folder.mkdir(parents=True, exist_ok=True)
    whole = hashlib.sha256()
    made: list[Path] = []
    rows: list[dict[str, str]] = []
    with path.open("rb") as file:
        while (data := file.read(size)) or not made:
            part = folder / f"{path.name}.part{len(made)}"
            part.write_bytes(data)
            whole.update(data)
            rows.append({"name": part.name, "sha256": hashlib.sha256(data).hexdigest()})
            made.append(part)
    described = {"name": path.name, "sha256": whole.hexdigest(), "parts": rows}
    write_text(folder / f"{path.name}.parts.json", json.dumps(described, indent=1) + "\n")
    return made


def join(folder: Path, path: Path) -> None:
    """Puts a file together from the parts in `folder`; whole or not at all.

    Raises:
        DeliberateError: no or several descriptions, a part that is missing or not as it was.
    """
    found = sorted(folder.glob("*.parts.json"))
    if len(found) != 1:
        raise DeliberateError(f"{folder} has {len(found)} files *.parts.json: one is needed")
    described = read_json(found[0])
    with atomic_file(path) as partial, partial.open("wb") as file:
        for row in described["parts"]:
            part = folder / row["name"]
            if not part.is_file():
                raise DeliberateError(f"{part} is missing: bring it, and join again")
            data = part.read_bytes()
            if hashlib.sha256(data).hexdigest() != row["sha256"]:
                raise DeliberateError(f"{part} is not as it was split: bring it again")
            file.write(data)


def main(given: Sequence[str] | None = None) -> int:
    """Splits or joins."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("split", "join"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--megabytes", type=float, default=34, help="of a part at most, 10^6 bytes")
    arguments = parser.parse_args(given)
    if arguments.what == "join":
        join(arguments.source, arguments.target)
        print(arguments.target)
    else:
        for part in split(arguments.source, arguments.target, int(arguments.megabytes * 1e6)):
            print(part)
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
