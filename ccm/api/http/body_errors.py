"""The messages about invalid bodies: which field is wrong, and what the client probably meant."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import reduce
from operator import getitem
from typing import Any, get_args

import pydantic
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, from_json

from ccm.api.http.options_body import SERVICE_OWNED, Options, Strict
from ccm.api.http.suggestions import alternatives, did_you_mean, same_word, suggestion
from ccm.errors import ValidationError

# The most fields of an object that are named to a client who sent something else.
SHOWN_NAMES = 8
# The most errors that are compared: a body may have thousands of unknown fields.
RIVALS = 50
# Unknown names are truncated to this in messages.
NAME_CHARACTERS = 100
# What clients send as fields, and how it is sent.
ELSEWHERE = {
    "idempotencyKey": "send it as the header Idempotency-Key",
    "stream": "GET /api/runs/{runId}/stream follows a run",
    "token": "send it as the header 'Authorization: Bearer TOKEN'",
    "wait": "add ?wait=SECONDS to the address",
}
# The values in pydantic's list of those that are possible.
QUOTED = re.compile(r"'([^']*)'")
# pydantic's error types for values of the wrong type.
WRONG_TYPES = ("string_type", "list_type", "dict_type", "model_type", "model_attributes_type", "literal_error", "enum")

Actions = Mapping[str, type[Strict]]


def validation_error(
    errors: pydantic.ValidationError, data: bytes, model: type[Strict], actions: Actions
) -> ValidationError:
    """Return the answer to an invalid body. It names the most relevant invalid field.

    Args:
        data: the body.
        actions: the bodies of all actions that start a run, by method and path, for fields that belong to another one.
    """
    # Without the inputs, because a missing field has the whole object that lacks it as its input.
    error = _closest(errors.errors(include_url=False, include_input=False))
    if not data.strip():
        return ValidationError("The body is empty; send a JSON object.")
    if error["type"] == "json_invalid":
        return ValidationError(f"The body is no valid JSON: {error['msg'].removeprefix('Invalid JSON: ')}.")
    body = from_json(data)
    path = _path(error, body)
    if not path:
        return ValidationError("The body must be a JSON object.")
    field = ".".join(map(_name, path))
    if error["type"] == "extra_forbidden":
        return ValidationError(_unknown_field_message(path, field, model, actions), field=field)
    reason = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        reason = "is required"
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        types = [get_args(_names(found)["type"].annotation)[0] for found in _models_at(path, model)]
        reason = f"must have a type, which is {alternatives(map(repr, types))}"
    names = dict.fromkeys(name for found in _models_at(path, model) for name in _names(found))
    if error["type"] in ("dict_type", "model_type", "model_attributes_type") and 0 < len(names) <= SHOWN_NAMES:
        reason = f"must be an object with {', '.join(names)}"
    if reason[1:2].islower():  # a sentence and not the name of a variable
        reason = reason[0].lower() + reason[1:]
    return ValidationError(f"{field}: {reason}{_value_hint(error, path, body)}", field=field)


def _closest(errors: list[ErrorDetails]) -> ErrorDetails:
    """Return the most relevant error. Each type of a union reports one, and the deepest one came closest to a match."""
    first = errors[0]
    rivals = [error for error in errors[:RIVALS] if error["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
    if first["type"] == "missing":
        # A field that is missing under its name and there under another one: only the other one says what is wrong.
        for error in rivals:
            if error["type"] == "extra_forbidden" and suggestion(_name(error["loc"][-1]), [_name(first["loc"][-1])]):
                return error
    return max(rivals, key=lambda error: (len(error["loc"]), error["type"] not in WRONG_TYPES, error is first))


def _name(part: int | str) -> str:
    return str(part)[:NAME_CHARACTERS]


def _path(error: ErrorDetails, value: Any) -> list[int | str]:
    """Return the path of an error in the body: pydantic's location without the names of the types that it tried."""
    path: list[int | str] = []
    loc = error["loc"]
    for number, part in enumerate(loc):
        if number and str(loc[number - 1]).startswith("tagged-union["):
            continue  # a tag, which may also be the name of a field
        children: Any = value if isinstance(value, dict | list) else ()
        try:
            value = children[part]
        except (LookupError, TypeError):
            if error["type"] != "missing" or number < len(loc) - 1:
                continue
        path.append(part)
    return path


def _value_hint(error: ErrorDetails, path: list[int | str], body: Any) -> str:
    """Return the end of the sentence about an invalid value."""
    given = None if error["type"] == "missing" else reduce(getitem, path, body)
    if not isinstance(given, str) or len(given) > NAME_CHARACTERS:
        return "."
    if error["type"] == "list_type":
        return did_you_mean(json.dumps([given]))
    if (error["type"] == "int_type" and given.isdecimal()) or (
        error["type"] == "bool_type" and given in ("true", "false")
    ):
        return did_you_mean(f"{given}, without quotes")
    return did_you_mean(suggestion(given, QUOTED.findall(error.get("ctx", {}).get("expected", ""))))


def _unknown_field_message(path: list[int | str], field: str, model: type[Strict], actions: Actions) -> str:
    """Return a sentence that says what was probably meant, or why the field is not for clients."""
    *parents, last = path
    name = _name(last)
    names = list(dict.fromkeys(own for found in _models_at(parents, model) for own in _names(found)))
    # What may be meant, as the sentence shows it.
    known = {own: own for own in names}
    owned = same_word(name, SERVICE_OWNED)
    if parents == ["options"]:
        if owned is not None:
            return f"{field} is not for clients: {SERVICE_OWNED[owned]}."
        known = {own: f"{own}, outside of options" for own in _names(model)} | known
    elif not parents and "options" in known:
        known = {own: f"options.{own}" for own in _names(Options)} | known
        if same_word(name, known) is None:
            takers = {action: own for action, body in actions.items() if (own := same_word(name, _names(body)))}
            if takers:
                theirs = next(iter(takers.values()))
                return f"{field} is not a known field here; {theirs} is for {' and '.join(takers)}."
            if owned is not None:
                return f"{field} is not a known field: {SERVICE_OWNED[owned]}."
            if elsewhere := same_word(name, ELSEWHERE):
                return f"{field} is not a known field: {ELSEWHERE[elsewhere]}."
    meant = suggestion(name, known)
    hint = did_you_mean(known[meant]) if meant else f"; the known ones are {', '.join(names)}."
    return f"{field} is not a known field{hint}"


def _models_at(parents: list[int | str], model: type[Strict]) -> list[type[Strict]]:
    """Return the models that a value in the body may have, from the names and indexes that lead to it."""
    models = [model]
    for part in parents:
        fields_here = [field for found in models for name, field in _names(found).items() if name == part]
        # An index, or a name that the client chose, leads to the items of the same field.
        models = [found for field in fields_here for found in _models_in(field.annotation)] if fields_here else models
    return models


def _models_in(annotation: object) -> list[type[Strict]]:
    """Return the models among the types of an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]


def _names(model: type[Strict]) -> dict[str, FieldInfo]:
    """Return the fields of a model by their names in JSON."""
    return {field.alias or name: field for name, field in model.model_fields.items()}
