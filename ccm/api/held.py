"""Requests that are held open: each keeps a thread of the server, so there are only so many places."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class HeldSlots:
    """The places. Beside them the server has threads enough that a plain request always gets through."""

    def __init__(self, places: int) -> None:
        self._places = threading.Semaphore(places)

    @contextmanager
    def one(self) -> Iterator[bool]:
        """A place for as long as the block lasts; False if none is free."""
        taken = self._places.acquire(blocking=False)
        try:
            yield taken
        finally:
            if taken:
                self._places.release()
