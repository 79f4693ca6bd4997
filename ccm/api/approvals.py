"""`/api/approvals`: what Claude Code asks before it uses a tool, and the clients' answers."""

from __future__ import annotations

from flask import Blueprint, Response, g, request

from ccm.api.http.bodies import ApprovalBody, read_body, refuse_idempotency_key
from ccm.api.http.context import check_query, json_response, service, wait_seconds, wait_until
from ccm.api.http.pagination import page
from ccm.api.runs import plain
from ccm.core.storage.notifier import APPROVALS
from ccm.errors import ValidationError
from ccm.models import APPROVAL_STATUSES, Approval

blueprint = Blueprint("approvals", __name__, url_prefix="/api")


@blueprint.get("/runs/<run_id>/approvals")
def of_run(run_id: str) -> Response:
    """The approvals of a run, oldest first."""
    check_query("limit", "cursor")
    queries = service().queries
    return page(
        lambda limit, after: queries.run_approvals(plain(run_id, "runId"), limit=limit, after=after),
        lambda approval: approval.seq,
    )


@blueprint.get("/approvals")
def approvals() -> Response:
    """The approvals of all runs, oldest first; filters status, runId, sessionId; with wait, once there is one."""
    check_query("status", "runId", "sessionId", "limit", "cursor", "wait")
    filters = {name: request.args[name] for name in ("status", "runId", "sessionId") if name in request.args}
    if filters.get("status", APPROVAL_STATUSES[0]) not in APPROVAL_STATUSES:
        raise ValidationError(f"status: must be one of {', '.join(APPROVAL_STATUSES)}.", field="status")
    seconds = wait_seconds()
    queries = service().queries
    if "runId" in filters:
        filters["runId"] = queries.run(plain(filters["runId"], "runId")).id
    if "sessionId" in filters:
        filters["sessionId"] = queries.session(plain(filters["sessionId"], "sessionId")).id

    def read(limit: int, after: int | None) -> list[Approval]:
        found = wait_until(APPROVALS, seconds, lambda: queries.approvals(filters, limit=limit, after=after) or None)
        return found or []

    # Who waits can go on behind what it has seen, or it would be answered at once as long as that is pending.
    return page(read, lambda approval: approval.seq, grows=seconds > 0)


@blueprint.get("/approvals/<approval_id>")
def approval(approval_id: str) -> Response:
    """One approval."""
    check_query()
    return json_response(service().queries.approval(plain(approval_id, "approvalId")).to_json())


@blueprint.post("/approvals/<approval_id>")
def decide(approval_id: str) -> Response:
    """Answer an approval: the first answer counts."""
    check_query()
    refuse_idempotency_key(request)
    body = read_body(request, ApprovalBody, service().settings.max_body_bytes)
    decided = service().approvals.answer(plain(approval_id, "approvalId"), body.answer(), g.client)
    return json_response(decided.to_json())
