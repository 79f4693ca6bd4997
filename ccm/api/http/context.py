"""What a view finds beside its request: the service, the held places, and the ways to answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from flask import Response, current_app, request

from ccm.api.http.guard import Guard
from ccm.api.http.request_limiter import RequestLimiter
from ccm.core.service import Service

T = TypeVar("T")

EXTENSION = "ccm"


def service() -> Service:
    return cast(Service, current_app.extensions[EXTENSION])


def guard() -> Guard:
    return cast(Guard, current_app.extensions["ccm.guard"])


def request_limiter() -> RequestLimiter:
    return cast(RequestLimiter, current_app.extensions["ccm.held"])


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer, in ASCII: a lone surrogate in a message could not be sent as UTF-8."""
    return Response(json.dumps(body) + "\n", status, dict(headers or {}), mimetype="application/json")


def held(response: Response) -> Response:
    """An answer that is sent for as long as its client reads, and has a place until it is over.

    Raises:
        SlotsTaken: no place is free.
    """
    if request.method != "HEAD":  # has no body, and so is over at once
        # Not the body's own `finally`: a generator that never began runs none.
        response.call_on_close(request_limiter().take())
    return response


def client_gone() -> Callable[[], bool]:
    """Tells whether the request's client has left, also after the view has returned; never, if the server can't."""
    gone: Callable[[], bool] = request.environ.get("waitress.client_disconnected", lambda: False)
    return gone


def wait_until(key: str, seconds: float, look: Callable[[], T | None]) -> T | None:
    """What `look` finds, within a time; None if it finds nothing, no place is free, or the client has gone.

    Args:
        key: the run or the session that is waited for.
    """
    if seconds <= 0:
        return look()
    with request_limiter().one() as taken:
        return service().notifier.wait(key, seconds if taken else 0, look, client_gone())
