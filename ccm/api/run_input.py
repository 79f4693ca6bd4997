"""`/api/runs/:runId/input`: a user's message for a run that is going on."""

from __future__ import annotations

from flask import Blueprint, Response

from ccm.api.http.bodies import InputBody
from ccm.api.http.context import json_response, service
from ccm.api.http.route import route
from ccm.core.runs.input import TakenIn

blueprint = Blueprint("follow_ups", __name__, url_prefix="/api/runs")


@route(blueprint, "POST", "/<run_id>/input", body=InputBody, returns=TakenIn, status=(202,))
def put(run_id: str, body: InputBody) -> Response:
    """Put a user's message into a run that is going on."""
    return json_response(service().input.put(run_id, body.prompt, body.pictures()).to_json(), 202)
