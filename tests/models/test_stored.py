"""The models of stored resources: their columns, their JSON, and their JSON schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jsonschema  # type: ignore[import-untyped]
import pytest

from ccm import models
from ccm.models.json_field import JsonText
from ccm.models.stored import StoredModel

# Rows, and the API's answers for them from before the models derived these answers.
GOLDEN: list[dict[str, Any]] = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
M = TypeVar("M", bound=StoredModel)
MODELS: list[type[StoredModel]] = [models.Run, models.Session, models.Approval, models.Delivery]


def from_columns(model: type[M], row: Mapping[str, Any]) -> M:
    """Return an instance from a row by the names of its columns."""
    return model.from_row([row[column] for column in model.shape.columns])


def read(example: dict[str, Any]) -> StoredModel:
    model: type[StoredModel] = getattr(models, example["model"])
    return from_columns(model, example["row"])


@pytest.mark.parametrize("example", GOLDEN)
def test_to_json_is_unchanged_byte_for_byte(example: dict[str, Any]) -> None:
    assert json.dumps(read(example).to_json()) == example["json"]


@pytest.mark.parametrize("example", [one for one in GOLDEN if read(one).shape.is_dict_only])
def test_a_row_has_the_json_of_its_instance(example: dict[str, Any]) -> None:
    shape = type(read(example)).shape
    row = tuple(example["row"][column] for column in shape.columns)
    assert json.dumps(shape.row_to_json(row)) == example["json"]


def test_a_row_without_a_value_for_a_field_has_its_default() -> None:
    example = next(one for one in GOLDEN if one["model"] == "Session")
    row = tuple(example["row"][column] for column in models.ListedSession.shape.columns)
    assert models.ListedSession.shape.row_to_json(row) == {**json.loads(example["json"]), "match": None}


@pytest.mark.parametrize("example", GOLDEN)
def test_the_schema_describes_the_json(example: dict[str, Any]) -> None:
    schema = type(read(example)).model_json_schema(mode="serialization")
    shown = json.loads(example["json"])

    jsonschema.validate(shown, schema)

    assert list(schema["properties"]) == list(shown) == schema["required"]
    assert all(described.get("description") for described in schema["properties"].values())


@pytest.mark.parametrize("model", MODELS)
def test_the_schema_refuses_wrong_values(model: type[StoredModel]) -> None:
    schema = model.model_json_schema(mode="serialization")
    shown = next(json.loads(example["json"]) for example in GOLDEN if example["model"] == model.__name__)
    for wrong in ({**shown, "status": "unheard of"}, {**shown, "createdAt": 1, "cwd": 1, "id": {}, "sessionId": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


@pytest.mark.parametrize("example", GOLDEN)
def test_pydantic_itself_produces_the_same_json(example: dict[str, Any]) -> None:
    # An OpenAPI document of the models will be made from pydantic's view of them.
    assert read(example).model_dump(by_alias=True) == json.loads(example["json"])


@pytest.mark.parametrize("example", GOLDEN)
def test_an_instance_from_a_row_equals_a_validated_one(example: dict[str, Any]) -> None:
    stored = read(example)
    validated = type(stored)(**vars(stored))
    assert validated == stored
    assert validated.to_json() == stored.to_json()


@pytest.mark.parametrize("example", GOLDEN)
def test_to_columns_reverses_to_json(example: dict[str, Any]) -> None:
    stored = read(example)
    columns = type(stored).to_columns(stored.to_json())
    for converted in ("costUsd", "host"):  # rounded, and null if the column is empty
        columns.pop(converted, None)
    assert {column: example["row"][column] for column in columns} == columns


def test_json_is_parsed_on_first_access() -> None:
    broken: JsonText[Any] = JsonText("{")
    with pytest.raises(ValueError, match="Expecting"):
        _ = broken.value
    assert JsonText("[]") == JsonText("[]") != JsonText("[ ]")
