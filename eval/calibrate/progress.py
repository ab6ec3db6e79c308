"""Progress of the stages of a calibration: a bar with the time left, and a line at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

# A stage that took less is not mentioned.
_WORTH_A_LINE = 3.0


class Bar:
    """What a stage tells of its progress.

    Args:
        bar: what shows it.
    """

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def done(self, units: int) -> None:
        """So many more units are done."""
        self._bar.update(units)


@contextmanager
def stage(title: str, total: int, shown: bool) -> Iterator[Bar]:
    """A bar on standard error while a stage runs, and how long it took where it took seconds.

    Where standard error is no terminal there is no bar, but the line after the stage.

    Args:
        total: units of the stage.
        shown: False for neither.
    """
    began = time.monotonic()
    with tqdm(total=total, desc=title, disable=None if shown else True, leave=False) as bar:
        yield Bar(bar)
    seconds = time.monotonic() - began
    if shown and seconds >= _WORTH_A_LINE:
        print(f"{title}: {seconds:.0f} s", file=sys.stderr, flush=True)
