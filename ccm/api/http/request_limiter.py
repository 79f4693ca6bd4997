"""Requests that are held open: each keeps a thread of the server, so there are only so many places."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from ccm.errors import SlotsTaken


class RequestLimiter:
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

    def take(self) -> Callable[[], None]:
        """A place for an answer that goes on after its view. What is returned gives it back, once.

        Raises:
            SlotsTaken: none is free.
        """
        if not self._places.acquire(blocking=False):
            raise SlotsTaken("All places for requests that are held open are taken (CCM_MAX_HELD). Try again later.")
        taken = ExitStack()
        taken.callback(self._places.release)
        return taken.close
