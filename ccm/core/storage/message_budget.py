"""The byte budget of the messages that wait to be written, and the runs that wait for room in it."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from contextlib import suppress

from ccm.core.storage.run_loop import result_of

# How often a run that waits for room checks by itself (seconds).
ROOM_INTERVAL = 1.0


class MessageBudget:
    """Bounds the memory that queued messages take.

    A run that finds the budget spent waits in its own event loop. Its SDK then stops reading, the pipe fills and the
    agent waits. The loop itself never blocks, because a blocked loop could not handle a cancel.

    Args:
        limit: bytes of messages that may wait to be written.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._charged = 0
        self._waiters: set[Future[None]] = set()

    async def charge(self, size: int) -> None:
        """Charge the bytes of a message, waiting in the caller's event loop until there is room."""
        room: Future[None] = Future()
        while not self.try_charge(size, room):
            # The wait is bounded: if a fault prevents the wake-up, the run would otherwise wait forever.
            with suppress(TimeoutError):
                async with asyncio.timeout(ROOM_INTERVAL):
                    await result_of(room)
                    room = Future()

    def try_charge(self, size: int, room: Future[None] | None = None) -> bool:
        """Charge the bytes of a message if they fit. Otherwise return False; `release` then completes `room`."""
        with self._lock:
            # One message always fits. Otherwise a message larger than the budget would wait forever.
            if self._charged and self._charged + size > self._limit:
                if room is not None:
                    self._waiters.add(room)
                return False
            self._charged += size
            return True

    def release(self, size: int) -> None:
        """Return bytes to the budget and wake the runs that wait for room."""
        with self._lock:
            self._charged -= size
            for room in self._waiters:
                if not room.done():  # completed before, if its run was about to look again
                    room.set_result(None)
            self._waiters = set()
