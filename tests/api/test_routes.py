"""What each route takes and answers with is declared beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from pydantic import BaseModel, TypeAdapter
from werkzeug.routing import Rule

from app import create_app
from ccm.api.http import sse
from ccm.api.http.route import EventStream, Route

# Fields that a body shares with the resource that is made of it.
SHARED = [
    *(("/api/runs/start", name) for name in ("timeoutMs", "approvals", "approvalTimeoutMs", "webhookUrl", "prompt")),
    *(("/api/sessions/<session_id>", name) for name in ("title", "metadata")),
    *(("/api/approvals/<approval_id>", name) for name in ("updatedInput", "remember", "message", "interrupt")),
]


@pytest.fixture(scope="module")
def app() -> Flask:
    return create_app()


def rules(app: Flask) -> list[Rule]:
    return [rule for rule in app.url_map.iter_rules() if rule.rule.startswith("/api/")]


def declaration(app: Flask, rule: Rule) -> Route:
    declared = getattr(app.view_functions[rule.endpoint], "declared", None)
    assert isinstance(declared, Route), f"{rule} is not declared"
    return declared


def test_every_route_of_the_api_is_declared(app: Flask) -> None:
    for rule in rules(app):
        declared = declaration(app, rule)
        methods = (rule.methods or set()) - {"HEAD", "OPTIONS"}
        assert len(methods) == 1
        assert (declared.body is not None) == bool(methods & {"POST", "PATCH"}), rule
        assert declared.query is not None
        if not isinstance(declared.returns, EventStream):
            assert TypeAdapter(declared.returns).json_schema(mode="serialization")


def test_every_parameter_is_described(app: Flask) -> None:
    for rule in rules(app):
        query = declaration(app, rule).query
        properties = {} if query is None else query.model_json_schema().get("properties", {})
        for name, described in properties.items():
            assert "description" in json.dumps(described), f"{rule} says nothing of {name}"


@pytest.mark.parametrize(("path", "field"), SHARED, ids=[f"{path} {field}" for path, field in SHARED])
def test_a_body_and_its_resource_share_the_description_of_a_field(app: Flask, path: str, field: str) -> None:
    [declared] = [
        declared for rule in rules(app) if rule.rule == path and (declared := declaration(app, rule)).body is not None
    ]
    assert declared.body is not None
    asked: dict[str, Any] = declared.body.model_json_schema()["properties"][field]
    shown: dict[str, Any] = declared.returns.model_json_schema(mode="serialization")["properties"][field]
    assert description(asked) == description(shown)


def description(schema: dict[str, Any]) -> object:
    """The description of a field, wherever it stands in the choice of types."""
    return schema.get("description") or next(part["description"] for part in schema["anyOf"] if "description" in part)


def test_query_parameters_are_checked_by_nothing_else() -> None:
    folder = Path(__file__).parents[2] / "ccm" / "api"
    readers = {file.name for file in folder.rglob("*.py") if "request.args" in file.read_text(encoding="utf-8")}
    # Admission looks for tokens in it; pages copy it into the link to the next page.
    assert readers == {"route.py", "pagination.py", "admission.py"}


def test_the_models_of_streams_build_no_validators() -> None:
    classes = [each for each in vars(sse).values() if isinstance(each, type) and each.__module__ == sse.__name__]
    models = [each for each in classes if issubclass(each, BaseModel)]
    assert models
    assert all(model.model_config.get("defer_build") for model in models)
