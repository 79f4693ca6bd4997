"""Reads and validates the fields of one line of an export."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any, TypeVar, get_origin

from ccm.core.archive.records import SourceError
from ccm.json_text import storable, to_json_text
from ccm.models.fields import RUN_ID
from ccm.models.shape import Archive, Mark, StoredField
from ccm.models.stored import StoredModel

T = TypeVar("T")

# The largest integer. It leaves room for offsets that are added to it, because databases count to 2^63.
HIGHEST = 2**60


# For each type of a field: the words of the error about another value, and the test of a value.
TYPES: dict[type, tuple[str, Callable[[Any], bool]]] = {
    str: ("a text that can be stored", lambda value: type(value) is str and storable(value) == value),
    int: ("a whole number", lambda value: type(value) is int and abs(value) <= HIGHEST),
    float: ("a number or null", lambda value: type(value) in (int, float)),
    bool: ("true or false", lambda value: type(value) is bool),
    dict: ("an object", lambda value: type(value) is dict),
    list: ("an array of objects", lambda value: type(value) is list and all(type(item) is dict for item in value)),
}


class Line:
    """One object of the file. Each method returns a field's value, or raises SourceError if it has the wrong type."""

    def __init__(self, number: int, fields: Mapping[str, Any]) -> None:
        self.number = number
        self.type: object = fields.get("type")
        self._fields = fields

    def error(self, message: str) -> SourceError:
        return SourceError(f"Line {self.number}: {message}")

    def raw(self, name: str) -> Any:
        return self._fields.get(name)

    def get(self, name: str, kind: type[T]) -> T:
        wanted, accepts = TYPES[kind]
        value: T = self.raw(name)
        if not accepts(value):
            raise self.error(f"{name} must be {wanted}.")
        return value

    def id(self, name: str) -> str:
        value = self.get(name, str)
        if not RUN_ID.fullmatch(value):
            raise self.error(f"{name} must be an id of letters, digits, '-', '_' and '.'; it is {value[:100]!r}.")
        return value

    def count(self, name: str) -> int:
        value = self.get(name, int)
        if value < 0:
            raise self.error(f"{name} must not be negative.")
        return value

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self.get(name, str)
        if value not in allowed:
            raise self.error(f"{name} must be one of {', '.join(allowed)}.")
        return value

    def json(self, value: object) -> str:
        try:
            return to_json_text(value)
        except (ValueError, RecursionError):
            raise self.error("it holds a value that cannot be stored.") from None


def columns(line: Line, model: type[StoredModel], without: Container[str] = ()) -> dict[str, Any]:
    """Return the columns of a model that an import reads, with values for the database.

    Args:
        without: columns to leave out.

    Raises:
        SourceError: a field has the wrong type.
    """
    fields = [field for field in model.shape.fields if field.column and field.archive is Archive.BOTH]
    return {str(field.column): _column(line, field) for field in fields if field.column not in without}


def _column(line: Line, field: StoredField) -> Any:
    name, kind = str(field.shown or field.column), field.kind
    # Older exports lack the fields that were added with a default.
    if line.raw(name) is None and (kind.nullable or field.default is not None):
        return kind.written(field.default)
    if kind.is_json:
        return line.json(line.get(name, list if get_origin(kind.held) is list else dict))
    if kind.choices is not None:
        return line.one_of(name, tuple(kind.choices))
    if Mark.ID in kind.notes:
        return line.id(name)
    if Mark.COUNT in kind.notes:
        return line.count(name)
    return kind.written(kind.type(line.get(name, kind.type)))
