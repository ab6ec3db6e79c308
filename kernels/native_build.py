"""Compiles the C++ kernels for this machine's processor, once, and loads them.

The sources lie beside this file in ``cpp/``. The library is kept in the cache folder under a hash
of the sources, the compiler and the processor's features, so an update or another machine that
shares the folder compiles its own. Nothing is compiled before it is asked for; it takes seconds.

Beside the library lies the SHA-256 of its bytes. A file that is not those bytes (a copy that was
cut short, a full disk, another program's) is never loaded but compiled anew: a truncated library
would end the process with SIGBUS. Of several processes that find none, one compiles and the
others wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from deliberate.kernels.native_arguments import STRUCTURES
from deliberate.utils.folders import cache_folder

SOURCES = Path(__file__).parent / "cpp"
# Products and sums are joined into one rounding where the sources say so and nowhere else: a
# compiler decides it anew for every copy of a loop, and results would depend on the copy.
FLAGS = (
    *("-std=gnu++17", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=off"),
    *("-fPIC", "-pthread"),
)
# What to do without: some compilers have no -march=native.
WITHOUT = ((), ("-march=native",))
TURNED_OFF = "DELIBERATE_NATIVE"
# Names a sanitizer of the compiler ("address") to build with, for checks of what the kernels read.
SANITIZE = "DELIBERATE_SANITIZE"
_SECONDS = 300
_LOCK = threading.RLock()
_LOADED: list[ctypes.CDLL] = []
# Compilations that failed in this process: they are not tried again at every model.
_FAILED: dict[Path, str] = {}


class NativeBuildError(RuntimeError):
    """The C++ kernels cannot be had here; the message says why in one line."""


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, else the first that is found."""
    named = os.environ.get("CXX")
    names = [named] if named else ["g++", "clang++", "c++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def load() -> ctypes.CDLL:
    """The compiled kernels; compiles them if this machine never did, or if the file is damaged.

    Raises:
        NativeBuildError: no compiler, a failed compilation, or turned off.
    """
    if not _LOADED:
        with _LOCK:
            if not _LOADED:
                _LOADED.append(_load())
    return _LOADED[0]


def forget() -> None:
    """Makes the next `load` search anew; for tests that change what it finds."""
    with _LOCK:
        _LOADED.clear()
        _FAILED.clear()


def _load() -> ctypes.CDLL:
    if os.environ.get(TURNED_OFF, "1") == "0":
        raise NativeBuildError(f"{TURNED_OFF}=0 is set")
    if sys.platform == "win32":
        raise NativeBuildError("the C++ kernels are not built on Windows")
    found = compiler()
    if found is None:
        named = os.environ.get("CXX") or "g++, clang++, c++"
        raise NativeBuildError(f"no C++ compiler is found ({named})")
    path = cache_folder() / "native" / f"{_digest(found)}.so"
    if path in _FAILED:
        raise NativeBuildError(_FAILED[path])
    if not _intact(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(path.parent):
                if not _intact(path):  # another process may have compiled it meanwhile
                    begun = time.perf_counter()
                    _compile(found, path)
                    _tell(time.perf_counter() - begun, path)
        except (OSError, NativeBuildError) as error:
            _FAILED[path] = f"compilation failed: {_line(error)}"
            logging.getLogger("deliberate").warning(
                "the C++ kernels cannot be compiled here, so models run slower without them: %s",
                _FAILED[path],
            )
            raise NativeBuildError(_FAILED[path]) from None
    try:
        library = ctypes.CDLL(str(path))
        _check_sizes(library)
    except (OSError, AttributeError) as error:
        raise NativeBuildError(f"{path} cannot be loaded: {error}") from None
    return library


def _tell(seconds: float, path: Path) -> None:
    """Says once where the first answer's seconds went. A warning, which Python shows on stderr also
    where nobody has set up logging."""
    logging.getLogger("deliberate").warning(
        "compiled the C++ kernels for this processor in %.1f s; kept at %s", seconds, path
    )


def _intact(path: Path) -> bool:
    """Whether the library is there and has the bytes that were compiled."""
    try:
        return _sum_file(path).read_text().strip() == hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return False


def _sum_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a folder's lock among processes; it is released also where this one is killed."""
    import fcntl

    opened = os.open(folder, os.O_RDONLY)
    try:
        # Where a file system has no locks, two may compile; each moves a whole file into place.
        with contextlib.suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _check_sizes(library: ctypes.CDLL) -> None:
    """Raises `NativeBuildError` unless the library's structures are as long as ours."""
    theirs = (ctypes.c_int64 * len(STRUCTURES))()
    library.deliberate_sizes.restype = None
    library.deliberate_sizes.argtypes = (ctypes.c_void_p,)
    library.deliberate_sizes(theirs)
    ours = [ctypes.sizeof(one) for one in STRUCTURES]
    if theirs[:] != ours:
        raise NativeBuildError(f"its structures have {theirs[:]} bytes where {ours} are expected")


def _flags() -> tuple[str, ...]:
    sanitizer = os.environ.get(SANITIZE)
    return FLAGS if not sanitizer else (*FLAGS, f"-fsanitize={sanitizer}", "-g", "-O1")


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
    facts.update(" ".join(_flags()).encode() + _version(found) + _features())
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
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        folder = Path(name)
        made = folder / "library.so"
        problem = ""
        for left_out in WITHOUT:
            flags = [flag for flag in _flags() if flag not in left_out]
            failed = _objects(found, flags, folder) or _run(
                [found, *flags, "-shared", "-o", str(made), *map(str, sorted(folder.glob("*.o")))]
            )
            if not failed:
                told = folder / "sum"
                told.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
                made.replace(path)
                told.replace(_sum_file(path))
                return
            problem = problem or failed
        raise NativeBuildError(problem)


def _objects(found: str, flags: list[str], folder: Path) -> str:
    """Compiles every source, as many at a time as there are cores; the first problem, or ""."""
    commands = [
        [found, *flags, "-c", "-o", str(folder / f"{source.stem}.o"), str(source)]
        for source in sorted(SOURCES.glob("*.cpp"))
    ]
    with ThreadPoolExecutor(max(1, min(len(commands), os.cpu_count() or 1))) as pool:
        return next(filter(None, pool.map(_run, commands)), "")


def _run(command: list[str]) -> str:
    """Runs a compiler; its first error in one line, or "".

    Raises:
        NativeBuildError: it took too long, as on a busy machine. Flags are not to blame: without
            ``-march=native`` a library for older processors would be kept for good.
    """
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise NativeBuildError(f"{command[0]} took more than {_SECONDS} seconds") from None
    except subprocess.SubprocessError as error:
        return _line(error)
    return _line(run.stderr) if run.returncode else ""


def _line(error: object) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "error" in line), lines[0])[:200]
