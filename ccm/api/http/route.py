"""What a route takes and what it answers with, declared in one place: its view's decorator.

From the declaration comes the validation of each request, and, later, the description of the API.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from flask import Blueprint, Response, request
from pydantic.alias_generators import to_camel

from ccm.api.http.bodies import read_body, refuse_idempotency_key
from ccm.api.http.context import service
from ccm.api.http.options import Strict
from ccm.api.http.query import Query
from ccm.errors import ValidationError

EVENT_STREAM = "text/event-stream"
# Messages as the SDK gave them, which nothing here parses.
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Route:
    """
    Args:
        query: its parameters; the view gets them as `query`, unless it takes none.
        body: its body, if it has one; the view gets it as `body`.
        returns: the type that its JSON has, or a media type.
        status: those of its answers that are no refusals.
        takes_key: whether it heeds an Idempotency-Key.
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
    """Register a view: it is called with what its request holds, checked.

    Raises, when a request is not as declared:
        ValidationError: says which parameter, header or field is at fault.
        UnsupportedMediaType, TooLarge: the body cannot be read.
    """
    declared = Route(query, body, returns, status, takes_key)

    def decorate(view: View) -> View:
        @wraps(view)
        def checked(**path_values: str) -> Response:
            words: dict[str, Any] = dict(path_values)
            asked = query.read(request.args)
            if query is not Query:
                words["query"] = asked
            for name, text in path_values.items():
                _check_path(text, to_camel(name))
            if method == "POST" and not takes_key:
                refuse_idempotency_key(request)
            if body is not None:
                words["body"] = read_body(request, body, service().settings.max_body_bytes)
            return view(**words)

        checked.declared = declared  # type: ignore[attr-defined]  # for the description of the API
        blueprint.add_url_rule(path, view_func=checked, methods=[method])
        return checked

    return decorate


def _check_path(text: str, field: str) -> None:
    """
    Raises:
        ValidationError: it has a NUL, which PostgreSQL cannot even compare.
    """
    if "\0" in text:
        raise ValidationError(f"{field}: must not contain the character NUL.", field=field)
