"""The description of the webhooks, which are requests that the service sends."""

from __future__ import annotations

from typing import Any

from ccm.api.http.sse import ApprovalEvent, RunEvent
from ccm.api.openapi.schemas import Mode, Schemas
from ccm.core.webhooks.outbox import DELIVERED_EVENTS

TYPES: dict[str, tuple[Mode, Any]] = {
    "webhook run": ("serialization", RunEvent),
    "webhook approval": ("serialization", ApprovalEvent),
}
HEADERS = {
    "webhook-id": (True, "The id of the event, the same in each attempt and for each address."),
    "webhook-timestamp": (True, "When this attempt was sent (seconds since 1970)."),
    "webhook-signature": (False, "The signatures, if CCM_WEBHOOK_SECRET is set."),
}
DESCRIPTION = (
    "Sent to the `webhookUrl` of a run, and to CCM_WEBHOOK_URL for all runs: {types}. Headers and signature are "
    "those of https://www.standardwebhooks.com. A webhook may come twice. It is sent again for a day and more until a "
    "response says that it was received."
)
RESPONSES = {
    "2XX": {"description": "The event is received."},
    "410": {"description": "The receiver wants no more events at this address."},
    "default": {"description": "The event is not received, and is sent again."},
}


def describe_webhook(schemas: Schemas) -> dict[str, Any]:
    """Return the path item object of the webhooks."""
    types = ", ".join(f"`{each}`" for each in sorted(DELIVERED_EVENTS))
    parameters = [
        {"name": name, "in": "header", "required": required, "description": text, "schema": {"type": "string"}}
        for name, (required, text) in HEADERS.items()
    ]
    body = {"schema": {"oneOf": [schemas[key] for key in TYPES]}}
    operation = {
        "operationId": "receiveEvent",
        "tags": ["events"],
        "summary": "Receive an event of a run or an approval",
        "description": DESCRIPTION.format(types=types),
        "security": [],
        "parameters": parameters,
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": RESPONSES,
    }
    return {"post": operation}
