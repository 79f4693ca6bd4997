"""Server-Sent Events: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Literal, TypeVar

from flask import Response
from pydantic import BaseModel, ConfigDict, Field

from ccm.api.http.cursor import END
from ccm.api.http.extensions import service
from ccm.api.http.request_limiter import client_gone, hold_open
from ccm.core.streams import ApprovalState, Messages, Stream, StreamItem
from ccm.models import Approval, Event, EventRun, EventType, Run, SDKMessage
from ccm.models.fields import Timestamp

T = TypeVar("T")
# The delay before a browser reconnects (milliseconds).
RETRY_DELAY_MS = 1_000
KEEP_ALIVE = b": still here\n\n"
RunEventType = Literal[
    EventType.RUN_CREATED,
    EventType.RUN_STARTED,
    EventType.RUN_COMPLETED,
    EventType.RUN_FAILED,
    EventType.RUN_CANCELLED,
]
ApprovalEventType = Literal[EventType.APPROVAL_REQUESTED, EventType.APPROVAL_RESOLVED]
EventId = Annotated[str, Field(pattern=r"^\d+$", description="The event's id. Later events have greater ones.")]
HEADERS = {
    # Not to be cached or compressed on the way, because compression buffers.
    "Cache-Control": "no-cache, no-store, no-transform",
    "X-Accel-Buffering": "no",  # nginx would buffer the events
}


class Described(BaseModel):
    """A part of a stream. The models only describe what is written below, so their validators are never built.

    Those of a run and an approval take 8 MiB.
    """

    model_config = ConfigDict(defer_build=True)


class Frame(Described):
    """An event of a stream, as a parser of Server-Sent Events gives it."""


class MessageFrame(Frame):
    """An SDK message."""

    event: Literal["message"]
    id: str = Field(description="The message's index; in the stream of a session `RUN_ID:INDEX`.")
    data: SDKMessage


class ApprovalFrame(Frame):
    """An approval that was requested or resolved. It has no id, because ids are positions among the messages."""

    event: Literal["approval"]
    data: Approval


class EndFrame(Frame):
    """The end of a run."""

    event: Literal["end"]
    id: str = Field(description="`end`; in the stream of a session `RUN_ID:end`.")
    data: Run


class RunChange(Described):
    run: EventRun


class ApprovalChange(Described):
    approval: Approval
    run: EventRun


class RunEvent(Described):
    """A change in the state of a run."""

    type: RunEventType = Field(description="What happened.")
    timestamp: Timestamp = Field(description="When it happened.")
    data: RunChange


class ApprovalEvent(Described):
    """A change in the state of an approval."""

    type: ApprovalEventType = Field(description="What happened.")
    timestamp: Timestamp = Field(description="When it happened.")
    data: ApprovalChange


class RunEventFrame(Frame):
    """An event of a run."""

    event: RunEventType
    id: EventId
    data: RunEvent


class ApprovalEventFrame(Frame):
    """An event of an approval."""

    event: ApprovalEventType
    id: EventId
    data: ApprovalEvent


# What the streams of runs and sessions consist of, and the stream of all events.
RUN_FRAMES = (MessageFrame, ApprovalFrame, EndFrame)
EVENT_FRAMES = (RunEventFrame, ApprovalEventFrame)


def event_stream(follow: Callable[[Stream], Iterator[StreamItem]], prefix: Callable[[str], str]) -> Response:
    """Stream the events of a run or a session.

    Args:
        follow: returns the events of a stream.
        prefix: returns the part of an event's id before the index, given the run id.

    Raises:
        SlotsTaken: no slot is free.
    """
    return _stream(follow, partial(_frame, prefix))


def feed(after: int) -> Response:
    """Stream the events of all runs.

    Args:
        after: the id of the event after which to begin.

    Raises:
        SlotsTaken: no slot is free.
    """
    # An id alone is no event, but a browser reconnects with it, so that a stream from `now` misses nothing either.
    return _stream(lambda stream: stream.events(after), _feed_frame, f"id: {after}\n")


def _stream(follow: Callable[[Stream], Iterator[T]], frame: Callable[[T], bytes], position: str = "") -> Response:
    # Sent at once, because waitress sends the headers with the first bytes of the body.
    opening = f": connected\nretry: {RETRY_DELAY_MS}\n{position}\n".encode("ascii")
    items = follow(Stream(service().queries, service().shared_reads, client_gone()))
    # Unlike a loop, map keeps no item while it waits for the next one.
    body = itertools.chain([opening], map(frame, items))
    return hold_open(Response(body, headers=HEADERS, content_type="text/event-stream"))


def no_more_events() -> Response:
    """Return 204, the only response after which a browser's EventSource does not reconnect."""
    response = Response(status=204)
    del response.headers["Content-Type"]
    return response


def _feed_frame(batch: Sequence[Event] | None) -> bytes:
    if batch is None:
        return KEEP_ALIVE
    frames = (f"event: {event.type}\nid: {event.id}\ndata: {event.json}\n\n" for event in batch)
    return "".join(frames).encode("ascii")


def _frame(prefix: Callable[[str], str], item: StreamItem) -> bytes:
    if item is None:
        return KEEP_ALIVE
    if isinstance(item, Messages):
        return _render(item, prefix(item.run_id))
    if isinstance(item, ApprovalState):
        # Without an id, because that would be a message's index. A client that reconnects gets the state again.
        return f"event: approval\ndata: {json.dumps(item.shown)}\n\n".encode("ascii")
    data = json.dumps(item.to_json())
    return f"event: end\nid: {prefix(item.id)}{END}\ndata: {data}\n\n".encode("ascii")


def _render(messages: Messages, prefix: str) -> bytes:
    """Return the frames of messages, rendered once for all streams with the same prefix."""
    rendered = messages.rendered.get(prefix)
    if rendered is None:
        # A stored text is one line of ASCII.
        frames = (f"event: message\nid: {prefix}{index}\ndata: {text}\n\n" for index, text in messages.numbered)
        rendered = messages.rendered[prefix] = "".join(frames).encode("ascii")
    return rendered
