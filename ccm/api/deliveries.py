"""`/api/runs/:runId/deliveries`: what the webhooks of a run have come to."""

from __future__ import annotations

from flask import Blueprint, Response

from ccm.api.http.context import check_query, service
from ccm.api.http.pagination import page
from ccm.api.runs import plain

blueprint = Blueprint("deliveries", __name__, url_prefix="/api/runs")


@blueprint.get("/<run_id>/deliveries")
def deliveries(run_id: str) -> Response:
    """The webhooks of a run, each with its attempts, oldest first."""
    check_query("limit", "cursor")
    run_id = plain(run_id, "runId")
    queries = service().queries
    return page(lambda limit, after: queries.deliveries(run_id, limit=limit, after=after), lambda delivery: delivery.id)
