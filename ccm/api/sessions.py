"""`/api/sessions`: the sessions, their runs, messages and forks."""

from __future__ import annotations

import contextlib
from functools import partial

from flask import Blueprint, Response

from ccm.api.http.bodies import SessionBody
from ccm.api.http.cursor import Cursor, last_event
from ccm.api.http.extensions import service
from ccm.api.http.message_lists import Extent, message_list
from ccm.api.http.pagination import page, page_of
from ccm.api.http.query import Order, PageQuery, SessionMessagesQuery, SessionsQuery, StreamQuery
from ccm.api.http.responses import json_response
from ccm.api.http.route import EventStream, Messages, Route
from ccm.api.http.sse import RUN_FRAMES, event_stream
from ccm.core.policy import workdir
from ccm.core.queries import Queries
from ccm.errors import NotFound
from ccm.models import ListedSession, Run, Session, SessionStatus, SessionSummary

blueprint = Blueprint("sessions", __name__, url_prefix="/api/sessions")


@Route(blueprint, "GET", "", query=SessionsQuery, returns=list[ListedSession] | list[SessionSummary])
def list_sessions(query: SessionsQuery) -> Response:
    """List the sessions, latest activity first, or search them. Filters: cwd, createdBy, since, until, metadata.KEY."""
    filters = query.filters("cwd")
    queries, summary = service().queries, query.fields is not None
    if "cwd" in filters:
        filters["cwd"] = workdir.canonical(filters["cwd"])
    if query.q is not None and query.searches:
        found = queries.search_sessions(query.q, filters, limit=query.limit, after=query.cursor, summary=summary)
        return page_of(found.sessions, more=found.next is not None, place=found.next)
    read = partial(queries.sessions, filters, oldest_first=query.order == Order.ASC, summary=summary)
    return page(query, read, lambda listed: listed.place)


@Route(blueprint, "GET", "/<session_id>", returns=Session)
def get_session(session_id: str) -> Response:
    """Return a session. Its id may also be the `sdkSessionId` of any of its runs."""
    return json_response(service().queries.session(session_id).to_json())


@Route(blueprint, "PATCH", "/<session_id>", body=SessionBody, returns=Session)
def update_session(session_id: str, body: SessionBody) -> Response:
    """Change a session's title and metadata.

    A field that is left out stays as it is. `metadata` is replaced as a whole, and null clears it.
    """
    given = body.model_dump(exclude_unset=True)
    return json_response(service().runs.update_session(session_id, given).to_json())


@Route(blueprint, "GET", "/<session_id>/messages", query=SessionMessagesQuery, returns=Messages)
def list_session_messages(session_id: str, query: SessionMessagesQuery) -> Response:
    """List the SDK messages of a session's runs, in order. history=full prepends those that the session continued.

    `after` is `RUN_ID:INDEX`. There is a `Link` as long as more may come.
    """
    position = Cursor("after", query.after).in_session()
    session = service().queries.session(session_id)

    def measure(queries: Queries) -> Extent:
        current, segments = queries.session_segments(session.id, position, query.history == "full")
        return Extent(
            segments,
            current.status != SessionStatus.RUNNING,
            lambda segment: f"{segment.run_id}:{segment.through}",
        )

    return message_list(query, session.id, measure)


@Route(blueprint, "GET", "/<session_id>/stream", query=StreamQuery, returns=EventStream(RUN_FRAMES))
def stream_session(session_id: str, query: StreamQuery) -> Response:
    """Stream the messages of a session's runs as Server-Sent Events, run after run, including later runs.

    `after` or `Last-Event-ID` is `RUN_ID:INDEX`, or `RUN_ID:end`. The stream lasts until the client leaves or the
    service stops.
    """
    session = service().queries.session(session_id)
    seq, index = _start(session, last_event(query.after))
    return event_stream(lambda stream: stream.session(session.id, seq, index), lambda run_id: f"{run_id}:")


@Route(blueprint, "GET", "/<session_id>/runs", query=PageQuery, returns=list[Run])
def list_session_runs(session_id: str, query: PageQuery) -> Response:
    """List the runs of a session, oldest first."""
    return page(query, partial(service().queries.session_runs, session_id), lambda run: run.seq)


@Route(blueprint, "GET", "/<session_id>/forks", query=PageQuery, returns=list[Session])
def list_forks(session_id: str, query: PageQuery) -> Response:
    """List the sessions that were forked from a session, latest activity first."""
    return page(query, partial(service().queries.forks, session_id), lambda session: session.last_run_seq)


def _start(session: Session, cursor: Cursor) -> tuple[int | None, int]:
    """Return the position after which a stream begins.

    Returns:
        The seq of a run (None: before the first run), and the index of a message of the run after it (-1: none).

    Raises:
        ValidationError: the session has no such run, or the run has no such message or has not ended.
    """
    ended = cursor.ended_run()
    position = (ended, -1) if ended else cursor.in_session()
    if position is None:
        return None, -1
    run_id, index = position
    with contextlib.suppress(NotFound):
        run = service().queries.run(run_id)
        if run.session_id == session.id:
            if not ended:
                return run.seq - 1, cursor.check(run.id, run.message_count, index)
            if run.ended:
                return run.seq, -1
            raise cursor.error(f"run {run.id} has not ended.")
    raise cursor.error(f"session {session.id} has no run {run_id}.")
