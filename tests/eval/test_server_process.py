"""A server's process in a benchmark: which line of its output says where it listens."""

from __future__ import annotations

import os
import time

from deliberate.eval.benchmarks.server_process import _line_with_address


def address(text: str, *, close: bool = True, seconds: float = 5.0) -> str | None:
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    if close:
        os.close(writing)
    with open(reading, "rb", buffering=0) as output:
        found = _line_with_address(output, time.monotonic() + seconds)
    if not close:
        os.close(writing)
    return found


def test_lines_of_others_before_the_address_are_passed_over() -> None:
    text = "(raylet) a task failed\n\nserving tiny on http://127.0.0.1:5\nmore\n"
    assert address(text) == "serving tiny on http://127.0.0.1:5\n"


def test_an_output_that_ends_or_a_time_that_is_over_is_no_address() -> None:
    assert address("nothing\n") is None
    assert address("nothing\n", close=False, seconds=0.1) is None
