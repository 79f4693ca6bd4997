"""`/api/sessions`: the sessions, their runs, messages and forks."""

from __future__ import annotations

import contextlib

from flask import Blueprint, Response, request

from ccm.api.http.bodies import SessionBody, read_body
from ccm.api.http.context import check_query, json_response, service
from ccm.api.http.cursor import Cursor, after, last_event
from ccm.api.http.message_lists import Extent, message_list
from ccm.api.http.pagination import page
from ccm.api.http.sse import event_stream
from ccm.api.runs import plain
from ccm.core.policy import workdir
from ccm.errors import NotFound, ValidationError
from ccm.models import RUNNING, Session

blueprint = Blueprint("sessions", __name__, url_prefix="/api/sessions")

QUERY_CHARACTERS = 1_000


@blueprint.get("")
def sessions() -> Response:
    """The sessions, latest activity first; filters cwd, q (in titles and prompts)."""
    check_query("cwd", "q", "limit", "cursor")
    filters = {name: plain(request.args[name], name) for name in ("cwd", "q") if name in request.args}
    if "cwd" in filters:
        filters["cwd"] = workdir.canonical(filters["cwd"])
    if len(filters.get("q", "")) > QUERY_CHARACTERS:
        raise ValidationError(f"q: must be at most {QUERY_CHARACTERS} characters.", field="q")
    queries = service().queries
    return page(
        lambda limit, after: queries.sessions(filters, limit=limit, after=after),
        lambda session: session.last_run_seq,
    )


@blueprint.get("/<session_id>")
def session(session_id: str) -> Response:
    """One session."""
    check_query()
    return json_response(service().queries.session(plain(session_id, "sessionId")).to_json())


@blueprint.patch("/<session_id>")
def describe(session_id: str) -> Response:
    """Change a session's title and metadata."""
    check_query()
    body = read_body(request, SessionBody, service().settings.max_body_bytes)
    given = body.model_dump(exclude_unset=True)
    return json_response(service().runs.describe_session(plain(session_id, "sessionId"), given).to_json())


@blueprint.get("/<session_id>/messages")
def messages(session_id: str) -> Response:
    """The SDK messages of a session's runs, in order; history=full puts what it continued in front."""
    check_query("after", "limit", "type", "wait", "history")
    kind = request.args.get("history", "own")
    if kind not in ("own", "full"):
        raise ValidationError("history: must be full, or left out for the session's own runs.", field="history")
    place = after().in_session()
    queries = service().queries
    session = queries.session(plain(session_id, "sessionId"))

    def measure() -> Extent:
        current, segments = queries.session_segments(session.id, place, kind == "full")
        return Extent(
            segments,
            current.status != RUNNING,
            lambda segment: f"{segment.run_id}:{segment.through}",
        )

    return message_list(session.id, measure)


@blueprint.get("/<session_id>/stream")
def stream(session_id: str) -> Response:
    """The same messages as Server-Sent Events, run after run, those of later runs too."""
    check_query("after")
    session = service().queries.session(plain(session_id, "sessionId"))
    seq, index = _place(session, last_event())
    return event_stream(lambda subscription: subscription.session(session.id, seq, index), lambda run_id: f"{run_id}:")


@blueprint.get("/<session_id>/runs")
def runs(session_id: str) -> Response:
    """The runs of a session, oldest first."""
    check_query("limit", "cursor")
    queries = service().queries
    return page(
        lambda limit, after: queries.session_runs(plain(session_id, "sessionId"), limit=limit, after=after),
        lambda run: run.seq,
    )


@blueprint.get("/<session_id>/forks")
def forks(session_id: str) -> Response:
    """The sessions that were forked from one, latest activity first."""
    check_query("limit", "cursor")
    queries = service().queries
    return page(
        lambda limit, after: queries.forks(plain(session_id, "sessionId"), limit=limit, after=after),
        lambda session: session.last_run_seq,
    )


def _place(session: Session, read: Cursor) -> tuple[int | None, int]:
    """Where to go on: beyond the run with a seq (None: at the first), and there beyond an index.

    Raises:
        ValidationError: the session has no such run, or the run no such message or no end yet.
    """
    ended = read.ended_run()
    place = (ended, -1) if ended else read.in_session()
    if place is None:
        return None, -1
    run_id, index = place
    with contextlib.suppress(NotFound):
        run = service().queries.run(run_id)
        if run.session_id == session.id:
            if not ended:
                return run.seq - 1, read.check(run, index)
            if run.ended:
                return run.seq, -1
            raise read.wrong(f"run {run.id} has not ended.")
    raise read.wrong(f"session {session.id} has no run {run_id}.")
