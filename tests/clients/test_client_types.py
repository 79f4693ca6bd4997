"""ccm/client.py as a file: its types have the fields of the service, and it needs no other package."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest

import ccm.client
from ccm import models
from ccm.api.http import bodies
from ccm.client import Answer, Approval, ForkFields, ResumeFields, Run, Session, StartFields

JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null", dict: "object"}


def shape(hint: Any) -> Any:
    """Return the JSON schema of a type."""
    kind, arguments = get_origin(hint), get_args(hint)
    if is_typeddict(hint):
        return {"type": "object", "properties": {name: shape(own) for name, own in get_type_hints(hint).items()}}
    if kind in (UnionType, Union):
        return either(shape(own) for own in arguments)
    if kind is Literal:
        return {"type": "string", "enum": list(arguments)}
    if kind is list:
        return {"type": "array"} | ({} if arguments == (Any,) else {"items": shape(arguments[0])})
    return {"type": JSON_TYPES[kind or hint]}


def described_shape(schema: dict[str, Any], definitions: dict[str, Any]) -> Any:
    """Return the schema of the service's model in the same form: without descriptions, limits and references."""
    plain = partial(described_shape, definitions=definitions)
    if "$ref" in schema:
        return plain(definitions[schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return either(map(plain, schema["anyOf"]))
    kept: dict[str, Any] = {name: schema[name] for name in ("type", "enum") if name in schema}
    if "properties" in schema:
        kept["properties"] = {name: plain(own) for name, own in schema["properties"].items()}
    if schema.get("items"):
        kept["items"] = plain(schema["items"])
    return kept


def either(shapes: Iterable[Any]) -> list[str]:
    return sorted(map(str, shapes))


@pytest.mark.parametrize(
    ("mine", "model"),
    [(Run, models.Run), (Session, models.Session), (Approval, models.Approval)],
    ids=lambda t: t.__name__,
)
def test_the_types_have_the_fields_of_the_service(mine: Any, model: Any) -> None:
    described = model.model_json_schema(mode="serialization")
    assert shape(mine) == described_shape(described, described["$defs"])


@pytest.mark.parametrize(
    ("mine", "arguments", "body"),
    [
        (StartFields, {"cwd", "prompt"}, bodies.StartBody),
        (ResumeFields, {"sessionId", "prompt"}, bodies.ResumeBody),
        (ForkFields, {"sessionId", "prompt"}, bodies.ForkBody),
        (Answer, set(), bodies.ApprovalBody),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_fields_of_requests_are_those_of_the_service(mine: Any, arguments: set[str], body: Any) -> None:
    assert set(get_type_hints(mine)) | arguments == set(body.model_fields)


def test_it_needs_nothing_but_the_standard_library() -> None:
    nodes = list(ast.walk(ast.parse(Path(ccm.client.__file__).read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}

    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names
