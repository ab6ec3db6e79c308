"""A file in parts, and whole again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deliberate.kernels.tools.parts import join, main, split
from deliberate.utils.errors import DeliberateError


@given(data=st.binary(max_size=200), size=st.integers(1, 64))
def test_parts_put_together_are_the_file(data: bytes, size: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "file").write_bytes(data)
        parts = split(folder / "file", folder / "parts", size)
        assert all(part.stat().st_size <= size for part in parts)
        join(folder / "parts", folder / "again")
        assert (folder / "again").read_bytes() == data


def test_a_part_that_is_missing_or_changed_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    assert main(["split", str(tmp_path / "file"), str(tmp_path / "p"), "--megabytes", "4e-6"]) == 0
    second = tmp_path / "p" / "file.part1"
    second.write_bytes(b"4568")
    with pytest.raises(DeliberateError, match=r"file.part1 is not as it was split"):
        join(tmp_path / "p", tmp_path / "whole")
    second.unlink()
    with pytest.raises(DeliberateError, match=r"file.part1 is missing"):
        join(tmp_path / "p", tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    with pytest.raises(DeliberateError, match=r"0 files \*.parts.json"):
        join(tmp_path, tmp_path / "whole")
