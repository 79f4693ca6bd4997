"""The HTTP floor: the only one that knows Flask. Views parse, call the core, and answer."""

from __future__ import annotations

import logging
import re
import uuid

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound
from werkzeug.routing import RequestRedirect

from ccm.api import approvals, deliveries, events, health, run_input, runs, sessions
from ccm.api.http.context import EXTENSION, guard, json_response, service
from ccm.api.http.guard import Guard
from ccm.api.http.proxy import Forwarded, check_forwarded
from ccm.api.http.request_limiter import RequestLimiter
from ccm.api.http.tokens import Tokens
from ccm.core.service import Service
from ccm.errors import CCMError, StartRefused

log = logging.getLogger(__name__)

# A request id of the client's own is taken over, so that its log and ours can be read together.
REQUEST_ID = re.compile(r"[\w.:-]{1,100}", re.ASCII)


def register(app: Flask, the_service: Service) -> None:
    """Give an app the API. Opens nothing and starts no thread."""
    app.extensions[EXTENSION] = the_service
    app.extensions["ccm.held"] = RequestLimiter(the_service.settings.max_held)
    app.extensions["ccm.guard"] = Guard(the_service.settings.allowed_hosts, Tokens(the_service.settings))
    app.wsgi_app = Forwarded(  # type: ignore[method-assign]
        app.wsgi_app, the_service.settings.trusted_proxy, the_service.settings.url_prefix
    )
    app.before_request(_begin)
    app.after_request(_finish)
    app.register_error_handler(CCMError, _refuse)
    app.register_error_handler(StartRefused, _not_started)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unexpected)
    for module in (health, runs, run_input, sessions, approvals, events, deliveries):
        app.register_blueprint(module.blueprint)


def _begin() -> None:
    given = request.headers.get("X-Request-Id", "")
    g.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    check_forwarded(request.environ)
    g.client = guard().admit(request)
    if isinstance(request.routing_exception, RequestRedirect):
        raise NotFound  # of an empty path; a redirect is no answer of this API
    # Under `flask run` the first request starts the service; under `python app.py` it has been started.
    service().start()


def _finish(response: Response) -> Response:
    response.headers["X-Request-Id"] = g.get("request_id", "")
    level = logging.DEBUG if request.method in ("GET", "HEAD", "OPTIONS") else logging.INFO
    if log.isEnabledFor(level):
        whose = f" by {g.client}" if g.get("client") else ""
        said = (request.method, request.path, response.status_code, g.get("request_id"), request.remote_addr, whose)
        log.log(level, "%s %s %s request %s from %s%s", *said)
    return response


def _refuse(error: CCMError) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error.to_json(), error.status, headers)


def _not_started(refusal: StartRefused) -> Response:
    """Under `flask run` only: the first request starts the service."""
    log.error("the service does not start: %s", refusal)
    error = {"code": "NOT_STARTED", "message": "The service does not start. Its log says why."}
    return json_response({"error": error}, 503)


def _http_error(error: HTTPException) -> Response:
    """Flask's own refusals, in our words."""
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


def _unexpected(error: Exception) -> Response:
    log.error("request %s: %s %s failed", g.get("request_id"), request.method, request.path, exc_info=error)
    message = f"The service failed. Its log says more about request {g.get('request_id')}."
    return json_response({"error": {"code": "INTERNAL_ERROR", "message": message}}, 500)
