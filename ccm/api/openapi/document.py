"""The whole document, in the format of https://spec.openapis.org/oas/v3.1.1.html."""

from __future__ import annotations

import json
import sys
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

from flask import Flask
from flask.sansio.blueprints import Blueprint as SansioBlueprint

from ccm import __version__
from ccm.api.http.route import Route, View
from ccm.api.openapi.errors import COMMON, error_schema
from ccm.api.openapi.operations import HEADERS, Operation, example_of, failure
from ccm.api.openapi.schemas import Schemas
from ccm.api.openapi.webhooks import TYPES as WEBHOOK_TYPES
from ccm.api.openapi.webhooks import describe_webhook

EXAMPLES = Path(__file__).with_name("examples.json")
DESCRIPTION = """\
Starts, resumes, forks and cancels Claude Code runs on the host's own files, and records every message of the Claude
Agent SDK.

- A body is JSON in UTF-8 with `Content-Type: application/json`. Unknown fields and parameters are errors.
- Times are ISO 8601 in UTC with milliseconds. Durations are milliseconds unless a description says seconds. Money is
  USD.
- Every error is `{"error": {"code", "message", "field"}}`. A path that does not exist gets 404 `NOT_FOUND`, and a
  method that a path does not have gets 405 `METHOD_NOT_ALLOWED` with an `Allow` header.
- Every response has an `X-Request-Id`, the client's own if the request has one.
- Lists are plain arrays; the URL of the next page is in the `Link` header.
- New fields, values, codes and operations may be added at any time. What is here stays.
- `x-ceiling-setting`, `x-default-setting` and `x-allowed-by-setting` name the operator's setting that limits a field or
  provides its default; `x-privileged` marks what needs CCM_PRIVILEGED_OPTIONS.
"""
TOKEN = "A token of CCM_API_TOKEN or CCM_API_TOKEN_FILE. A service without tokens needs none."  # noqa: S105  # no token


class Document:
    """The description of an app's API, built when it is first asked for."""

    def __init__(self, app: Flask) -> None:
        self._app = app
        self.text = lru_cache(maxsize=8)(self._text)

    def operations(self) -> list[Operation]:
        """Return the operations in the order of their paths and methods."""
        found = []
        for rule in self._app.url_map.iter_rules():
            view = self._app.view_functions[rule.endpoint]
            declared = getattr(view, "declared", None)
            if isinstance(declared, Route):
                found.append(Operation(declared, cast("View", view), rule.rule))
        return sorted(found, key=lambda operation: (operation.path, operation.route.method))

    @cached_property
    def content(self) -> dict[str, Any]:
        """The document, for a service without a prefix. Everything that has a name is sorted by it."""
        operations = self.operations()
        types = {key: each for operation in operations for key, each in operation.types().items()}
        schemas = Schemas({**types, **WEBHOOK_TYPES})
        examples: dict[str, dict[str, Any]] = json.loads(EXAMPLES.read_text(encoding="utf-8"))
        paths: dict[str, dict[str, Any]] = {}
        for operation in operations:
            described = operation.describe(schemas, examples.get(operation.id, {}))
            paths.setdefault(operation.path, {})[operation.route.method.lower()] = described
        responses = {}
        for status, errors in COMMON.items():
            name = f"Error{status}"
            example = example_of(examples.get(name, {}), str(status))
            responses[name] = failure(errors, schemas.add(name, error_schema(errors)), example)
        return {
            "openapi": "3.1.1",
            "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
            "info": {
                "title": "CC Manager",
                "version": __version__,
                "summary": "Claude Code over HTTP.",
                "description": DESCRIPTION,
                "license": {"name": "Private - Internal use only"},
            },
            "servers": [{"url": "/", "description": "This service."}],
            "security": [{"bearer": []}, {}],
            "tags": [_tag(blueprint) for _, blueprint in sorted(self._app.blueprints.items())],
            "paths": paths,
            "webhooks": {"event": describe_webhook(schemas)},
            "components": {
                "schemas": schemas.components(),
                "responses": responses,
                "headers": HEADERS,
                "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "description": TOKEN}},
            },
        }

    def _text(self, prefix: str) -> str:
        """Return the document as JSON.

        Args:
            prefix: the path under which clients reach the service; empty for none. It becomes the server's URL, which
                is relative to that of the document.
        """
        servers = [{**self.content["servers"][0], "url": prefix or "/"}]
        return json.dumps({**self.content, "servers": servers}, indent=2) + "\n"


def _tag(blueprint: SansioBlueprint) -> dict[str, str]:
    module = sys.modules[blueprint.import_name]
    return {"name": blueprint.name, "description": (module.__doc__ or "").partition("\n")[0]}
