"""`/api/runs/:runId/input`: a user's message for a run that is going on."""

from __future__ import annotations

from flask import Blueprint, Response, request

from ccm.api.http.bodies import InputBody, read_body, refuse_idempotency_key
from ccm.api.http.context import check_query, json_response, service
from ccm.api.runs import plain

blueprint = Blueprint("follow_ups", __name__, url_prefix="/api/runs")


@blueprint.post("/<run_id>/input")
def put(run_id: str) -> Response:
    """Put a user's message into a run that is going on."""
    check_query()
    refuse_idempotency_key(request)
    body = read_body(request, InputBody, service().settings.max_body_bytes)
    return json_response(service().input.put(plain(run_id, "runId"), body.prompt, body.pictures()).to_json(), 202)
