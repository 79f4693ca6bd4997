"""The objects of the current app: the service, the admission checks and the limiter, kept in `app.extensions`."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from flask import Flask, current_app

from ccm.core.service import Service

if TYPE_CHECKING:
    from ccm.api.http.auth import Guard
    from ccm.api.http.request_limiter import RequestLimiter

SERVICE = "ccm"
GUARD = "ccm.guard"
REQUEST_LIMITER = "ccm.request_limiter"


def attach(app: Flask, service: Service, guard: Guard, request_limiter: RequestLimiter) -> None:
    """Make the objects available to the requests of an app."""
    app.extensions |= {SERVICE: service, GUARD: guard, REQUEST_LIMITER: request_limiter}


def service() -> Service:
    return cast("Service", current_app.extensions[SERVICE])


def guard() -> Guard:
    return cast("Guard", current_app.extensions[GUARD])


def request_limiter() -> RequestLimiter:
    return cast("RequestLimiter", current_app.extensions[REQUEST_LIMITER])
