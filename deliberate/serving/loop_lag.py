"""How late an event loop runs what is due."""

from __future__ import annotations

import asyncio
import time

# Seconds between two looks.
_PERIOD = 0.02


class LoopLag:
    """Watches one event loop.

    A request that waits in its socket while the loop is busy has no time stamp yet: what the loop
    is late is how much earlier than its stamp a request may have come.

    Attributes:
        seconds: by which it was late at the last look, or is now.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    async def watch(self) -> None:
        """Looks until it is cancelled."""
        while True:
            due = time.perf_counter() + _PERIOD
            await asyncio.sleep(_PERIOD)
            self.seconds = max(0.0, time.perf_counter() - due)
