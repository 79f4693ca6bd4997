"""The decorator that declares a route: its parameters, its body and its response.

The declaration validates each request. What it says about the response is not checked at run time; it is meant for a
description of the API.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
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
View = Callable[..., Response]


@dataclass(frozen=True)
class Route:
    """The declaration of a route. It decorates a view, which is called with validated parameters and a validated body.

    Args:
        returns: the type of its JSON, or a media type.
        query: the model of its parameters. The view gets them as `query`, unless there are none.
        body: the model of its body, if it has one. The view gets it as `body`.
        status: the statuses of its successful responses.
        takes_key: whether it supports an Idempotency-Key.
    """

    blueprint: Blueprint
    method: str
    path: str
    _: KW_ONLY
    returns: Any
    query: type[Query] = Query
    body: type[Strict] | None = None
    status: tuple[int, ...] = (200,)
    takes_key: bool = False

    def __call__(self, view: View) -> View:
        """Register the view.

        Raises, during a request:
            ValidationError: names the invalid parameter, header or field.
            UnsupportedMediaType, TooLarge: the body cannot be read.
        """

        @wraps(view)
        def checked(**path_values: str) -> Response:
            arguments: dict[str, Any] = dict(path_values)
            parameters = self.query.read(request.args)
            if self.query is not Query:
                arguments["query"] = parameters
            for name, text in path_values.items():
                if "\0" in text:  # PostgreSQL cannot even compare it
                    field = to_camel(name)
                    raise ValidationError(f"{field}: must not contain the character NUL.", field=field)
            if self.method == "POST" and not self.takes_key:
                refuse_idempotency_key(request)
            if self.body is not None:
                arguments["body"] = read_body(request, self.body, service().settings.max_body_bytes)
            return view(**arguments)

        checked.declared = self  # type: ignore[attr-defined]  # for the description of the API
        self.blueprint.add_url_rule(self.path, view_func=checked, methods=[self.method])
        return checked
