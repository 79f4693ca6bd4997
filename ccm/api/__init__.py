"""The HTTP API, one file per family of URLs. Within ccm/, only `cli` and server/server.py import Flask too.

Views parse a request, call the core and answer. Each request is admitted, gets a request id and is logged here.
"""

from __future__ import annotations

import logging
import re
import uuid
from functools import partial
from threading import Semaphore

from flask import Flask, Response, g, request
from werkzeug.exceptions import NotFound
from werkzeug.routing import RequestRedirect

from ccm.api import approvals, docs, events, health, runs, sessions
from ccm.api.http.admission import Admission
from ccm.api.http.extensions import DOCUMENT, HELD_SLOTS, REFERENCE, SERVICE, service
from ccm.api.http.paths import IdConverter
from ccm.api.http.proxy import Forwarded, check_forwarded
from ccm.api.http.responses import register_error_handlers
from ccm.api.http.tokens import Tokens
from ccm.api.openapi.document import Document
from ccm.api.reference import Reference
from ccm.core.service import Service

log = logging.getLogger(__name__)

# A client's own request id is adopted if it looks like this, so that both logs can be read together.
REQUEST_ID = re.compile(r"[\w.:-]{1,100}", re.ASCII)


def register(app: Flask, the_service: Service) -> None:
    """Add the API to an app. Open nothing, and start no thread."""
    settings = the_service.settings
    app.extensions |= {SERVICE: the_service, HELD_SLOTS: Semaphore(settings.max_held), DOCUMENT: Document(app)}
    app.extensions[REFERENCE] = Reference()
    app.wsgi_app = Forwarded(  # type: ignore[method-assign]
        app.wsgi_app, settings.trusted_proxy, settings.url_prefix
    )
    app.before_request(partial(_begin, Admission(settings.allowed_hosts, Tokens(settings))))
    app.after_request(_finish)
    register_error_handlers(app)
    app.url_map.converters["default"] = IdConverter
    for module in (health, runs, sessions, approvals, events, docs):
        app.register_blueprint(module.blueprint)


def _begin(admission: Admission) -> None:
    given = request.headers.get("X-Request-Id", "")
    g.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    check_forwarded(request.environ)
    g.client = admission.check(request)
    if isinstance(request.routing_exception, RequestRedirect):
        raise NotFound  # an empty path; this API answers with no redirects
    # Under `flask run` the first request starts the service; under `python app.py` it has been started.
    service().start()


def _finish(response: Response) -> Response:
    request_id = g.get("request_id", "")
    response.headers["X-Request-Id"] = request_id
    level = logging.DEBUG if request.method in ("GET", "HEAD", "OPTIONS") else logging.INFO
    if log.isEnabledFor(level):
        by_client = f" by {g.client}" if g.get("client") else ""
        values = (request.method, request.path, response.status_code, request_id, request.remote_addr, by_client)
        extra = {"event": "request_answered", "request_id": request_id}
        log.log(level, "%s %s %s request %s from %s%s", *values, extra=extra)
    return response
