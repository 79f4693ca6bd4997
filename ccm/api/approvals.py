"""`/api/approvals`: Claude Code's permission requests before it uses a tool, and the clients' answers."""

from __future__ import annotations

from functools import partial

from flask import Blueprint, Response, g

from ccm.api.http.bodies import ApprovalBody
from ccm.api.http.extensions import service
from ccm.api.http.pagination import page
from ccm.api.http.query import ApprovalsQuery, PageQuery
from ccm.api.http.request_limiter import wait_until
from ccm.api.http.responses import json_response
from ccm.api.http.route import Route
from ccm.core.storage.notifier import APPROVALS
from ccm.errors import ApprovalResolved
from ccm.models import Approval

blueprint = Blueprint("approvals", __name__, url_prefix="/api")


@Route(blueprint, "GET", "/runs/<run_id>/approvals", query=PageQuery, returns=list[Approval])
def list_run_approvals(run_id: str, query: PageQuery) -> Response:
    """List the approvals of a run, oldest first."""
    return page(query, partial(service().queries.run_approvals, run_id), lambda approval: approval.seq)


@Route(blueprint, "GET", "/approvals", query=ApprovalsQuery, returns=list[Approval])
def list_approvals(query: ApprovalsQuery) -> Response:
    """List the approvals of all runs, oldest first. Filters: status, runId, sessionId. With wait: once there is one.

    With `wait` there is always a `Link`. It leads to what is requested next, so that a client sees each approval once.
    """
    filters = query.given("status", "runId", "sessionId")
    queries = service().queries
    if "runId" in filters:
        filters["runId"] = queries.run(filters["runId"]).id
    if "sessionId" in filters:
        filters["sessionId"] = queries.session(filters["sessionId"]).id

    def read(limit: int, after: int | None) -> list[Approval]:
        look = partial(queries.approvals, filters, limit=limit, after=after)
        return wait_until(APPROVALS, query.wait, lambda: look() or None) or []

    # A waiting client needs a cursor past what it has seen, or the same pending approvals return at once.
    return page(query, read, lambda approval: approval.seq, grows=query.wait > 0)


@Route(blueprint, "GET", "/approvals/<approval_id>", returns=Approval)
def get_approval(approval_id: str) -> Response:
    """Return an approval."""
    return json_response(service().queries.approval(approval_id).to_json())


@Route(
    blueprint,
    "POST",
    "/approvals/<approval_id>",
    body=ApprovalBody,
    returns=Approval,
    status={200: "The approval, which this answer has resolved."},
    errors=(ApprovalResolved,),
)
def answer_approval(approval_id: str, body: ApprovalBody) -> Response:
    """Answer an approval. The first answer counts."""
    return json_response(service().approvals.answer(approval_id, body.answer(), g.client).to_json())
