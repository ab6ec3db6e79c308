"""Garbage collection beside what is timed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

# Python 3.12 itself freezes a few hundred objects.
_FROZEN_AT_START = 10_000


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """No garbage collection in timed regions; frozen objects make that between them cheap.

    What the caller has frozen stays so: there is no telling its objects from those frozen here.
    """
    enabled, frozen = gc.isenabled(), gc.get_freeze_count() > _FROZEN_AT_START
    gc.collect()
    if not frozen:
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()
