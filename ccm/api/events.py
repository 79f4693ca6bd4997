"""`/api/events`: the events of all runs and their approvals, as one stream."""

from __future__ import annotations

import re

from flask import Blueprint, Response

from ccm.api.http.cursor import Cursor, last_event
from ccm.api.http.extensions import service
from ccm.api.http.query import StreamQuery
from ccm.api.http.route import EventStream, Route
from ccm.api.http.sse import EVENT_FRAMES, feed

blueprint = Blueprint("events", __name__)

# A value of `?after=`: no stored events.
NOW = "now"
ID = re.compile(r"\d{1,16}", re.ASCII)


@Route(blueprint, "GET", "/api/events", query=StreamQuery, returns=EventStream(EVENT_FRAMES))
def stream_events(query: StreamQuery) -> Response:
    """Stream the events of all runs and approvals as Server-Sent Events: the stored ones, then live.

    `after` or `Last-Event-ID` is the id of an event, 0 for all that are stored; `after=now` leaves out the past. The
    stream begins with the id that it continues from, and lasts until the client leaves or the service stops. Each event
    has the run as it was then, without its `prompt` and `options`.
    """
    return feed(_last_read(last_event(query.after)))


def _last_read(read: Cursor) -> int:
    """Return the id of the event after which to begin, 0 for all.

    Raises:
        ValidationError: the cursor is invalid, or there has been no such event yet.
    """
    queries = service().queries
    if read.text is None:
        return 0
    if read.text == NOW and read.field == "after":
        return queries.last_event()
    if not ID.fullmatch(read.text):
        raise read.error(f"must be the id of an event, 0 for all that are stored, or as ?after= also {NOW}.")
    given = int(read.text)
    last = queries.last_event_ever()
    if given > last:
        raise read.error(f"there is no event {given} yet; " + (f"the last one was {last}." if last else "none so far."))
    return given
