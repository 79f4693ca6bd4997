"""The clock for a run's time limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ccm.core.claude.run_events import first


class RunClock:
    """A countdown that starts when it is created and can be paused.

    Created in any thread, then used in the run's own loop only.

    Args:
        seconds: the time limit; infinite for none.
    """

    def __init__(self, seconds: float) -> None:
        # The remaining time when the clock last began to run.
        self._left = seconds
        self._since = time.monotonic()
        self._pauses = 0
        self._resumed = asyncio.Event()

    @property
    def left(self) -> float:
        """The remaining time (seconds), negative after the limit."""
        return self._left if self._pauses else self._left - (time.monotonic() - self._since)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the clock within the context. Pauses may overlap; the clock runs again after the last one."""
        self._left = self.left
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            self._since = time.monotonic()
            self._resumed.set()

    async def run_out(self) -> None:
        """Return when the time is used up."""
        while self.left > 0:
            self._resumed.clear()
            await first(self._resumed, within=None if self._pauses else self.left)
