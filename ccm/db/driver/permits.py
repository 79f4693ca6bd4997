"""Permits to use a connection of a pool, first come, first served.

SQLAlchemy's own pool lets a new thread overtake the waiting ones, and refuses those after a fixed time even if
connections were returned meanwhile. Under load, some would be refused although the database works.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from ccm.errors import DatabaseClosed, StorageDown


class Permits:
    """One permit for each connection of a pool.

    Args:
        count: the number of permits.
        patience: how long a thread waits while no answered transaction returns a permit (seconds).
    """

    def __init__(self, count: int, patience: float) -> None:
        self._count = self._free = count
        self._patience = patience
        self._changed = threading.Condition()
        # One event for each waiting thread, in the order of arrival.
        self._waiting: deque[threading.Event] = deque()
        self._last_answer = 0.0
        self.closed = False

    def take(self) -> None:
        """Take a permit, after all threads that came earlier. `release` must follow.

        Raises:
            DatabaseClosed: the pool is closed.
            StorageDown: no transaction was answered for `patience` seconds.
        """
        with self._changed:
            if self._free and not self.closed:
                self._free -= 1
                return
            turn = threading.Event()
            self._waiting.append(turn)
            started = time.monotonic()
        while True:
            with self._changed:
                if turn not in self._waiting:
                    return  # `release` has handed a permit to this thread
                remaining = max(started, self._last_answer) + self._patience - time.monotonic()
                if self.closed or remaining <= 0:
                    self._waiting.remove(turn)
                    if self.closed:
                        raise DatabaseClosed("the database is being closed")
                    raise StorageDown("all connections are in use", "all connections to the database are in use")
            turn.wait(remaining)

    def release(self, *, answered: bool) -> None:
        """Return a permit, or hand it to the thread that has waited longest.

        Args:
            answered: whether the database answered the transaction. If not, the database may hang, and the waiting
                threads' patience is not renewed.
        """
        with self._changed:
            if answered:
                self._last_answer = time.monotonic()
            if self._waiting and not self.closed:
                self._waiting.popleft().set()
            else:
                self._free += 1
                self._changed.notify_all()

    def close(self) -> None:
        """Refuse all waiting and later threads. Permits in use must still be released."""
        with self._changed:
            self.closed = True
            for waiting in self._waiting:
                waiting.set()

    def wait_for_all(self, seconds: float) -> int:
        """Wait for all permits to be returned, for `seconds` at most. Return how many are still in use."""
        with self._changed:
            self._changed.wait_for(lambda: self._free == self._count, seconds)
            return self._count - self._free
