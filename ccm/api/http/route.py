"""The decorator that declares a route: its parameters, its body and its response.

The declaration validates each request. It is also meant for the description of the API.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from flask import Blueprint, Response, request
from pydantic.alias_generators import to_camel

from ccm.api.http.bodies import read_body, refuse_idempotency_key
from ccm.api.http.extensions import service
from ccm.api.http.options_body import Strict
from ccm.api.http.query import Query
from ccm.errors import ValidationError

EVENT_STREAM = "text/event-stream"
# The JSON of SDK messages, which is not parsed.
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Route:
    """The declaration of a route.

    Args:
        query: the model of its parameters. The view gets them as `query`, unless there are none.
        body: the model of its body, if it has one. The view gets it as `body`.
        returns: the type of its JSON, or a media type.
        status: the statuses of its successful responses.
        takes_key: whether it supports an Idempotency-Key.
    """

    query: type[Query]
    body: type[Strict] | None
    returns: Any
    status: tuple[int, ...]
    takes_key: bool


View = Callable[..., Response]


def route(
    blueprint: Blueprint,
    method: str,
    path: str,
    *,
    query: type[Query] = Query,
    body: type[Strict] | None = None,
    returns: Any,
    status: tuple[int, ...] = (200,),
    takes_key: bool = False,
) -> Callable[[View], View]:
    """Register a view, which is called with the validated parameters and body of a request.

    Raises, during a request:
        ValidationError: names the invalid parameter, header or field.
        UnsupportedMediaType, TooLarge: the body cannot be read.
    """
    declared = Route(query, body, returns, status, takes_key)

    def decorate(view: View) -> View:
        @wraps(view)
        def checked(**path_values: str) -> Response:
            arguments: dict[str, Any] = dict(path_values)
            parameters = query.read(request.args)
            if query is not Query:
                arguments["query"] = parameters
            for name, text in path_values.items():
                _check_path(text, to_camel(name))
            if method == "POST" and not takes_key:
                refuse_idempotency_key(request)
            if body is not None:
                arguments["body"] = read_body(request, body, service().settings.max_body_bytes)
            return view(**arguments)

        checked.declared = declared  # type: ignore[attr-defined]  # for the description of the API
        blueprint.add_url_rule(path, view_func=checked, methods=[method])
        return checked

    return decorate


def _check_path(text: str, field: str) -> None:
    """Refuse a path value with a NUL, because PostgreSQL cannot even compare it.

    Raises:
        ValidationError: names the field.
    """
    if "\0" in text:
        raise ValidationError(f"{field}: must not contain the character NUL.", field=field)
