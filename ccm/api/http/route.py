"""The decorator that declares a route: its parameters, its body, its responses and its errors.

The declaration validates each request. What it says about the responses is not checked at run time: api/openapi
describes the API by it, and the tests check every response that they receive against that description.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import wraps
from typing import Any

from flask import Blueprint, Response, request
from pydantic import BaseModel
from pydantic.alias_generators import to_camel

from ccm.api.http.bodies import read_body, refuse_idempotency_key
from ccm.api.http.extensions import service
from ccm.api.http.options_body import Strict
from ccm.api.http.query import Query
from ccm.errors import CCMError, ValidationError
from ccm.models import SDKMessage

View = Callable[..., Response]
Messages = list[SDKMessage]


@dataclass(frozen=True)
class EventStream:
    """A response of Server-Sent Events. `frames` are the models of the events."""

    frames: tuple[type[BaseModel], ...]


@dataclass(frozen=True)
class Route:
    """The declaration of a route. It decorates a view, which is called with validated parameters and a validated body.

    The view's name in camelCase is the operation's id. Its docstring is the operation's description for clients; the
    first sentence is the summary.

    Args:
        returns: the type of its JSON, or its EventStream.
        query: the model of its parameters. The view gets them as `query`, unless there are none. None: any parameters
            are accepted and ignored.
        body: the model of its body, if it has one. The view gets it as `body`.
        status: the meaning of each status of its successful responses.
        takes_key: whether it supports an Idempotency-Key.
        errors: the errors that do not follow from the rest of the declaration (api/openapi/errors.py).
    """

    blueprint: Blueprint
    method: str
    path: str
    _: KW_ONLY
    returns: Any
    query: type[Query] | None = Query
    body: type[Strict] | None = None
    status: Mapping[int, str] = field(default_factory=lambda: {200: "The answer."})
    takes_key: bool = False
    errors: tuple[type[CCMError], ...] = ()

    def __call__(self, view: View) -> View:
        """Register the view.

        Raises, during a request:
            ValidationError: names the invalid parameter, header or field.
            UnsupportedMediaType, TooLarge: the body cannot be read.
        """

        @wraps(view)
        def checked(**path_values: str) -> Response:
            arguments: dict[str, Any] = dict(path_values)
            if self.query is not None:
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

        checked.declared = self  # type: ignore[attr-defined]  # read by api/openapi
        self.blueprint.add_url_rule(self.path, view_func=checked, methods=[self.method])
        return checked
