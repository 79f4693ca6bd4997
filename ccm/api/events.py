"""`/api/events`: what happens to all runs and their approvals, as one stream."""

from __future__ import annotations

import re

from flask import Blueprint, Response

from ccm.api.http.context import service
from ccm.api.http.cursor import Cursor, last_event
from ccm.api.http.query import StreamQuery
from ccm.api.http.route import EVENT_STREAM, route
from ccm.api.http.sse import feed

blueprint = Blueprint("events", __name__)

# For `?after=`: none of what has happened already.
NOW = "now"
ID = re.compile(r"\d{1,16}", re.ASCII)


@route(blueprint, "GET", "/api/events", query=StreamQuery, returns=EVENT_STREAM)
def events(query: StreamQuery) -> Response:
    """What happens to all runs and approvals as Server-Sent Events: what is stored, and then live."""
    return feed(_last_read(last_event(query.after)))


def _last_read(read: Cursor) -> int:
    """The id of the event beyond which to begin, 0 for all.

    Raises:
        ValidationError: nobody can have read that.
    """
    queries = service().queries
    if read.text is None:
        return 0
    if read.text == NOW and read.field == "after":
        return queries.last_event()
    if not ID.fullmatch(read.text):
        raise read.wrong(f"must be the id of an event, 0 for all that are stored, or as ?after= also {NOW}.")
    given = int(read.text)
    last = queries.last_event_ever()
    if given > last:
        raise read.wrong(f"there is no event {given} yet; " + (f"the last one was {last}." if last else "none so far."))
    return given
