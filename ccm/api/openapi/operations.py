"""The description of one operation: its parameters, its body and its responses."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.alias_generators import to_camel

from ccm.api.http.bodies import KEY_CHARACTERS
from ccm.api.http.cursor import HEADER
from ccm.api.http.paths import template
from ccm.api.http.route import EventStream, Messages, Route, View
from ccm.api.openapi.errors import BESIDE, COMMON, error_schema, errors_of, meaning
from ccm.api.openapi.schemas import Mode, Schemas, without_null
from ccm.errors import CCMError
from ccm.models.fields import NOT_BLANK

JSON = "application/json"
EVENT_STREAM = "text/event-stream"
# The meanings of the names in paths.
PATH_PARAMETERS = {
    "runId": "The id of a run.",
    "sessionId": "The id of a session, or the `sdkSessionId` of any of its runs.",
    "approvalId": "The id of an approval.",
}
TEXT = {"type": "string"}
ID = {"type": "string", "minLength": 1}
NUMBER = {"type": "integer", "minimum": 0}


def _header(description: str, schema: Mapping[str, Any] = TEXT, **more: Any) -> dict[str, Any]:
    return {"description": description, "schema": dict(schema), **more}


# The headers of responses.
HEADERS = {
    "Cache-Control": _header("Whether and how long the response may be kept."),
    "ETag": _header("Identifies the content, for `If-None-Match`. Only for what does not change."),
    "Idempotent-Replayed": _header("There if an earlier request with the same key started the run.", {"const": "true"}),
    "Link": _header('The URL of the next page, with `rel="next"`. Without it there are no more.'),
    "Location": _header("The URL of the run.", {"type": "string", "format": "uri-reference"}, required=True),
    "Retry-After": _header("When to try again (seconds); left out if that is not known.", NUMBER),
    "Vary": _header("The request headers that the content depends on."),
    "WWW-Authenticate": _header("The scheme of the token.", {"const": "Bearer"}, required=True),
    "X-Accel-Buffering": _header("Tells nginx not to buffer the events.", {"const": "no"}, required=True),
    "X-Request-Id": _header(
        "The id of the request in the service's log: the client's own, or a new one.", required=True
    ),
}
# The parameters in headers of requests.
IF_NONE_MATCH = {
    "name": "If-None-Match",
    "in": "header",
    "description": "The `ETag` of the content that the client has.",
    "schema": TEXT,
}
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "The client's own name for this request, such as a UUID. The same request with the same key is "
    "answered with the run that the first one started.",
    "schema": {"type": "string", "minLength": 1, "maxLength": KEY_CHARACTERS, **NOT_BLANK},
}
LAST_EVENT_ID = {
    "name": HEADER,
    "in": "header",
    "description": "The last id that was received, as a browser sends it. It counts more than `after`.",
    "schema": TEXT,
}


@dataclass(frozen=True)
class Operation:
    """A route with its view and the path under which the app has it, such as `/api/runs/<run_id>`."""

    route: Route
    view: View
    rule: str

    @property
    def id(self) -> str:
        return to_camel(self.view.__name__)

    @property
    def path(self) -> str:
        """The path as OpenAPI writes it, such as `/api/runs/{runId}`."""
        return template(self.rule)

    @property
    def path_parameters(self) -> list[str]:
        return re.findall(r"{(\w+)}", self.path)

    @property
    def is_stream(self) -> bool:
        return isinstance(self.route.returns, EventStream)

    def types(self) -> dict[str, tuple[Mode, Any]]:
        """Return the types whose schemas `describe` needs, each under a key."""
        route, needed = self.route, dict[str, tuple[Mode, Any]]()
        if route.query is not None:
            needed[f"{self.id} query"] = ("validation", route.query)
        if route.body is not None:
            needed[f"{self.id} body"] = ("validation", route.body)
        if isinstance(route.returns, EventStream):
            for frame in route.returns.frames:
                needed[f"{self.id} {frame.__name__}"] = ("serialization", frame)
        else:
            needed[f"{self.id} returns"] = ("serialization", route.returns)
        for error in route.errors:
            for name, shown in BESIDE.get(error, {}).items():
                needed[f"{self.id} {error.code} {name}"] = ("serialization", shown)
        return needed

    def describe(self, schemas: Schemas, examples: Mapping[str, Any]) -> dict[str, Any]:
        """Return the operation object.

        Args:
            schemas: has the schemas of `types`.
            examples: the example of the body under `request`, those of responses under their status.
        """
        route = self.route
        summary, _, description = (inspect.getdoc(self.view) or "").partition(".")
        described: dict[str, Any] = {
            "operationId": self.id,
            "tags": [route.blueprint.name],
            "summary": summary.replace("\n", " "),
        }
        if description.strip():
            described["description"] = _unwrapped(description)
        if not self._needs_token():
            described["security"] = []
        if parameters := [*self._path(), *self._query(schemas), *self._headers()]:
            described["parameters"] = parameters
        if route.body is not None:
            content = {"schema": schemas[f"{self.id} body"], **example_of(examples, "request")}
            described["requestBody"] = {"required": True, "content": {JSON: content}}
        responses = {
            str(status): self._success(status, text, schemas, examples) for status, text in route.status.items()
        }
        for status, errors in errors_of(route, self.path, self.path_parameters).items():
            responses[str(status)] = self._failure(status, errors, schemas, examples)
        described["responses"] = dict(sorted(responses.items()))
        return described

    def _needs_token(self) -> bool:
        return 401 in errors_of(self.route, self.path, self.path_parameters)

    def _path(self) -> list[dict[str, Any]]:
        return [
            {"name": name, "in": "path", "required": True, "description": PATH_PARAMETERS[name], "schema": ID}
            for name in self.path_parameters
        ]

    def _query(self, schemas: Schemas) -> list[dict[str, Any]]:
        if self.route.query is None:
            return []
        properties = schemas.inline(f"{self.id} query").get("properties", {})
        parameters = []
        for name, schema in properties.items():
            shown = without_null(schema)
            parameter = {"name": name, "in": "query", "description": shown.pop("description"), "schema": shown}
            if shown.get("type") == "object":
                parameter |= {"style": "form", "explode": True}
            parameters.append(parameter)
        return parameters

    def _headers(self) -> list[dict[str, Any]]:
        headers = []
        if self.route.takes_key:
            headers.append(IDEMPOTENCY_KEY)
        if self.is_stream:
            headers.append(LAST_EVENT_ID)
        if 304 in self.route.status:
            headers.append(IF_NONE_MATCH)
        return headers

    def _success(self, status: int, text: str, schemas: Schemas, examples: Mapping[str, Any]) -> dict[str, Any]:
        route = self.route
        names = []
        if route.query is not None and "cursor" in route.query.model_fields:
            names.append("Link")
        if route.takes_key:
            names += ["Idempotent-Replayed", "Location"]
        if self.is_stream and status == 200:
            names += ["Cache-Control", "X-Accel-Buffering"]
        if route.returns == Messages:
            names += ["Vary"] if status == 304 else ["Link", "Vary"]
        if 304 in route.status:
            names.append("ETag")
            names += ["Cache-Control"] if route.returns == Messages else []
        response = _response(text, names)
        if status not in (204, 304):
            example = example_of(examples, str(status))
            response["content"] = {
                EVENT_STREAM if self.is_stream else JSON: {"schema": self._returns(schemas), **example}
            }
        return response

    def _returns(self, schemas: Schemas) -> dict[str, Any]:
        returns = self.route.returns
        if not isinstance(returns, EventStream):
            return schemas[f"{self.id} returns"]
        frames = [schemas[f"{self.id} {frame.__name__}"] for frame in returns.frames]
        return {
            "type": "array",
            "items": {"oneOf": frames},
            "description": "Server-Sent Events. Each item has the fields of one event; its `data` is JSON on one line. "
            "The stream begins with `retry: 1000`, and in silence a comment comes every 15 seconds.",
        }

    def _failure(
        self, status: int, errors: tuple[type[CCMError], ...], schemas: Schemas, examples: Mapping[str, Any]
    ) -> dict[str, Any]:
        if errors == COMMON.get(status):
            return {"$ref": f"#/components/responses/Error{status}"}
        schema = error_schema(errors)
        for error in errors:
            beside = BESIDE.get(error, {})
            schema["properties"] |= {name: schemas[f"{self.id} {error.code} {name}"] for name in beside}
        reference = schemas.add(f"{self.id[0].upper()}{self.id[1:]}Error{status}", schema)
        return failure(errors, reference, example_of(examples, str(status)))


def failure(
    errors: tuple[type[CCMError], ...], schema: Mapping[str, Any], example: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the response object of errors with one status."""
    names = []
    if errors[0].status == 401:
        names.append("WWW-Authenticate")
    if any(error.retry_after is not None for error in errors):
        names.append("Retry-After")
    text = "\n".join(f"- `{error.code}`: {meaning(error)}" for error in errors)
    return {**_response(text, names), "content": {JSON: {"schema": dict(schema), **example}}}


def _response(text: str, headers: list[str]) -> dict[str, Any]:
    names = sorted({*headers, "X-Request-Id"})
    return {"description": text, "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names}}


def example_of(examples: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the `example` of a media type, if there is one under the key."""
    return {"example": examples[key]} if key in examples else {}


def _unwrapped(text: str) -> str:
    """Return a docstring's text with one line for each paragraph."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))
