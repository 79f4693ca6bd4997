"""The description of the API takes nothing away from clients, unless accepted_breaks.txt says so."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from tests.api.openapi.breaks import accepted, breaks
from tests.contract import STORED, Json

START = "/api/runs/start"
RUN = "/api/runs/{runId}"
ROOT = STORED.parents[3]


@pytest.fixture(scope="module")
def stored() -> Json:
    document: Json = json.loads(STORED.read_text(encoding="utf-8"))
    return document


def published() -> str | None:
    """Return the description of the last commit on main; None before the first, and in a copy without git."""
    for branch in ("origin/main", "main"):
        name = f"{branch}:{STORED.relative_to(ROOT)}"
        shown = subprocess.run(["git", "show", name], cwd=ROOT, capture_output=True, text=True, check=False)
        if shown.returncode == 0:
            return shown.stdout
    return None


def test_clients_of_the_last_commit_on_main_do_not_break(stored: Json) -> None:
    before = published()
    found = set() if before is None else set(breaks(json.loads(before), stored))

    assert found - accepted() == set()


def test_a_description_does_not_break_its_own_clients(stored: Json) -> None:
    assert breaks(stored, stored) == []


def schema(document: Json, name: str) -> Any:
    return document["components"]["schemas"][name]


def operation(document: Json, path: str, method: str) -> Any:
    return document["paths"][path][method]


def parameter(document: Json, path: str, method: str, name: str) -> Any:
    return next(each for each in operation(document, path, method)["parameters"] if each["name"] == name)


def remove_parameter(document: Json) -> None:
    parameters = operation(document, "/api/runs", "get")["parameters"]
    parameters.remove(parameter(document, "/api/runs", "get", "cwd"))


def add_parameter(document: Json, *, required: bool) -> None:
    added = {"name": "new", "in": "query", "required": required, "schema": {"type": "string"}}
    operation(document, "/api/runs", "get")["parameters"].append(added)


def not_null(document: Json) -> None:
    schema(document, "Options")["properties"]["maxTurns"]["anyOf"].pop()


def null(document: Json) -> None:
    count = schema(document, "Session")["properties"]["runCount"]
    schema(document, "Session")["properties"]["runCount"] = {"anyOf": [dict(count), {"type": "null"}]}


def frame(document: Json) -> Any:
    content = operation(document, f"{RUN}/stream", "get")["responses"]["200"]["content"]["text/event-stream"]
    return content["schema"]["items"]["oneOf"]


BREAKING: list[tuple[str, Callable[[Json], object]]] = [
    ("DELETE /api/runs/{runId} is gone", lambda d: d["paths"][RUN].pop("delete")),
    ("GET /api/events is gone", lambda d: d["paths"].pop("/api/events")),
    (f"POST {START}: the operationId startRun is gone", lambda d: operation(d, START, "post").update(operationId="x")),
    ("GET /api/runs: the parameter cwd is gone", remove_parameter),
    ("GET /api/runs: the parameter new is required", lambda d: add_parameter(d, required=True)),
    (
        "GET /api/runs: the parameter limit is required",
        lambda d: parameter(d, "/api/runs", "get", "limit").update(required=True),
    ),
    (
        "GET /api/runs limit: maximum is 500",
        lambda d: parameter(d, "/api/runs", "get", "limit")["schema"].update(maximum=500),
    ),
    (
        "GET /api/runs limit: the default 100 has changed",
        lambda d: parameter(d, "/api/runs", "get", "limit")["schema"].update(default=50),
    ),
    ('GET /api/runs status: the value "error" is gone', lambda d: schema(d, "RunStatus")["enum"].remove("error")),
    ('GET /api/runs 200[].status: the value "error" is gone', lambda d: schema(d, "RunStatus")["enum"].remove("error")),
    ("GET /api/runs 200[].costUsd is gone", lambda d: schema(d, "Run")["properties"].pop("costUsd")),
    ("GET /api/runs 200[].costUsd may be left out", lambda d: schema(d, "Run")["required"].remove("costUsd")),
    ("GET /api/runs 200[].cwd: string is gone", lambda d: schema(d, "Run")["properties"]["cwd"].update(type="integer")),
    ("GET /api/sessions/{sessionId} 200.runCount: may be null", null),
    (f"POST {START} body.title is gone", lambda d: schema(d, "StartBody")["properties"].pop("title")),
    (f"POST {START} body.title is required", lambda d: schema(d, "StartBody")["required"].append("title")),
    (
        f"POST {START} body.prompt: maxLength is 10",
        lambda d: schema(d, "StartBody")["properties"]["prompt"].update(maxLength=10),
    ),
    (
        f"POST {START} body.prompt: the pattern has changed",
        lambda d: schema(d, "StartBody")["properties"]["prompt"].update(pattern="x"),
    ),
    (
        f"POST {START} body.prompt: only some values are allowed",
        lambda d: schema(d, "StartBody")["properties"]["prompt"].update(enum=["x"]),
    ),
    (f"POST {START} body.options.maxTurns: null is gone", not_null),
    (
        'POST /api/runs/start body.options.agents[].memory: the value "local" is gone',
        lambda d: schema(d, "Agent")["properties"]["memory"]["anyOf"][0]["enum"].remove("local"),
    ),
    (
        f"POST {START} body.options.thinking: object adaptive is gone",
        lambda d: schema(d, "Options")["properties"]["thinking"]["anyOf"][0]["oneOf"].pop(0),
    ),
    (f"POST {START}: the status 202 is gone", lambda d: operation(d, START, "post")["responses"].pop("202")),
    (
        f"POST {START} 202: the header Location is gone",
        lambda d: operation(d, START, "post")["responses"]["202"]["headers"].pop("Location"),
    ),
    (
        f'POST {START} 403.error.code: the value "CWD_FORBIDDEN" is gone',
        lambda d: schema(d, "StartRunError403")["properties"]["error"]["properties"]["code"]["enum"].remove(
            "CWD_FORBIDDEN"
        ),
    ),
    (
        'GET /api/runs 400.error.code: the value "VALIDATION_ERROR" is gone',
        lambda d: schema(d, "Error400")["properties"]["error"]["properties"]["code"]["enum"].remove("VALIDATION_ERROR"),
    ),
    (f"GET {RUN}/stream 200[]: object end is gone", lambda d: frame(d).pop()),
    (f"GET {RUN}/stream 200[].id is gone", lambda d: schema(d, "MessageFrame")["properties"].pop("id")),
    (
        "GET /api/runs 200: application/json is gone",
        lambda d: operation(d, "/api/runs", "get")["responses"]["200"].update(content={}),
    ),
    (f"POST {START}: the body is gone", lambda d: operation(d, START, "post").pop("requestBody")),
    (f"DELETE {RUN}: a body is required", lambda d: operation(d, RUN, "delete").update(requestBody={"required": True})),
    ("webhook event is gone", lambda d: d["webhooks"].pop("event")),
    (
        "webhook event: webhook-id is gone",
        lambda d: d["webhooks"]["event"]["post"]["parameters"].pop(0),
    ),
    ("webhook event.timestamp is gone", lambda d: schema(d, "RunEvent")["properties"].pop("timestamp")),
    ("GET /health: the security has changed", lambda d: operation(d, "/health", "get").pop("security")),
]
HARMLESS: list[tuple[str, Callable[[Json], object]]] = [
    ("an operation", lambda d: d["paths"].update({"/new": d["paths"]["/health"]})),
    ("an optional parameter", lambda d: add_parameter(d, required=False)),
    ("a field of a response", lambda d: schema(d, "Run")["properties"].update(new={"type": "string"})),
    ("a required field of a response", lambda d: schema(d, "Run")["required"].append("new")),
    ("an optional field of a body", lambda d: schema(d, "StartBody")["properties"].update(new={"type": "string"})),
    ("a value", lambda d: schema(d, "RunStatus")["enum"].append("new")),
    ("a higher limit", lambda d: parameter(d, "/api/runs", "get", "limit")["schema"].update(maximum=5_000)),
    ("a status", lambda d: operation(d, START, "post")["responses"].update({"418": {"description": "x"}})),
    ("an event of a stream", lambda d: frame(d).append({"type": "object", "properties": {"event": {"const": "new"}}})),
    ("another description", lambda d: schema(d, "Run").update(description="x")),
]


@pytest.mark.parametrize(("sentence", "change"), BREAKING, ids=[sentence for sentence, _ in BREAKING])
def test_what_breaks_clients_is_noticed(stored: Json, sentence: str, change: Callable[[Json], object]) -> None:
    changed = copy.deepcopy(stored)
    change(changed)

    assert sentence in breaks(stored, changed)


@pytest.mark.parametrize(("name", "change"), HARMLESS, ids=[name for name, _ in HARMLESS])
def test_additions_break_nobody(stored: Json, name: str, change: Callable[[Json], object]) -> None:
    changed = copy.deepcopy(stored)
    change(changed)

    assert breaks(stored, changed) == []
