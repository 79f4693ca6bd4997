"""`/api/runs`: start, resume, fork, cancel; one run, all runs, a run's messages, as a list and live."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from flask import Blueprint, Response, g, request, url_for
from werkzeug.exceptions import MethodNotAllowed

from ccm.api.http.bodies import ForkBody, ResumeBody, RunBody, StartBody, idempotency_key, read_body
from ccm.api.http.context import check_query, json_response, service, wait_seconds, wait_until
from ccm.api.http.cursor import END, HEADER, Cursor, after, last_event
from ccm.api.http.message_lists import Extent, message_list
from ccm.api.http.pagination import page
from ccm.api.http.sse import event_stream, nothing_more
from ccm.core.policy import workdir
from ccm.core.policy.options import check_policy, check_webhook
from ccm.errors import Conflict, Unavailable, ValidationError
from ccm.models import CANCELLED, FORK, FRESH, MODES, RESUME, STATUSES, Accepted, Run, RunRequest

blueprint = Blueprint("runs", __name__, url_prefix="/api/runs")

# How long DELETE waits for a run to end: interrupt, terminate and kill have their bounds (core/claude/execution.py),
# and then the end is to be stored.
CANCEL_TIMEOUT = 30.0
# They stand where a run's id stands.
POST_ONLY = ("start", "resume", "fork")

Body = TypeVar("Body", bound=RunBody)


@blueprint.post("/start")
def start() -> Response:
    """Start a fresh run in a new session."""

    def accept(body: StartBody, run_request: RunRequest) -> Accepted:
        cwd = workdir.resolve(body.cwd, service().settings.allowed_roots)
        opened = replace(run_request, title=body.title, metadata=body.metadata)
        return service().runs.start(opened, cwd)

    return _begin(FRESH, StartBody, accept)


@blueprint.post("/resume")
def resume() -> Response:
    """Continue a session with another run."""

    def accept(body: ResumeBody, run_request: RunRequest) -> Accepted:
        queries = service().queries
        session = queries.session(body.sessionId)
        workdir.check_roots(session.cwd, service().settings.allowed_roots)
        head = None if session.head_run_id is None else queries.run(session.head_run_id)
        return service().runs.resume(replace(run_request, if_busy=body.ifBusy), session, head)

    return _begin(RESUME, ResumeBody, accept)


@blueprint.post("/fork")
def fork() -> Response:
    """Branch off a session into a new one."""

    def accept(body: ForkBody, run_request: RunRequest) -> Accepted:
        queries = service().queries
        session = queries.session(body.sessionId)
        point = queries.fork_point(session.id, body.atRunId, body.atMessage)
        roots = service().settings.allowed_roots
        cwd = None if body.cwd is None else workdir.resolve(body.cwd, roots)
        if cwd is None:
            workdir.check_roots(session.cwd, roots)
        opened = replace(run_request, title=body.title, metadata=body.metadata)
        return service().runs.fork(opened, session, point, cwd)

    return _begin(FORK, ForkBody, accept)


@blueprint.get("")
def runs() -> Response:
    """The runs, newest first; filters status, sessionId, cwd, mode."""
    check_query("status", "sessionId", "cwd", "mode", "limit", "cursor")
    filters = {name: request.args[name] for name in ("status", "sessionId", "cwd", "mode") if name in request.args}
    for name, allowed in (("status", STATUSES), ("mode", MODES)):
        if name in filters and filters[name] not in allowed:
            raise ValidationError(f"{name}: must be one of {', '.join(allowed)}.", field=name)
    if "sessionId" in filters:
        filters["sessionId"] = service().queries.session(plain(filters["sessionId"], "sessionId")).id
    if "cwd" in filters:
        filters["cwd"] = workdir.canonical(plain(filters["cwd"], "cwd"))
    queries = service().queries
    return page(lambda limit, after: queries.runs(filters, limit=limit, after=after), lambda run: run.seq)


@blueprint.get("/<run_id>")
def run(run_id: str) -> Response:
    """One run; with wait, once it has ended."""
    if run_id in POST_ONLY:
        raise MethodNotAllowed(["POST"])
    check_query("wait")
    return json_response(_wait_for_end(service().queries.run(plain(run_id, "runId")), wait_seconds()).to_json())


@blueprint.delete("/<run_id>")
def cancel(run_id: str) -> Response:
    """Cancel a run."""
    if run_id in POST_ONLY:
        raise MethodNotAllowed(["POST"])
    check_query()
    run = service().runs.cancel(plain(run_id, "runId"))
    if not run.ended:
        run = service().queries.wait(run.id, CANCEL_TIMEOUT, lambda: _ended(run_id), lambda: False) or run
    if not run.ended:
        raise Unavailable(f"Run {run_id} was told to stop and has not ended yet; ask again.", code="STILL_ENDING")
    if run.status != CANCELLED:
        raise Conflict(
            f"Run {run.id} ended by itself before it could be cancelled: it is {run.status!r}.",
            code="RUN_ALREADY_ENDED",
        )
    return json_response(run.to_json())


@blueprint.get("/<run_id>/messages")
def messages(run_id: str) -> Response:
    """The SDK messages of a run, in order, as the SDK gave them."""
    check_query("after", "limit", "type", "wait")
    read = after()
    index = read.index()
    queries = service().queries

    def measure() -> Extent:
        run, segment = queries.run_segment(plain(run_id, "runId"), index)
        read.check(run, index)
        return Extent([segment], run.ended, lambda segment: str(segment.through))

    return message_list(run_id, measure)


@blueprint.get("/<run_id>/stream")
def stream(run_id: str) -> Response:
    """The same messages as Server-Sent Events, the stored ones first and then live; at last the run."""
    check_query("after")
    run = service().queries.run(plain(run_id, "runId"))
    read = last_event()
    if read == Cursor(HEADER, END) and run.ended:
        return nothing_more()
    if read.text == END:
        raise read.wrong(f"{END} is for a {HEADER} after the run has ended; this one is {run.status!r}.")
    index = read.check(run, read.index())
    return event_stream(lambda subscription: subscription.run(run.id, index), lambda _: "")


def plain(text: str, field: str) -> str:
    """
    Raises:
        ValidationError: it has a NUL, which PostgreSQL cannot even compare.
    """
    if "\0" in text:
        raise ValidationError(f"{field}: must not contain the character NUL.", field=field)
    return text


def _begin(mode: str, model: type[Body], accept: Callable[[Body, RunRequest], Accepted]) -> Response:
    """Read a request for a run, and answer with the run that it makes, or has made before under the same key.

    Args:
        accept: has the run made.
    """
    check_query("wait")
    seconds = wait_seconds()
    settings = service().settings
    body = read_body(request, model, settings.max_body_bytes)
    key = idempotency_key(request, body)
    # Before anything of the present state is looked at: a resume that is sent again must find its own run and not a
    # busy session, nor interrupt itself.
    earlier = None if key is None else service().queries.run_of_key(key)
    if earlier is not None:
        return _accepted(Accepted(earlier, replayed=True), seconds)
    options = body.options.given()
    check_policy(options, settings)
    service().ceilings.check(options, body.timeoutMs)
    if body.approvals:
        service().approvals.check_workers()
    check_webhook(body.webhookUrl, settings)
    run_request = RunRequest(
        mode=mode,
        prompt=body.prompt,
        images=body.pictures(),
        options=options,
        timeout_ms=body.timeoutMs,
        approvals=body.approvals,
        approval_timeout_ms=body.approvalTimeoutMs,
        webhook_url=body.webhookUrl,
        created_by=g.client,
        idempotency_key=key,
    )
    return _accepted(accept(body, run_request), seconds)


def _accepted(accepted: Accepted, seconds: float) -> Response:
    run = accepted.run
    # Accepted it is, whatever the wait comes to: an error would have the client start it again.
    with contextlib.suppress(Unavailable):
        run = _wait_for_end(run, seconds)
    headers = {"Location": url_for("runs.run", run_id=run.id)}
    if accepted.replayed:
        headers["Idempotent-Replayed"] = "true"
    return json_response(run.to_json(), 200 if run.ended else 202, headers)


def _ended(run_id: str) -> Run | None:
    run = service().queries.run(run_id)
    return run if run.ended else None


def _wait_for_end(run: Run, seconds: float) -> Run:
    if run.ended or not seconds:
        return run
    return wait_until(run.id, seconds, lambda: _ended(run.id)) or service().queries.run(run.id)
