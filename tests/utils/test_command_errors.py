"""Errors of commands: one line and a status, never a traceback, for what a user can mend."""

from __future__ import annotations

import errno

import pytest
from safetensors import SafetensorError

from deliberate.utils.command_errors import MISTAKE, one_line_errors

FULL = "I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "out/results.json"),
        OSError("196608 requested and 8160 written"),
        SafetensorError(f"Error while serializing: {FULL}"),
        Exception("No space left on device (os error 28)"),  # of tokenizers
    ],
)
def test_a_full_disk_is_one_line_that_says_what_to_do(error, capsys) -> None:
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise error
    said = capsys.readouterr().err
    assert ended.value.code == MISTAKE and said.count("\n") == 1
    assert "No space left on device" in said and "free space there" in said


def test_another_error_of_safetensors_is_no_mistake_of_the_user() -> None:
    with pytest.raises(SafetensorError), one_line_errors():
        raise SafetensorError("Error while serializing: a wrong shape")
