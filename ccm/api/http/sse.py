"""Server-Sent Events: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator

from flask import Response

from ccm.api.http.cursor import END
from ccm.api.http.extensions import service
from ccm.api.http.request_limiter import client_gone, hold_open
from ccm.core.streams import ApprovalState, Events, Messages, Stream, StreamItem

# The delay before a browser reconnects (milliseconds).
RETRY_DELAY_MS = 1_000
KEEP_ALIVE = b": still here\n\n"
HEADERS = {
    # Not to be cached or compressed on the way, because compression buffers.
    "Cache-Control": "no-cache, no-store, no-transform",
    "X-Accel-Buffering": "no",  # nginx would buffer the events
}


def event_stream(follow: Callable[[Stream], Iterator[StreamItem]], prefix: Callable[[str], str]) -> Response:
    """Stream the events of a run or a session.

    Args:
        follow: returns the events of a stream.
        prefix: returns the part of an event's id before the index, given the run id.

    Raises:
        SlotsTaken: no slot is free.
    """
    return _stream(lambda stream: _frames(follow(stream), prefix))


def feed(after: int) -> Response:
    """Stream the events of all runs.

    Args:
        after: the id of the event after which to begin.

    Raises:
        SlotsTaken: no slot is free.
    """
    return _stream(lambda stream: _feed_frames(stream.events(after), after))


def _stream(frames: Callable[[Stream], Iterator[bytes]]) -> Response:
    body = frames(Stream(service().queries, service().shared_reads, client_gone()))
    return hold_open(Response(body, headers=HEADERS, content_type="text/event-stream"))


def no_more_events() -> Response:
    """Return 204, the only response after which a browser's EventSource does not reconnect."""
    response = Response(status=204)
    del response.headers["Content-Type"]
    return response


def _feed_frames(events: Iterable[Events | None], after: int) -> Iterator[bytes]:
    # An id alone is no event, but a browser reconnects with it, so that a stream from `now` misses nothing either.
    yield f": connected\nretry: {RETRY_DELAY_MS}\nid: {after}\n\n".encode("ascii")
    for batch in events:
        if batch is None:
            yield KEEP_ALIVE
        else:
            yield _render(batch)


def _frames(events: Iterable[StreamItem], prefix: Callable[[str], str]) -> Iterator[bytes]:
    # Sent at once, because waitress sends the headers with the first bytes of the body.
    yield f": connected\nretry: {RETRY_DELAY_MS}\n\n".encode("ascii")
    for event in events:
        if event is None:
            yield KEEP_ALIVE
        elif isinstance(event, Messages):
            yield _render(event, prefix(event.run_id))
        elif isinstance(event, ApprovalState):
            # Without an id, because that would be a message's index. A client that reconnects gets the state again.
            yield f"event: approval\ndata: {json.dumps(event.shown)}\n\n".encode("ascii")
        else:
            data = json.dumps(event.to_json())
            yield f"event: end\nid: {prefix(event.id)}{END}\ndata: {data}\n\n".encode("ascii")


def _render(batch: Messages | Events, prefix: str = "") -> bytes:
    """Return the frames of a batch, rendered once for all clients with the same prefix."""
    rendered = batch.rendered.get(prefix)
    if rendered is None:
        # A stored text is one line of ASCII.
        if isinstance(batch, Messages):
            frames = (f"event: message\nid: {prefix}{index}\ndata: {text}\n\n" for index, text in batch.numbered)
        else:
            frames = (f"event: {event.type}\nid: {event.id}\ndata: {event.json}\n\n" for event in batch.events)
        rendered = batch.rendered[prefix] = "".join(frames).encode("ascii")
    return rendered
