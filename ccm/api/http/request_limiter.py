"""Limits the requests that are held open: `?wait=`, event streams and long lists. Each occupies a server thread.

Each takes a slot. The server has more threads than slots, so that other requests get through.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

from flask import Response, request

from ccm.api.http.extensions import held_slots, service
from ccm.errors import SlotsTaken

T = TypeVar("T")


def hold_open(response: Response) -> Response:
    """Hold a slot until a response is sent or its client has gone. Return the response.

    Raises:
        SlotsTaken: no slot is free.
    """
    if request.method == "HEAD":  # has no body, so it is sent at once
        return response
    slots = held_slots()
    if not slots.acquire(blocking=False):
        raise SlotsTaken("All slots for requests that are held open are taken (CCM_MAX_HELD). Try again later.")
    release_once = ExitStack()
    release_once.callback(slots.release)
    # Not in the body's own `finally`, because a generator that never started does not run it.
    response.call_on_close(release_once.close)
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
    slots = held_slots()
    has_slot = slots.acquire(blocking=False)
    try:
        return service().notifier.wait(key, seconds if has_slot else 0, look, client_gone())
    finally:
        if has_slot:
            slots.release()
