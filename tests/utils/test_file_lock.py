"""Locks of files and folders: held once, released with the descriptor, absent without a fault."""

from __future__ import annotations

import errno

import pytest

from deliberate.utils import file_lock
from deliberate.utils.errors import DeliberateError
from deliberate.utils.file_lock import LOCK_NAME, check_unlocked, locked_folder, try_lock


def test_a_file_is_locked_once_until_it_is_closed(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.touch()
    with path.open() as first, path.open() as second:
        assert try_lock(first)
        with pytest.raises(BlockingIOError):
            try_lock(second)
    with path.open() as third:
        assert try_lock(third.fileno())


def test_a_file_system_without_locks_is_told_by_the_result(tmp_path, monkeypatch, capsys):
    def without_locks(*_arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(file_lock.fcntl, "flock", without_locks)
    with (tmp_path / "file").open("w") as file:
        assert not try_lock(file)
    with locked_folder(tmp_path):
        assert "cannot be locked: start no second run in it" in capsys.readouterr().out
    monkeypatch.setattr(file_lock, "fcntl", None)  # Windows
    with locked_folder(tmp_path):
        assert capsys.readouterr().out == ""


def test_a_locked_folder_names_the_process_that_holds_it(tmp_path):
    folder = tmp_path / "run"
    check_unlocked(folder)
    with locked_folder(folder):
        with pytest.raises(DeliberateError, match=r"in use by another run \(process \d+ on "):
            check_unlocked(folder)
        assert (folder / LOCK_NAME).read_text().startswith("process ")
    check_unlocked(folder)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(DeliberateError, match="run is a file: give a folder"), \
            locked_folder(tmp_path / "run"):  # fmt: skip
        pass
