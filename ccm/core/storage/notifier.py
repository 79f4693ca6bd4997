"""Notifications that something new about a run or a session has been committed.

A notification carries no data: its receivers read the database, so replayed and live data cannot disagree.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

# The key for events of any run.
EVENTS = "events"
# The key for deliveries that may be due.
DELIVERIES = "deliveries"
# The key for approvals of any run.
APPROVALS = "approvals"
# How often a waiting thread checks whether its client is still there (seconds).
POLL_INTERVAL = 0.5
# How long it relies on notifications (seconds): if a fault prevents one, the client would otherwise wait forever.
RELY_INTERVAL = 5.0


def end_of(run_id: str) -> str:
    """Return the key for the end of a run: who waits only for that need not wake for each of its messages."""
    return f"end of {run_id}"


class Notifier:
    """Wakes subscribers by key: the id of a run or a session, or one of the keys above.

    Attributes:
        closed: nothing more will be committed, because the service is stopping.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subscribers: dict[str, set[threading.Event]] = {}
        self.closed = False

    @contextmanager
    def subscribe(self, key: str) -> Iterator[threading.Event]:
        """Yield an event that each notification sets.

        Clear it, then read, then wait: a notification in between is never missed.
        """
        event = threading.Event()
        with self._lock:
            self._subscribers.setdefault(key, set()).add(event)
        try:
            yield event
        finally:
            with self._lock:
                subscribers = self._subscribers[key]
                subscribers.discard(event)
                if not subscribers:
                    del self._subscribers[key]

    def wait(self, key: str, seconds: float, look: Callable[[], T | None], gone: Callable[[], bool]) -> T | None:
        """Call `look` after each notification and return its result as soon as it is not None.

        Args:
            seconds: when to return None instead. Closing the notifier has the same effect.
            gone: returns whether the client has disconnected, which also ends the wait.
        """
        deadline = time.monotonic() + seconds
        with self.subscribe(key) as notified:
            while True:
                notified.clear()
                result = look()
                now = time.monotonic()
                # Never wait for a client that has left: more abandoned requests may be queued behind this one.
                if result is not None or now >= deadline or self.closed or gone():
                    return result
                look_again = min(now + RELY_INTERVAL, deadline)
                while not notified.wait(min(POLL_INTERVAL, look_again - now)):
                    now = time.monotonic()
                    if now >= look_again or gone():
                        break

    def close(self) -> None:
        """Wake all subscribers for the last time."""
        with self._lock:
            self.closed = True
            keys = list(self._subscribers)
        self.notify(keys)

    def notify(self, keys: Iterable[str]) -> None:
        """Wake the subscribers of some keys."""
        with self._lock:
            for key in keys:
                for event in self._subscribers.get(key, ()):
                    event.set()
