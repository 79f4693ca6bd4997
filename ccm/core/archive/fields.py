"""The fields of one line of an export: each is looked at before it is believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ccm.core.archive.records import SourceError
from ccm.models import RUN_ID, storable, to_json_text

# It leaves room for what is added to it, in databases that count to 2^63.
HIGHEST = 2**60


class Line:
    """One object of the file; its fields are taken out one by one, each of the type that it must have."""

    def __init__(self, number: int, fields: Mapping[str, Any]) -> None:
        self.number = number
        self._fields = fields

    @property
    def type(self) -> object:
        return self._fields.get("type")

    def error(self, what: str) -> SourceError:
        return SourceError(f"Line {self.number}: {what}")

    def raw(self, name: str) -> Any:
        return self._fields.get(name)

    def text(self, name: str) -> str:
        value = self.raw(name)
        if not isinstance(value, str) or storable(value) != value:
            raise self.error(f"{name} must be a text that can be stored.")
        return value

    def text_or_none(self, name: str) -> str | None:
        return None if self.raw(name) is None else self.text(name)

    def id(self, name: str) -> str:
        value = self.text(name)
        if not RUN_ID.fullmatch(value):
            raise self.error(f"{name} must be an id of letters, digits, '-', '_' and '.'; it is {value[:100]!r}.")
        return value

    def id_or_none(self, name: str) -> str | None:
        return None if self.raw(name) is None else self.id(name)

    def integer(self, name: str) -> int:
        value = self.raw(name)
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > HIGHEST:
            raise self.error(f"{name} must be a whole number.")
        return value

    def count(self, name: str) -> int:
        value = self.integer(name)
        if value < 0:
            raise self.error(f"{name} must not be negative.")
        return value

    def count_or_none(self, name: str) -> int | None:
        return None if self.raw(name) is None else self.count(name)

    def number_or_none(self, name: str) -> float | None:
        value = self.raw(name)
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise self.error(f"{name} must be a number or null.")
        return None if value is None else float(value)

    def flag(self, name: str) -> bool:
        value = self.raw(name)
        if not isinstance(value, bool):
            raise self.error(f"{name} must be true or false.")
        return value

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self.text(name)
        if value not in allowed:
            raise self.error(f"{name} must be one of {', '.join(allowed)}.")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.raw(name)
        if not isinstance(value, dict):
            raise self.error(f"{name} must be an object.")
        return value

    def json(self, value: object) -> str:
        try:
            return to_json_text(value)
        except (ValueError, RecursionError):
            raise self.error("it holds a value that cannot be stored.") from None
