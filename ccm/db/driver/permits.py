"""Permits to use a connection of a pool, given first come, first served.

SQLAlchemy's own pool lets a newcomer take a connection that others are waiting for, and refuses those after a fixed
time even if connections were given back meanwhile. Under load some would be refused although the database is well.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from ccm.errors import DatabaseClosed, StorageDown


class Permits:
    """One permit for each connection of a pool.

    Args:
        count: how many there are.
        patience: how long a thread waits while no permit comes back from a transaction that was answered (seconds).
    """

    def __init__(self, count: int, patience: float) -> None:
        self._count = self._free = count
        self._patience = patience
        self._changed = threading.Condition()
        # One event for each thread that waits, in the order of their arrival.
        self._waiting: deque[threading.Event] = deque()
        self._answered = 0.0
        self.closed = False

    def take(self) -> None:
        """Take one, after all threads that came before. `give_back` must follow.

        Raises:
            DatabaseClosed: the pool is closed.
            StorageDown: no transaction was answered while the patience lasted.
        """
        with self._changed:
            if self._free and not self.closed:
                self._free -= 1
                return
            mine = threading.Event()
            self._waiting.append(mine)
            begun = time.monotonic()
        while True:
            with self._changed:
                if mine not in self._waiting:
                    return  # it was handed over by `give_back`
                remaining = max(begun, self._answered) + self._patience - time.monotonic()
                if self.closed or remaining <= 0:
                    self._waiting.remove(mine)
                    if self.closed:
                        raise DatabaseClosed("the database is being closed")
                    raise StorageDown("all connections are in use", "all connections to the database are in use")
            mine.wait(remaining)

    def give_back(self, *, answered: bool) -> None:
        """Hand it to the thread that has waited longest.

        Args:
            answered: whether the transaction was answered. If not, storage may hang, and the patience of those who wait
                goes on running.
        """
        with self._changed:
            if answered:
                self._answered = time.monotonic()
            if self._waiting and not self.closed:
                self._waiting.popleft().set()
            else:
                self._free += 1
                self._changed.notify_all()

    def close(self) -> None:
        """Refuse all that wait and all that come. Permits that are taken must still be given back."""
        with self._changed:
            self.closed = True
            for waiting in self._waiting:
                waiting.set()

    def wait_for_all(self, seconds: float) -> int:
        """Wait until all are back, so long at the most. How many are still taken."""
        with self._changed:
            self._changed.wait_for(lambda: self._free == self._count, seconds)
            return self._count - self._free
