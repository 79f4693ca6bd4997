"""The errors that an operation can answer with."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ccm.api.http.admission import OPEN_PATHS
from ccm.api.http.responses import Problems
from ccm.api.http.route import EventStream, Messages, Route
from ccm.errors import (
    ApprovalNotFound,
    ApprovalResolved,
    BadRequest,
    CCMError,
    HeadersTooLarge,
    HostForbidden,
    InternalError,
    KeyReused,
    NotStarted,
    OriginForbidden,
    OutcomeUnknown,
    OutOfDisk,
    QueueFull,
    RunNotFound,
    SessionNotFound,
    ShuttingDown,
    SlotsTaken,
    StorageUnavailable,
    TooLarge,
    Unauthorized,
    Unhealthy,
    UnknownCoding,
    UnsupportedMediaType,
    ValidationError,
)
from ccm.models import Approval

# Errors of the server, of the admission checks, and of a service that fails.
ANY_REQUEST = (
    BadRequest,
    HeadersTooLarge,
    HostForbidden,
    InternalError,
    NotStarted,
    OriginForbidden,
    UnknownCoding,
    ValidationError,
)
WITH_TOKEN = (Unauthorized,)
WITH_BODY = (OutOfDisk, TooLarge, UnsupportedMediaType)
WITH_DATABASE = (ShuttingDown, StorageUnavailable)
# Errors of operations that write.
WITH_WRITER = (OutcomeUnknown,)
HELD_OPEN = (SlotsTaken,)
WITH_KEY = (KeyReused,)
# Errors of operations that look up an id, by the name of its field or parameter.
LOOKUPS: Mapping[str, type[CCMError]] = {
    "runId": RunNotFound,
    "atRunId": RunNotFound,
    "sessionId": SessionNotFound,
    "approvalId": ApprovalNotFound,
}
# The types of the fields that some errors have beside `error`.
BESIDE: Mapping[type[CCMError], Mapping[str, Any]] = {
    ApprovalResolved: {"approval": Approval},
    Unhealthy: {"status": Literal["unavailable"], "problems": Problems},
}
Errors = dict[int, tuple[type[CCMError], ...]]


def errors_of(route: Route, path: str, path_parameters: Iterable[str]) -> Errors:
    """Return the errors of a route by HTTP status.

    Args:
        path: the whole path.
        path_parameters: the names in it.
    """
    found: set[type[CCMError]] = {*ANY_REQUEST, *route.errors}
    if path not in OPEN_PATHS:
        found.update(WITH_TOKEN)
    if path.startswith("/api/"):
        found.update(WITH_DATABASE)
    if route.method != "GET":
        found.update(WITH_WRITER)
    if route.body is not None:
        found.update(WITH_BODY)
    if route.takes_key:
        found.update(WITH_KEY)
    if route.returns == Messages or isinstance(route.returns, EventStream):
        found.update(HELD_OPEN)
    names = {*path_parameters, *(route.query.model_fields if route.query else ())}
    names.update(route.body.model_fields if route.body else ())
    found.update(error for name, error in LOOKUPS.items() if name in names)
    return by_status(found)


def by_status(errors: Iterable[type[CCMError]]) -> Errors:
    """Return errors by HTTP status, each list in the order of the codes."""
    grouped: Errors = {}
    for error in sorted(errors, key=lambda error: (error.status, error.code)):
        grouped[error.status] = (*grouped.get(error.status, ()), error)
    return grouped


# Errors that several operations have in common. Their responses are described once.
COMMON = by_status((*ANY_REQUEST, *WITH_TOKEN, *WITH_DATABASE, *WITH_KEY, QueueFull, TooLarge, UnsupportedMediaType))


def meaning(error: type[CCMError]) -> str:
    """Return the sentence about an error."""
    return (inspect.getdoc(error) or "").partition("\n\n")[0].replace("\n", " ")


def error_schema(errors: Iterable[type[CCMError]]) -> dict[str, Any]:
    """Return the JSON schema of the response to one of these errors, without the fields in BESIDE."""
    code = {"type": "string", "enum": [error.code for error in errors], "description": "Which error it is."}
    message = {"type": "string", "description": "What is wrong, and what to do about it."}
    field = {"type": "string", "description": "The field, parameter or header at fault, if it is one."}
    error = {
        "type": "object",
        "properties": {"code": code, "message": message, "field": field},
        "required": ["code", "message"],
    }
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}
