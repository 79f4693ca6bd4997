"""The objects of the current app, kept in `app.extensions`."""

from __future__ import annotations

from threading import Semaphore
from typing import TYPE_CHECKING, cast

from flask import current_app

from ccm.core.service import Service

if TYPE_CHECKING:
    from ccm.api.openapi.document import Document

SERVICE = "ccm"
HELD_SLOTS = "ccm.held_slots"
DOCUMENT = "ccm.openapi"


def service() -> Service:
    return cast("Service", current_app.extensions[SERVICE])


def held_slots() -> Semaphore:
    """Return the slots for requests that are held open."""
    return cast("Semaphore", current_app.extensions[HELD_SLOTS])


def document() -> Document:
    """Return the description of the API."""
    return cast("Document", current_app.extensions[DOCUMENT])
