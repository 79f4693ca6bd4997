"""Tells whoever waits on a run or a session that something new about it has been committed.

A ring carries no data: who hears it reads the database, so what is replayed and what is live cannot disagree.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# The key of what happens to any run.
EVENTS = "events"
# The key of what is asked and answered in any run.
APPROVALS = "approvals"


class Notifier:
    """Rings by key; a key is the id of a run or of a session, or one of those above."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[str, set[threading.Event]] = {}
        self.closed = False

    @contextmanager
    def subscribe(self, key: str) -> Iterator[threading.Event]:
        """An event that each ring sets. Clear it, then read, then wait: a ring in between is never missed."""
        event = threading.Event()
        with self._lock:
            self._listeners.setdefault(key, set()).add(event)
        try:
            yield event
        finally:
            with self._lock:
                listeners = self._listeners[key]
                listeners.discard(event)
                if not listeners:
                    del self._listeners[key]

    def close(self) -> None:
        """Wake everyone: no news will come any more."""
        with self._lock:
            self.closed = True
            for listeners in self._listeners.values():
                for event in listeners:
                    event.set()

    def notify(self, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                for event in self._listeners.get(key, ()):
                    event.set()
