"""The objects of the current app, kept in `app.extensions`."""

from __future__ import annotations

from threading import Semaphore
from typing import TYPE_CHECKING, cast

from flask import current_app

from ccm.core.service import Service

if TYPE_CHECKING:
    from ccm.api.openapi.document import Document
    from ccm.api.reference import Reference

SERVICE = "ccm"
HELD_SLOTS = "ccm.held_slots"
DOCUMENT = "ccm.openapi"
REFERENCE = "ccm.reference"


def service() -> Service:
    return cast("Service", current_app.extensions[SERVICE])


def held_slots() -> Semaphore:
    """Return the slots for requests that are held open."""
    return cast("Semaphore", current_app.extensions[HELD_SLOTS])


def document() -> Document:
    """Return the description of the API."""
    return cast("Document", current_app.extensions[DOCUMENT])


def reference() -> Reference:
    """Return what the documentation for browsers is made of."""
    return cast("Reference", current_app.extensions[REFERENCE])
