"""Limits the requests that are held open: `?wait=`, event streams and long lists. Each occupies a server thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from flask import Response, request

from ccm.api.http.extensions import request_limiter, service
from ccm.errors import SlotsTaken

T = TypeVar("T")


class RequestLimiter:
    """The slots for held requests. The server has more threads than slots, so that other requests get through."""

    def __init__(self, slots: int) -> None:
        self._slots = threading.Semaphore(slots)

    @contextmanager
    def try_slot(self) -> Iterator[bool]:
        """Hold a slot during the block. Yield whether one was free."""
        taken = self._slots.acquire(blocking=False)
        try:
            yield taken
        finally:
            if taken:
                self._slots.release()

    def take_slot(self) -> Callable[[], None]:
        """Take a slot beyond the end of the view. Return a function that releases it once.

        Raises:
            SlotsTaken: no slot is free.
        """
        if not self._slots.acquire(blocking=False):
            raise SlotsTaken("All slots for requests that are held open are taken (CCM_MAX_HELD). Try again later.")
        stack = ExitStack()
        stack.callback(self._slots.release)
        return stack.close


def hold_open(response: Response) -> Response:
    """Hold a slot until a response is sent or its client has gone. Return the response.

    Raises:
        SlotsTaken: no slot is free.
    """
    if request.method != "HEAD":  # has no body, so it is sent at once
        # Not in the body's own `finally`, because a generator that never started does not run it.
        response.call_on_close(request_limiter().take_slot())
    return response


def client_gone() -> Callable[[], bool]:
    """Return a function that tells whether the request's client has disconnected. It works after the view has returned.

    It always returns False on servers that cannot tell.
    """
    gone: Callable[[], bool] = request.environ.get("waitress.client_disconnected", lambda: False)
    return gone


def wait_until(key: str, seconds: float, look: Callable[[], T | None]) -> T | None:
    """Wait until `look` returns a value, and return that.

    Return None after `seconds`, and also when the client disconnects. If no slot is free, call `look` once.

    Args:
        key: the run or the session whose changes to wait for, or another key of the notifier.
    """
    if seconds <= 0:
        return look()
    with request_limiter().try_slot() as taken:
        return service().notifier.wait(key, seconds if taken else 0, look, client_gone())
