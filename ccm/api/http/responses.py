"""JSON responses, and the response to each kind of exception."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Annotated, Any

from flask import Flask, Response, g, request
from pydantic import Field
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from ccm.errors import CCMError, InternalError, NotStarted, StartRefused

log = logging.getLogger(__name__)


Problems = Annotated[
    list[str],
    Field(description="The faults of the service that persist, a sentence each; left out if there are none."),
]


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON response in ASCII, because a lone surrogate in a message cannot be encoded as UTF-8."""
    return Response(json.dumps(body) + "\n", status, headers, mimetype="application/json")


def register_error_handlers(app: Flask) -> None:
    """Answer every exception with JSON."""
    app.register_error_handler(CCMError, _service_error)
    app.register_error_handler(StartRefused, _not_started)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unexpected_error)


def _service_error(error: CCMError) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error.to_json(), error.status, headers)


def _not_started(refusal: StartRefused) -> Response:
    """Answer under `flask run`, where the first request starts the service."""
    log.error("the service does not start: %s", refusal, extra={"event": "start_refused"})
    return _service_error(NotStarted("The service does not start. Its log says why."))


def _http_error(error: HTTPException) -> Response:
    """Replace the HTML of Flask's own errors."""
    status = error.code or 500
    code = re.sub(r"\W+", "_", error.name).upper()
    messages = {
        404: f"There is nothing at {request.path}. GET / lists the endpoints.",
        405: f"{request.method} is not possible here. GET / lists the endpoints.",
    }
    message = messages.get(status, str(error.description))
    headers = {}
    if isinstance(error, MethodNotAllowed) and error.valid_methods:
        headers["Allow"] = ", ".join(sorted(error.valid_methods))
    return json_response({"error": {"code": code, "message": message}}, status, headers)


def _unexpected_error(error: Exception) -> Response:
    request_id = g.get("request_id")
    extra = {"event": "request_failed", "request_id": request_id}
    log.error("request %s: %s %s failed", request_id, request.method, request.path, exc_info=error, extra=extra)
    return _service_error(InternalError(f"The service failed. Its log says more about request {request_id}."))
