"""The base class of stored resources. Each resource is defined once, as a pydantic model.

The columns of its table, its JSON in the API, its JSON schema, and its line in an export all derive from the model's
fields. The fields stand in the order of the API. A column that the API hides has `exclude=True`. A field of the API
without a column is a method with `@derived`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar, cast

from pydantic import AliasGenerator, BaseModel, ConfigDict, GetJsonSchemaHandler, computed_field
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from ccm.models.shape import Archive, Shape

T = TypeVar("T")

_new = object.__new__
_set = object.__setattr__


def derived(*, after: str, description: str, archive: Archive = Archive.BOTH) -> Callable[[Callable[[Any], T]], T]:
    """Decorate a method to make it a field of the API.

    Args:
        after: the field that it follows in the API's JSON.
        archive: BOTH exports the field. An import never reads a derived field.
    """

    def decorate(method: Callable[[Any], T]) -> T:
        method.place = (after, archive)  # type: ignore[attr-defined]  # read by Shape
        # A property, of which a type checker need only know the value.
        return cast("T", computed_field(description=description)(property(method)))

    return decorate


class ResponseModel(BaseModel):
    """A JSON object in an answer of the API, with camelCase names."""

    # Deferred, so that a start does not build the validators, which rows do not need.
    model_config = ConfigDict(
        frozen=True, defer_build=True, alias_generator=AliasGenerator(serialization_alias=to_camel)
    )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return self.model_dump(by_alias=True)


class StoredModel(ResponseModel):
    """A resource with a table and a place in the API."""

    shape: ClassVar[Shape]
    # The names of inherited fields that this model neither reads nor shows.
    left_out: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **_kwargs: Any) -> None:
        cls.shape = Shape(cls)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Describe the result of `to_json`, in its order: pydantic puts derived fields last and keeps hidden ones."""
        described = handler.resolve_ref_schema(handler(schema))
        if handler.mode == "serialization":
            properties = described["properties"]
            described["properties"] = {name: properties[name] for name in cls.shape.shown}
            for described_field in described["properties"].values():
                described_field.pop("title", None)  # pydantic derives it from the name, so it adds nothing
            described["required"] = list(cls.shape.shown)
        return described

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Self:
        """Create an instance from a row, the values of `shape.columns`.

        They are not validated: stored values were validated when they were written.
        """
        shape = cls.shape
        values = dict(zip(shape.names, row))  # noqa: B905  # equal lengths; `strict` costs time
        for name, read in shape.readers:
            if (value := values[name]) is not None:
                values[name] = read(value)
        if shape.unstored:
            values |= shape.unstored
        # As model_construct, but without its handling of missing fields: there may be thousands of rows.
        instance = _new(cls)
        _set(instance, "__dict__", values)
        _set(instance, "__pydantic_fields_set__", shape.set)
        _set(instance, "__pydantic_extra__", None)
        _set(instance, "__pydantic_private__", None)
        return instance

    @classmethod
    def to_columns(cls, shown: Mapping[str, Any]) -> dict[str, Any]:
        """Convert the API's names and values to those of columns, leaving out fields without a column."""
        return {
            field.column: field.kind.written(shown[field.shown])
            for field in cls.shape.fields
            if field.column is not None and field.shown is not None and field.shown in shown
        }

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that the API shows."""
        shape = self.shape
        values = shape.show(self.__dict__ if shape.is_dict_only else self)
        shown = dict(zip(shape.shown, values))  # noqa: B905
        for name, convert in shape.converted:
            if (value := shown[name]) is not None:
                shown[name] = convert(value)
        return shown
