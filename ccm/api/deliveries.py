"""`/api/runs/:runId/deliveries`: the webhooks of a run, and their attempts."""

from __future__ import annotations

from flask import Blueprint, Response

from ccm.api.http.extensions import service
from ccm.api.http.pagination import page
from ccm.api.http.query import PageQuery
from ccm.api.http.route import route
from ccm.models import Delivery

blueprint = Blueprint("deliveries", __name__, url_prefix="/api/runs")


@route(blueprint, "GET", "/<run_id>/deliveries", query=PageQuery, returns=list[Delivery])
def deliveries(run_id: str, query: PageQuery) -> Response:
    """List the webhooks of a run, each with its attempts, oldest first."""
    queries = service().queries
    return page(
        query,
        lambda limit, after: queries.deliveries(run_id, limit=limit, after=after),
        lambda delivery: delivery.id,
    )
