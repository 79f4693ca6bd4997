"""`/health` for monitoring, `/` for an overview, `/openapi.json` for a description of the API."""

from __future__ import annotations

import inspect
import re
from typing import Annotated, Any, Literal, NotRequired

from flask import Blueprint, Response, current_app, request
from pydantic import Field
from pydantic.alias_generators import to_camel
from typing_extensions import TypedDict

from ccm import __version__
from ccm.api.http.extensions import document, service
from ccm.api.http.responses import Problems, json_response
from ccm.api.http.route import Route
from ccm.errors import Unhealthy

blueprint = Blueprint("health", __name__)


class Health(TypedDict):
    """The answer of a service that works."""

    status: Literal["ok"]
    problems: NotRequired[Problems]


class Endpoint(TypedDict):
    """An operation of the API."""

    method: Annotated[str, Field(description="The HTTP method.")]
    path: Annotated[str, Field(description="The path, with the names of its parameters.")]
    does: Annotated[str, Field(description="What the operation does.")]


class Overview(TypedDict):
    """What this service is."""

    name: Annotated[str, Field(description="The name of the service's software.")]
    version: Annotated[str, Field(description="The version of the service's software.")]
    endpoints: Annotated[list[Endpoint], Field(description="The operations, by path and method.")]


# Without a check of the parameters, because monitoring may add some of its own.
@Route(blueprint, "GET", "/health", query=None, returns=Health, errors=(Unhealthy,))
def get_health() -> Response:
    """Report whether the service works."""
    last_error = service().last_error()
    problems = service().problems.sentences()
    if last_error is not None:
        raise Unhealthy(f"The service cannot do its job: {last_error}.", problems)
    return json_response({"status": "ok", **({"problems": problems} if problems else {})})


@Route(
    blueprint,
    "GET",
    "/openapi.json",
    returns=dict[str, Any],
    status={200: "The document.", 304: "The client has it: `If-None-Match` names its `ETag`."},
)
def get_openapi() -> Response:
    """Describe the API as an OpenAPI document."""
    response = Response(document().text(request.script_root), mimetype="application/json")
    response.add_etag()
    response.make_conditional(request)
    return response


@Route(blueprint, "GET", "/", returns=Overview)
def get_overview() -> Response:
    """Return the name, the version and the endpoints."""
    endpoints: list[dict[str, str]] = []
    for rule in current_app.url_map.iter_rules():
        view = current_app.view_functions[rule.endpoint]
        does = (inspect.getdoc(view) or "").partition("\n")[0]
        path = re.sub(r"<(\w+)>", lambda name: f":{to_camel(name[1])}", rule.rule)
        methods = (rule.methods or set()) - {"HEAD", "OPTIONS"}
        endpoints.extend({"method": method, "path": path, "does": does} for method in methods)
    endpoints.sort(key=lambda endpoint: (endpoint["path"], endpoint["method"]))
    return json_response({"name": "CC Manager", "version": __version__, "endpoints": endpoints})
