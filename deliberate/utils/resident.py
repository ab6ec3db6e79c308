"""What a process keeps in memory that it does not need there."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

# Of madvise(2): pages are given back now, and nothing that was written to them is lost.
_PAGEOUT = 21


def release_file_pages(tensors: Iterable[Tensor]) -> None:
    """Gives back the pages of tensors that lie in a mapped file; they are read anew where used.

    What was written to such memory stays, and memory of no file is left alone. Without Linux
    nothing is done.
    """
    places = sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in tensors if one.is_cpu)
    if not places or sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        for start, end in _file_mappings():
            inside = [place for place in places if start <= place[0] < end]
            if inside:
                first = inside[0][0] // mmap.PAGESIZE * mmap.PAGESIZE
                last = min(end, max(place[1] for place in inside))
                _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _PAGEOUT)


def trim_heap() -> None:
    """Returns memory that was freed to the operating system, where the C library keeps it (glibc).

    Loading a model frees several times what a pass needs, in pieces that later buffers do not fit.
    """
    with contextlib.suppress(AttributeError, OSError):
        _libc().malloc_trim(ctypes.c_size_t(0))


def _file_mappings() -> Iterable[tuple[int, int]]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        places, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            start, _, end = places.partition("-")
            yield int(start, 16), int(end, 16)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
