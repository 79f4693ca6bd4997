"""How a resource is defined: once, as a pydantic model.

The columns of its table, its JSON in the API, its JSON schema, and its line in an export all derive from the model's
fields. A field stands in the order of the API. What is a column and not part of the API has `exclude=True`; what is
part of the API and not a column is a function with `@derived`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, Self, TypeVar, cast

from pydantic import AliasGenerator, BaseModel, ConfigDict, GetJsonSchemaHandler, computed_field
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from ccm.models.shape import Archive, Shape

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_new = object.__new__
_put = object.__setattr__


class Derived(Protocol[T_co]):
    """A field of the API that is worked out of others."""

    def __get__(self, instance: object, owner: type | None = None) -> T_co: ...


def derived(
    *, after: str, description: str, archive: Archive = Archive.BOTH
) -> Callable[[Callable[[Any], T]], Derived[T]]:
    """Make a method a field of the API.

    Args:
        after: the field that it follows there.
        archive: an import reads none of these back as they are; BOTH is only written.
    """

    def decorate(method: Callable[[Any], T]) -> Derived[T]:
        method.place = (after, archive)  # type: ignore[attr-defined]  # read by Shape
        return cast("Derived[T]", computed_field(description=description)(property(method)))

    return decorate


class ResponseModel(BaseModel):
    """What the API answers with. Its fields have camelCase names there."""

    # Deferred: a start need not build the validators, which rows do not pass through.
    model_config = ConfigDict(
        frozen=True, defer_build=True, alias_generator=AliasGenerator(serialization_alias=to_camel)
    )

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True)


class StoredModel(ResponseModel):
    """A resource that is stored in a table and shown by the API."""

    shape: ClassVar[Shape]

    @classmethod
    def __pydantic_init_subclass__(cls, **_kwargs: Any) -> None:
        cls.shape = Shape(cls)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Describe what `to_json` gives, in its order: pydantic puts what is derived last, and keeps what is hidden."""
        described = handler.resolve_ref_schema(handler(schema))
        if handler.mode == "serialization":
            properties = described["properties"]
            described["properties"] = {name: properties[name] for name in cls.shape.shown}
            for described_field in described["properties"].values():
                described_field.pop("title", None)  # made of the name, and says nothing more
            described["required"] = list(cls.shape.shown)
        return described

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Make one of the columns of a row, as they are: what the database holds was checked when it was written."""
        shape = cls.shape
        values = dict(zip(shape.names, shape.take(row)))  # noqa: B905  # as many, and `strict` takes time
        for name, read in shape.readers:
            if (value := values[name]) is not None:
                values[name] = read(value)
        # As pydantic's own model_construct, without what that does for fields that are left out: these are thousands.
        made = _new(cls)
        _put(made, "__dict__", values)
        _put(made, "__pydantic_fields_set__", shape.set)
        _put(made, "__pydantic_extra__", None)
        _put(made, "__pydantic_private__", None)
        return made

    @classmethod
    def to_columns(cls, shown: Mapping[str, Any]) -> dict[str, Any]:
        """Turn values under their names in the API into those of columns. What is no column is left out."""
        return {
            field.column: field.kind.written(shown[field.shown])
            for field in cls.shape.fields
            if field.column is not None and field.shown is not None and field.shown in shown
        }

    def to_json(self) -> dict[str, Any]:
        """The resource as the API shows it."""
        shape = self.shape
        values = shape.show(self.__dict__ if shape.plain else self)
        shown = dict(zip(shape.shown, values))  # noqa: B905
        for name in shape.shown_json:
            if (stored := shown[name]) is not None:
                shown[name] = stored.value
        return shown
