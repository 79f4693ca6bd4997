"""A delivery: an event on its way to one of its addresses."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BeforeValidator, Field
from typing_extensions import TypedDict

from ccm.models.event import EventType
from ccm.models.fields import Id, Timestamp
from ccm.models.json_field import JsonText
from ccm.models.stored import StoredModel


class DeliveryStatus(StrEnum):
    # Not delivered yet; the next attempt is at `nextAttemptAt`.
    PENDING = "pending"
    # The receiver accepted it.
    DELIVERED = "delivered"
    # Given up after the last attempt; later events of the run are still delivered.
    FAILED = "failed"
    # Given up together with all later deliveries: the receiver wants no more, or its address is no longer allowed.
    DISABLED = "disabled"


class DeliveryTarget(StrEnum):
    """The receiver of a delivery."""

    # The run's own address.
    RUN = "run"
    # The service's address.
    SERVICE = "service"


class Attempt(TypedDict):
    """One attempt to deliver an event."""

    at: Annotated[str, Field(description="When it began.", json_schema_extra={"format": "date-time"})]
    durationMs: Annotated[int, Field(description="How long it took (ms).")]
    statusCode: Annotated[int | None, Field(description="The status of the answer; null if there was none.")]
    error: Annotated[str | None, Field(description="Why it failed; null if it succeeded.")]


def _host_or_none(host: str) -> str | None:
    """Return None for the empty column of a delivery to the service's address, which the settings name."""
    return host or None


class Delivery(StoredModel):
    """An event on its way to one of its addresses."""

    id: int = Field(description="The delivery's number.")
    event_id: int = Field(description="The event that is delivered.")
    event_type: EventType = Field(description="The type of that event.")
    run_id: Id = Field(description="The run that the event is about.")
    target: DeliveryTarget = Field(description="Whether the event goes to the run's address or the service's.")
    host: Annotated[str | None, BeforeValidator(_host_or_none)] = Field(
        description="Host and port of the run's address; null for the service's."
    )
    webhook_id: str = Field(description="The `webhook-id` that the receiver gets, the same in each attempt.")
    status: DeliveryStatus = Field(description="The state of the delivery.")
    reason: str | None = Field(description="Why the delivery was given up.")
    attempts: JsonText[list[Attempt]] = Field(description="The attempts so far, oldest first.")
    next_attempt_at: Timestamp | None = Field(
        description="When it is sent next; null also while an earlier delivery of the same run and target is pending."
    )
