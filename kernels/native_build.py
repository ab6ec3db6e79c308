"""Compiles the C++ kernels for this machine's processor, once, and loads them.

The sources lie beside this file in ``cpp/``. The library is kept in the cache folder under a hash
of the sources, the compiler and the processor's features, so an update or another machine that
shares the folder compiles its own. Nothing is compiled before it is asked for; it takes seconds.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch  # before the library: both must use the OpenMP runtime that torch brings

from deliberate.folders import cache_folder

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared")
# What to do without: some compilers have no OpenMP (then one thread), some no -march=native.
WITHOUT = ((), ("-fopenmp",), ("-fopenmp", "-march=native"))
TURNED_OFF = "DELIBERATE_NATIVE"
_SECONDS = 300


class NativeBuildError(RuntimeError):
    """The C++ kernels cannot be had here; the message says why in one line."""


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, else the first that is found."""
    named = os.environ.get("CXX")
    names = [named] if named else ["g++", "clang++", "c++"]
    return next((found for name in names if (found := shutil.which(name))), None)


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled kernels; compiles them if this machine never did.

    Raises:
        NativeBuildError: no compiler, a failed compilation, or turned off.
    """
    if os.environ.get(TURNED_OFF, "1") == "0":
        raise NativeBuildError(f"{TURNED_OFF}=0 is set")
    if sys.platform == "win32":
        raise NativeBuildError("the C++ kernels are not built on Windows")
    found = compiler()
    if found is None:
        named = os.environ.get("CXX") or "g++, clang++, c++"
        raise NativeBuildError(f"no C++ compiler is found ({named})")
    path = cache_folder() / "native" / f"{_digest(found)}.so"
    if not path.is_file():
        _compile(found, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeBuildError(f"{path} cannot be loaded: {error}") from None


def unavailable() -> str | None:
    """Why `load` fails here, or None; compiles if that was not done yet."""
    try:
        load()
    except NativeBuildError as error:
        return str(error)
    return None


def _digest(found: str) -> str:
    facts = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        facts.update(source.name.encode() + b"\0" + source.read_bytes())
    facts.update(" ".join(FLAGS).encode() + _version(found) + _features())
    facts.update(torch.__version__.encode())
    return facts.hexdigest()[:32]


def _version(found: str) -> bytes:
    try:
        return subprocess.run(
            [found, "--version"], capture_output=True, timeout=_SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeBuildError(f"the compiler {found} does not run: {_line(error)}") from None


def _features() -> bytes:
    """What code for "this machine" may use."""
    try:
        for line in Path("/proc/cpuinfo").read_bytes().splitlines():
            if line.startswith((b"flags", b"Features")):
                return line
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}".encode()


def _compile(found: str, path: Path) -> None:
    """Writes the library beside its place and moves it there, so that no half file is loaded."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / "library.so"
            sources = [str(source) for source in sorted(SOURCES.glob("*.cpp"))]
            problem = ""
            for left_out in WITHOUT:
                flags = [flag for flag in (*FLAGS, "-fopenmp") if flag not in left_out]
                run = subprocess.run(
                    [found, *flags, "-o", str(made), *sources],
                    capture_output=True,
                    text=True,
                    timeout=_SECONDS,
                    check=False,
                )
                if run.returncode == 0:
                    made.replace(path)
                    return
                problem = problem or _line(run.stderr)
            raise NativeBuildError(f"compilation failed: {problem}")
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeBuildError(f"compilation failed: {_line(error)}") from None


def _line(error: object) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "error" in line), lines[0])[:200]
