"""Server-Sent Events, as https://html.spec.whatwg.org/multipage/server-sent-events.html has them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence

from flask import Response

from ccm import models
from ccm.api.http.context import client_gone, held, service
from ccm.api.http.cursor import END
from ccm.core.streams import ApprovalState, Event, Messages, Subscription

# How soon a browser is to come back when the connection breaks (milliseconds).
RETRY = 1_000
SILENCE = b": still here\n\n"
HEADERS = {
    # Neither kept nor compressed on its way: who compresses also collects.
    "Cache-Control": "no-cache, no-store, no-transform",
    "X-Accel-Buffering": "no",  # nginx would hold it back
}


def event_stream(follow: Callable[[Subscription], Iterator[Event]], prefix: Callable[[str], str]) -> Response:
    """The answer that goes on.

    Args:
        follow: what is to be told.
        prefix: what stands before the index in the ids of a run's events.

    Raises:
        SlotsTaken: no place is free.
    """
    return _answer(lambda subscription: _frames(follow(subscription), prefix))


def feed(after: int) -> Response:
    """What happens to all runs beyond an event, an answer that goes on.

    Raises:
        SlotsTaken: no place is free.
    """
    return _answer(lambda subscription: _feed_frames(subscription.events(after), after))


def _answer(frames: Callable[[Subscription], Iterator[bytes]]) -> Response:
    body = frames(Subscription(service().queries, service().notifier, client_gone()))
    return held(Response(body, headers=HEADERS, content_type="text/event-stream"))


def nothing_more() -> Response:
    """The one answer after which a browser's EventSource does not come back."""
    response = Response(status=204)
    del response.headers["Content-Type"]
    return response


def _feed_frames(events: Iterable[Sequence[models.Event] | None], after: int) -> Iterator[bytes]:
    # An id alone is no event, but a browser comes back with it: also what began with `now` misses nothing then.
    yield f": connected\nretry: {RETRY}\nid: {after}\n\n".encode("ascii")
    for found in events:
        if found is None:
            yield SILENCE
        else:
            told = (f"event: {event.type}\nid: {event.id}\ndata: {event.json}\n\n" for event in found)
            yield "".join(told).encode("ascii")


def _frames(events: Iterable[Event], prefix: Callable[[str], str]) -> Iterator[bytes]:
    # At once: waitress sends the headers with the first bytes of the body.
    yield f": connected\nretry: {RETRY}\n\n".encode("ascii")
    for event in events:
        if event is None:
            yield SILENCE
        elif isinstance(event, Messages):
            start = f"event: message\nid: {prefix(event.run_id)}"
            # A text is one line of ASCII, as it is stored.
            yield "".join(f"{start}{index}\ndata: {text}\n\n" for index, text in event.numbered).encode("ascii")
        elif isinstance(event, ApprovalState):
            # Without an id, which would be a message's index: whoever comes back is told anew what may be missed.
            yield f"event: approval\ndata: {json.dumps(event.shown)}\n\n".encode("ascii")
        else:
            data = json.dumps(event.to_json())
            yield f"event: end\nid: {prefix(event.id)}{END}\ndata: {data}\n\n".encode("ascii")
