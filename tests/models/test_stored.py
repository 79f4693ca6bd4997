"""The models of stored resources: their columns, their JSON, and their JSON schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from ccm import models
from ccm.models.json_field import JsonText
from ccm.models.stored import StoredModel

# Rows, and what the API answered for them before the models derived it.
GOLDEN: list[dict[str, Any]] = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
MODELS: list[type[StoredModel]] = [models.Run, models.Session, models.Approval, models.Delivery]


def read(example: dict[str, Any]) -> StoredModel:
    model: type[StoredModel] = getattr(models, example["model"])
    return model.from_row(example["row"])


@pytest.mark.parametrize("example", GOLDEN)
def test_to_json_is_byte_for_byte_as_it_was(example: dict[str, Any]) -> None:
    assert json.dumps(read(example).to_json()) == example["json"]


@pytest.mark.parametrize("example", GOLDEN)
def test_the_schema_describes_what_is_shown(example: dict[str, Any]) -> None:
    schema = type(read(example)).model_json_schema(mode="serialization")
    shown = json.loads(example["json"])

    jsonschema.validate(shown, schema)

    assert list(schema["properties"]) == list(shown) == schema["required"]
    assert all(described.get("description") for described in schema["properties"].values())


@pytest.mark.parametrize("model", MODELS)
def test_the_schema_refuses_what_is_not_so(model: type[StoredModel]) -> None:
    schema = model.model_json_schema(mode="serialization")
    shown = next(json.loads(example["json"]) for example in GOLDEN if example["model"] == model.__name__)
    for wrong in ({**shown, "status": "unheard of"}, {**shown, "createdAt": 1, "cwd": 1, "id": {}, "sessionId": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


@pytest.mark.parametrize("example", GOLDEN)
def test_pydantic_itself_shows_the_same(example: dict[str, Any]) -> None:
    # What a later OpenAPI document says of the models is what pydantic knows of them.
    assert read(example).model_dump(by_alias=True) == json.loads(example["json"])


@pytest.mark.parametrize("example", GOLDEN)
def test_a_row_that_is_read_is_as_one_that_is_made(example: dict[str, Any]) -> None:
    found = read(example)
    made = type(found)(**vars(found))
    assert made == found
    assert made.to_json() == found.to_json()


@pytest.mark.parametrize("example", GOLDEN)
def test_columns_are_those_of_the_row(example: dict[str, Any]) -> None:
    found = read(example)
    columns = type(found).to_columns(found.to_json())
    for read_otherwise in ("costUsd", "host"):  # rounded, and null where the column is empty
        columns.pop(read_otherwise, None)
    assert {column: example["row"][column] for column in columns} == columns


def test_json_is_parsed_when_it_is_asked_for() -> None:
    broken: JsonText[Any] = JsonText("{")
    with pytest.raises(ValueError, match="Expecting"):
        _ = broken.value
    assert JsonText("[]") == JsonText("[]") != JsonText("[ ]")
