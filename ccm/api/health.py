"""`/health` for monitoring, `/` for an overview."""

from __future__ import annotations

import inspect
from typing import Any

from flask import Blueprint, Response, current_app

from ccm import __version__
from ccm.api.http.extensions import service
from ccm.api.http.paths import template
from ccm.api.http.responses import json_response
from ccm.api.http.route import Route

blueprint = Blueprint("health", __name__)


@blueprint.get("/health")
def health() -> Response:
    """Report whether the service works."""
    last_error = service().last_error()
    sentences = service().problems.sentences()
    problems = {"problems": sentences} if sentences else {}
    if last_error is None:
        return json_response({"status": "ok"} | problems)
    error = {"code": "UNHEALTHY", "message": f"The service cannot do its job: {last_error}."}
    return json_response({"status": "unavailable", "error": error} | problems, 503, {"Retry-After": "5"})


@Route(blueprint, "GET", "/", returns=dict[str, Any])
def index() -> Response:
    """Return the name, the version and the endpoints."""
    endpoints: list[dict[str, str]] = []
    for rule in current_app.url_map.iter_rules():
        view = current_app.view_functions[rule.endpoint]
        does = (inspect.getdoc(view) or "").partition("\n")[0]
        methods = (rule.methods or set()) - {"HEAD", "OPTIONS"}
        endpoints.extend({"method": method, "path": template(rule), "does": does} for method in methods)
    endpoints.sort(key=lambda endpoint: (endpoint["path"], endpoint["method"]))
    return json_response({"name": "CC Manager", "version": __version__, "endpoints": endpoints})
