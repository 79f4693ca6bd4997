"""The byte budget of the messages that wait to be written, and the runs that wait for room in it."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import suppress

log = logging.getLogger(__name__)

# How often a run that waits for room checks by itself (seconds).
ROOM_INTERVAL = 1.0

Waiter = tuple[asyncio.AbstractEventLoop, asyncio.Event]


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
        self._waiters: set[Waiter] = set()

    async def charge(self, size: int) -> None:
        """Charge the bytes of a message, waiting in the caller's event loop until there is room."""
        room = asyncio.Event()
        waiter = asyncio.get_running_loop(), room
        try:
            while not self.try_charge(size, waiter):
                # The wait is bounded: if a fault prevents the wake-up, the run would otherwise wait forever.
                with suppress(TimeoutError):
                    async with asyncio.timeout(ROOM_INTERVAL):
                        await room.wait()
                room.clear()
        finally:
            with self._lock:
                self._waiters.discard(waiter)

    def try_charge(self, size: int, waiter: Waiter | None = None) -> bool:
        """Charge the bytes of a message if they fit. Otherwise return False; `release` then wakes the waiter."""
        with self._lock:
            # One message always fits. Otherwise a message larger than the budget would wait forever.
            if self._charged and self._charged + size > self._limit:
                if waiter is not None:
                    self._waiters.add(waiter)
                return False
            self._charged += size
            return True

    def release(self, size: int) -> None:
        """Return bytes to the budget and wake the runs that wait for room."""
        with self._lock:
            self._charged -= size
            waiters, self._waiters = self._waiters, set()
        for loop, room in waiters:
            try:
                loop.call_soon_threadsafe(room.set)
            except Exception as error:
                log.debug("cannot wake a run that waits for room, most likely because it has ended: %s", error)
