"""`/api/runs`: start, resume, fork, cancel, follow-ups; runs, their deliveries, their messages listed and live."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from flask import Blueprint, Response, g, request, url_for

from ccm.api.http.bodies import ForkBody, InputBody, ResumeBody, RunBody, StartBody, idempotency_key
from ccm.api.http.cursor import END, HEADER, Cursor, last_event
from ccm.api.http.extensions import service
from ccm.api.http.message_lists import Extent, message_list
from ccm.api.http.pagination import page
from ccm.api.http.query import MessagesQuery, Order, PageQuery, RunsQuery, StreamQuery, WaitQuery
from ccm.api.http.request_limiter import wait_until
from ccm.api.http.responses import json_response
from ccm.api.http.route import EventStream, Messages, Route
from ccm.api.http.sse import RUN_FRAMES, event_stream, no_more_events
from ccm.core.policy import workdir
from ccm.core.policy.permitted_options import check_options, check_webhook
from ccm.core.queries import Queries
from ccm.core.runs.input import TakenIn
from ccm.core.runs.request import Accepted, RunRequest
from ccm.core.storage.notifier import end_of
from ccm.errors import (
    ApprovalsForbidden,
    CwdForbidden,
    NotTakenIn,
    OptionForbidden,
    OutOfDescriptors,
    QueueFull,
    RunAlreadyEnded,
    RunEnding,
    RunNotStarted,
    SessionBusy,
    SessionNotResumable,
    StillEnding,
    TimeoutForbidden,
    Unavailable,
    WebhookForbidden,
)
from ccm.models import Delivery, Run, RunMode, RunStatus, RunSummary

blueprint = Blueprint("runs", __name__, url_prefix="/api/runs")

# How long DELETE waits for a run to end (seconds): the timeouts of interrupt, terminate and kill
# (core/claude/termination.py), and the time to store the end.
CANCEL_TIMEOUT = 30.0
# The meanings of the statuses of a response with a new run.
ACCEPTED = {
    200: "The run, which has ended: within `wait`, or because the same Idempotency-Key started it earlier.",
    202: "The run, which is accepted and stored, and has not ended.",
}
# The refusals of a new run, and of one that continues a session.
REFUSALS = (
    ApprovalsForbidden,
    CwdForbidden,
    OptionForbidden,
    OutOfDescriptors,
    QueueFull,
    TimeoutForbidden,
    WebhookForbidden,
)
CONTINUATION_REFUSALS = (*REFUSALS, SessionBusy, SessionNotResumable)
# The declaration of the routes that begin a run.
begins = partial(Route, blueprint, "POST", query=WaitQuery, returns=Run, status=ACCEPTED, takes_key=True)


@begins("/start", body=StartBody, errors=REFUSALS)
def start_run(query: WaitQuery, body: StartBody) -> Response:
    """Start a fresh run in a new session.

    The run is stored before the answer is sent. With `wait` the answer comes when the run has ended, or with its
    present state when that time has passed. With an `Idempotency-Key` the request may be repeated after any failure,
    and still there is exactly one run.
    """

    def accept(run_request: RunRequest) -> Accepted:
        return service().runs.start(run_request, workdir.resolve(body.cwd, service().settings.allowed_roots))

    return _begin(RunMode.FRESH, query, body, accept)


@begins("/resume", body=ResumeBody, errors=CONTINUATION_REFUSALS)
def resume_run(query: WaitQuery, body: ResumeBody) -> Response:
    """Continue a session with another run.

    The run continues a copy of the transcript of the session's head, so what is there stays as it is. Options are not
    inherited. `wait` and `Idempotency-Key` work as for a start.
    """

    def accept(run_request: RunRequest) -> Accepted:
        queries = service().queries
        session = queries.session(body.sessionId)
        workdir.check_roots(session.cwd, service().settings.allowed_roots)
        head = None if session.head_run_id is None else queries.run(session.head_run_id)
        return service().runs.resume(replace(run_request, if_busy=body.ifBusy), session, head)

    return _begin(RunMode.RESUME, query, body, accept)


@begins("/fork", body=ForkBody, errors=CONTINUATION_REFUSALS)
def fork_run(query: WaitQuery, body: ForkBody) -> Response:
    """Branch off a session into a new one.

    The fork continues the session's head, the run `atRunId`, or the conversation through the message `atMessage`.
    Options are not inherited. `wait` and `Idempotency-Key` work as for a start.
    """

    def accept(run_request: RunRequest) -> Accepted:
        queries = service().queries
        session = queries.session(body.sessionId)
        point = queries.fork_point(session.id, body.atRunId, body.atMessage)
        roots = service().settings.allowed_roots
        cwd = None if body.cwd is None else workdir.resolve(body.cwd, roots)
        if cwd is None:
            workdir.check_roots(session.cwd, roots)
        return service().runs.fork(run_request, session, point, cwd)

    return _begin(RunMode.FORK, query, body, accept)


@Route(blueprint, "GET", "", query=RunsQuery, returns=list[Run] | list[RunSummary])
def list_runs(query: RunsQuery) -> Response:
    """List the runs, newest first. Filters: status, sessionId, cwd, mode, errorCode, waiting, createdBy, since, until,
    metadata.KEY."""
    filters = query.filters("status", "sessionId", "cwd", "mode", "errorCode")
    queries = service().queries
    if "sessionId" in filters:
        filters["sessionId"] = queries.session(filters["sessionId"]).id
    if "cwd" in filters:
        filters["cwd"] = workdir.canonical(filters["cwd"])
    if query.waiting is not None:
        filters["waiting" if query.waiting else "working"] = True
    read = partial(queries.runs, filters, oldest_first=query.order == Order.ASC, summary=query.fields is not None)
    return page(query, read, lambda run: run.seq if query.place is int else (run.created_at, run.seq))


@Route(blueprint, "GET", "/<run_id>", query=WaitQuery, returns=Run)
def get_run(run_id: str, query: WaitQuery) -> Response:
    """Return a run. With wait: once it has ended."""
    return json_response(_wait_for_end(service().queries.run(run_id), query.wait).to_json())


@Route(blueprint, "DELETE", "/<run_id>", returns=Run, errors=(RunAlreadyEnded, StillEnding))
def cancel_run(run_id: str) -> Response:
    """Cancel a run.

    The answer comes when the run is `cancelled` and its processes are gone. Cancelling it again returns the same.
    """
    run = service().runs.cancel(run_id)
    if not run.ended:
        run = service().notifier.wait(end_of(run.id), CANCEL_TIMEOUT, lambda: _ended(run_id), lambda: False) or run
    if not run.ended:
        raise StillEnding(f"Run {run_id} is stopping and has not ended yet; ask again.")
    if run.status != RunStatus.CANCELLED:
        raise RunAlreadyEnded(f"Run {run.id} ended by itself before it could be cancelled: it is '{run.status}'.")
    return json_response(run.to_json())


@Route(
    blueprint,
    "GET",
    "/<run_id>/messages",
    query=MessagesQuery,
    returns=Messages,
    status={200: "The messages.", 304: "The client has them: the run has ended, and `If-None-Match` names its `ETag`."},
)
def list_run_messages(run_id: str, query: MessagesQuery) -> Response:
    """List the SDK messages of a run, in order and unchanged.

    `after` is the index of a message, -1 for all; message *i* has index *i*. There is a `Link` as long as more may
    come. Without `limit` all messages are sent.
    """
    cursor = Cursor("after", query.after)
    index = cursor.index()

    def measure(queries: Queries) -> Extent:
        link, segment = queries.run_segment(run_id, index)
        cursor.check(run_id, link.message_count, index)
        version = f"{run_id} {link.ended_at} {link.message_count}" if link.ended else None
        return Extent([segment], link.ended, lambda segment: str(segment.through), version)

    return message_list(query, run_id, measure)


@Route(
    blueprint,
    "GET",
    "/<run_id>/stream",
    query=StreamQuery,
    returns=EventStream(RUN_FRAMES),
    status={200: "The events.", 204: "Nothing more will come: `Last-Event-ID` is `end`. A browser then stops."},
)
def stream_run(run_id: str, query: StreamQuery) -> Response:
    """Stream a run's messages as Server-Sent Events: the stored ones, then live, then the ended run.

    `after` or `Last-Event-ID` is the index of the last message that was read, and the stream continues exactly behind
    it. Pending approvals come first. After the event `end` the stream closes.
    """
    run = service().queries.run(run_id)
    cursor = last_event(query.after)
    if cursor == Cursor(HEADER, END) and run.ended:
        return no_more_events()
    if cursor.text == END:
        raise cursor.error(f"{END} is for a {HEADER} after the run has ended; this one is '{run.status}'.")
    index = cursor.check(run.id, run.message_count, cursor.index())
    return event_stream(lambda stream: stream.run(run.id, index), lambda _: "")


@Route(
    blueprint,
    "POST",
    "/<run_id>/input",
    body=InputBody,
    returns=TakenIn,
    status={202: "Claude Code has the message, and it is stored among the run's messages."},
    errors=(NotTakenIn, RunAlreadyEnded, RunEnding, RunNotStarted),
)
def send_input(run_id: str, body: InputBody) -> Response:
    """Send a user's message to a running run."""
    return json_response(service().input.put(run_id, body.prompt, body.pictures()).to_json(), 202)


@Route(blueprint, "GET", "/<run_id>/deliveries", query=PageQuery, returns=list[Delivery])
def list_deliveries(run_id: str, query: PageQuery) -> Response:
    """List the webhooks of a run, each with its attempts, oldest first."""
    return page(query, partial(service().queries.deliveries, run_id), lambda delivery: delivery.id)


def _begin(mode: RunMode, query: WaitQuery, body: RunBody, accept: Callable[[RunRequest], Accepted]) -> Response:
    """Validate a request for a run, and answer with the new run, or with the earlier run of the same key.

    Args:
        accept: stores the new run.
    """
    settings = service().settings
    key = idempotency_key(request, body)
    # Checked first, because a repeated resume must get its own run, and not find the session busy or interrupt itself.
    earlier = None if key is None else service().queries.run_of_key(key)
    if earlier is not None:
        return _accepted(Accepted(earlier, replayed=True), query.wait)
    options = body.options.given()
    check_options(options, settings)
    service().ceilings.check(options, body.timeoutMs)
    if body.approvals:
        service().approvals.check_workers()
    check_webhook(body.webhookUrl, settings)
    run_request = RunRequest(
        mode=mode,
        prompt=body.prompt,
        images=body.pictures(),
        options=options,
        run_fields=body.run_fields(),
        session_fields=body.session_fields(),
        created_by=g.client,
        idempotency_key=key,
    )
    return _accepted(accept(run_request), query.wait)


def _accepted(accepted: Accepted, seconds: float) -> Response:
    run = accepted.run
    # The run is accepted even if the wait fails. After an error response the client would start it again.
    with contextlib.suppress(Unavailable):
        run = _wait_for_end(run, seconds)
    headers = {"Location": url_for("runs.get_run", run_id=run.id)}
    if accepted.replayed:
        headers["Idempotent-Replayed"] = "true"
    return json_response(run.to_json(), 200 if run.ended else 202, headers)


def _ended(run_id: str) -> Run | None:
    run = service().queries.run(run_id)
    return run if run.ended else None


def _wait_for_end(run: Run, seconds: float) -> Run:
    if run.ended or not seconds:
        return run
    return wait_until(end_of(run.id), seconds, lambda: _ended(run.id)) or service().queries.run(run.id)
