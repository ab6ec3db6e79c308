"""Memory that is given back: pages of mapped files, and freed memory that the C library keeps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deliberate.utils.resident import release_file_pages, trim_heap

MEGABYTE = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident(path: Path) -> int:
    """Bytes of a file that are in this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.fixture
def mapped(tmp_path):
    """Tensors of 4 MB in a mapped file, all read once, and the file."""
    path = tmp_path / "weights.safetensors"
    save_file({name: torch.arange(MEGABYTE // 2, dtype=torch.float32) for name in "ab"}, path)
    tensors = load_file(path)
    assert sum(int(one.sum()) for one in tensors.values())
    return tensors, path


@linux
def test_pages_of_a_mapped_file_are_given_back_and_read_anew(mapped) -> None:
    tensors, path = mapped
    before = resident(path)
    assert before >= 4 * MEGABYTE
    release_file_pages(tensors.values())
    if resident(path) == before:
        pytest.skip("this kernel keeps the pages of such files")
    assert resident(path) <= MEGABYTE // 4
    for one in tensors.values():
        assert one.equal(torch.arange(MEGABYTE // 2, dtype=torch.float32))


def test_what_was_written_to_a_mapped_file_stays(mapped) -> None:
    tensors, path = mapped
    tensors["a"][1000:300_000] = 7.0
    own = torch.ones(MEGABYTE)
    release_file_pages([*tensors.values(), own])
    assert tensors["a"][1000:300_000].eq(7.0).all() and own.eq(1.0).all()
    assert load_file(path)["a"][1000] == 1000.0


def test_nothing_is_done_for_no_tensors_and_trimming_changes_none(mapped) -> None:
    tensors, _ = mapped
    release_file_pages([])
    trim_heap()
    assert tensors["b"][-1] == MEGABYTE // 2 - 1
