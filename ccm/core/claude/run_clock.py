"""The clock that a run's time limit goes by."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class RunClock:
    """Runs from when it is made until its time is used up, and stands still while it is paused.

    Made in any thread; then used in the run's own loop only.

    Args:
        seconds: the time that there is; infinite for no limit.
    """

    def __init__(self, seconds: float) -> None:
        # As it was when the clock last began to run.
        self._left = seconds
        self._since = time.monotonic()
        self._pauses = 0
        self._resumed = asyncio.Event()

    @property
    def left(self) -> float:
        """Seconds that are left; below 0 once they are used up."""
        return self._left if self._pauses else self._left - (time.monotonic() - self._since)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within does not count. Pauses may overlap; the clock goes on when the last has ended."""
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
            with suppress(TimeoutError):
                async with asyncio.timeout(None if self._pauses else self.left):
                    await self._resumed.wait()
