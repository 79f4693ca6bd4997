"""Finds what a new description of the API takes away from clients of an old one.

Additions are no breaks: operations, optional parameters and fields, values, statuses and error codes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Json = dict[str, Any]
# One sentence a line. Lines that begin with # are comments, which say why a break was accepted.
ACCEPTED = Path(__file__).with_name("accepted_breaks.txt")
# Limits of what clients may send: the keyword, and whether a greater value allows less.
LIMITS = {
    "exclusiveMinimum": True,
    "minItems": True,
    "minLength": True,
    "minProperties": True,
    "minimum": True,
    "exclusiveMaximum": False,
    "maxItems": False,
    "maxLength": False,
    "maxProperties": False,
    "maximum": False,
}


def accepted() -> set[str]:
    """Return the breaks that were accepted."""
    lines = ACCEPTED.read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def breaks(old: Json, new: Json) -> list[str]:
    """Return a sentence for each thing that clients of the old description may lack in the new one."""
    return sorted(set(Comparison(old, new).breaks()))


class Comparison:
    """The comparison of two descriptions."""

    def __init__(self, old: Json, new: Json) -> None:
        self._old = old
        self._new = new
        # The pairs of schemas on the way to the present one, because a schema may contain itself.
        self._open: list[tuple[str, str]] = []

    def breaks(self) -> Iterator[str]:
        for path, operations in self._old["paths"].items():
            for method, old in operations.items():
                where = f"{method.upper()} {path}"
                new = self._new["paths"].get(path, {}).get(method)
                if new is None:
                    yield f"{where} is gone"
                else:
                    yield from self._operation(old, new, where)

        yield from self._webhooks()

    def _webhooks(self) -> Iterator[str]:
        for name, described in self._old.get("webhooks", {}).items():
            old, new, where = (
                described["post"],
                self._new.get("webhooks", {}).get(name, {}).get("post"),
                f"webhook {name}",
            )
            if new is None:
                yield f"{where} is gone"
                continue
            yield from (f"{where}: {header} is gone" for header in set(_parameters(old)) - set(_parameters(new)))
            yield from self._content(old["requestBody"]["content"], new["requestBody"]["content"], where, sent=False)

    def _operation(self, old: Json, new: Json, where: str) -> Iterator[str]:
        if old["operationId"] != new["operationId"]:
            yield f"{where}: the operationId {old['operationId']} is gone"
        if new.get("security", self._new["security"]) != old.get("security", self._old["security"]):
            yield f"{where}: the security has changed"
        yield from self._parameters(_parameters(old), _parameters(new), where)
        yield from self._body(old.get("requestBody"), new.get("requestBody"), where)
        for status, old_response in old["responses"].items():
            if status not in new["responses"]:
                yield f"{where}: the status {status} is gone"
                continue
            response, other = _resolve(self._old, old_response), _resolve(self._new, new["responses"][status])
            for name in response.get("headers", {}):
                if name not in other.get("headers", {}):
                    yield f"{where} {status}: the header {name} is gone"
            yield from self._content(
                response.get("content", {}), other.get("content", {}), f"{where} {status}", sent=False
            )

    def _parameters(self, old: Json, new: Json, where: str) -> Iterator[str]:
        for name, parameter in new.items():
            if parameter.get("required") and not old.get(name, {}).get("required"):
                yield f"{where}: the parameter {name} is required"
        for name, parameter in old.items():
            if name in new:
                yield from self._schema(parameter["schema"], new[name]["schema"], f"{where} {name}", sent=True)
            else:
                yield f"{where}: the parameter {name} is gone"

    def _body(self, old: Json | None, new: Json | None, where: str) -> Iterator[str]:
        if new is None:
            if old is not None:
                yield f"{where}: the body is gone"
        elif old is None:
            if new.get("required"):
                yield f"{where}: a body is required"
        else:
            yield from self._content(old["content"], new["content"], f"{where} body", sent=True)

    def _content(self, old: Json, new: Json, where: str, *, sent: bool) -> Iterator[str]:
        for media_type, described in old.items():
            if media_type in new:
                yield from self._schema(described["schema"], new[media_type]["schema"], where, sent=sent)
            else:
                yield f"{where}: {media_type} is gone"

    def _schema(self, old: Json, new: Json, where: str, *, sent: bool) -> Iterator[str]:
        """Yield the breaks of a value.

        Args:
            sent: whether clients send the value, rather than receive it.
        """
        pair = json.dumps(old, sort_keys=True), json.dumps(new, sort_keys=True)
        if pair in self._open:
            return
        self._open.append(pair)
        if sent and "default" in old and old["default"] != new.get("default"):
            yield f"{where}: the default {json.dumps(old['default'])} has changed"
        others, mine = _kinds(self._new, new), _kinds(self._old, old)
        for kind, alternative in mine.items():
            if kind in others:
                yield from self._alternative(alternative, others[kind], where, sent)
            elif "any" not in others:
                yield f"{where}: {kind} is gone"
        if not sent and "null" in others and "null" not in mine:
            yield f"{where}: may be null"
        self._open.pop()

    def _alternative(self, old: Json, new: Json, where: str, sent: bool) -> Iterator[str]:
        allowed = new.get("enum")
        for value in old.get("enum", ()):
            if allowed is not None and value not in allowed:
                yield f"{where}: the value {json.dumps(value)} is gone"
        if sent:
            if allowed is not None and "enum" not in old:
                yield f"{where}: only some values are allowed"
            yield from _limits(old, new, where)
        yield from self._object(old, new, where, sent)
        for part in ("items", "additionalProperties", "propertyNames"):
            if isinstance(old.get(part), dict) and isinstance(new.get(part), dict):
                yield from self._schema(old[part], new[part], f"{where}[]", sent=sent)

    def _object(self, old: Json, new: Json, where: str, sent: bool) -> Iterator[str]:
        if sent and old.get("additionalProperties") is not False and new.get("additionalProperties") is False:
            yield f"{where}: other fields are not allowed"
        for name in set(new.get("required", ())) - set(old.get("required", ())):
            if sent:
                yield f"{where}.{name} is required"
        for name, schema in old.get("properties", {}).items():
            if name not in new.get("properties", {}):
                yield f"{where}.{name} is gone"
                continue
            if not sent and name in old.get("required", ()) and name not in new.get("required", ()):
                yield f"{where}.{name} may be left out"
            yield from self._schema(schema, new["properties"][name], f"{where}.{name}", sent=sent)


def _parameters(operation: Json) -> Json:
    return {each["name"]: each for each in operation.get("parameters", ())}


def _resolve(document: Json, described: Json) -> Json:
    while "$ref" in described:
        target: Json = document
        for part in described["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        described = {**target, **{name: value for name, value in described.items() if name != "$ref"}}
    return described


def _kinds(document: Json, schema: Json) -> Json:
    """Return the kinds of value that a schema allows, each with its schema. Several of one kind are numbered."""
    kinds: Json = {}
    for kind, alternative in _alternatives(document, schema):
        number = sum(name.partition(" #")[0] == kind for name in kinds) + 1
        kinds[kind if number == 1 else f"{kind} #{number}"] = alternative
    return kinds


def _alternatives(document: Json, schema: Json) -> Iterator[tuple[str, Json]]:
    """Yield the kind of each value that a schema allows, with its schema."""
    schema = _resolve(document, schema)
    choices = schema.get("anyOf", schema.get("oneOf"))
    if choices is not None:
        for choice in choices:
            yield from _alternatives(document, choice)
        return
    if "const" in schema:
        schema = {**schema, "enum": [schema["const"]]}
    kind = schema.get("type", "any")
    # Objects of a union differ by a field with a fixed value.
    for name in ("type", "event"):
        field = schema.get("properties", {}).get(name, {})
        if values := field.get("enum", [field["const"]] if "const" in field else []):
            kind = f"{kind} {' | '.join(values)}"
            break
    yield kind, schema


def _limits(old: Json, new: Json, where: str) -> Iterator[str]:
    for keyword, greater_allows_less in LIMITS.items():
        if keyword not in new:
            continue
        before, after = old.get(keyword), new[keyword]
        if before is None or (after > before if greater_allows_less else after < before):
            yield f"{where}: {keyword} is {after}"
    if "pattern" in new and new["pattern"] != old.get("pattern"):
        yield f"{where}: the pattern has changed"
