"""Fields that hold JSON: text in the database, a value in the API."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, Generic, TypeVar, cast, get_args

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from ccm.json_text import from_json_text

T = TypeVar("T")

JsonObject = dict[str, Any]
_UNREAD = object()


class JsonText(Generic[T]):
    """A JSON value that is kept as its stored text and parsed on first access."""

    __slots__ = ("_value", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self._value: Any = _UNREAD

    @property
    def value(self) -> T:
        if self._value is _UNREAD:
            self._value = from_json_text(self.text)
        return cast("T", self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JsonText) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"JsonText({self.text!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        shown = handler(get_args(source)[0])
        return core_schema.no_info_plain_validator_function(
            lambda given: given if isinstance(given, cls) else cls(given),
            serialization=core_schema.plain_serializer_function_ser_schema(attrgetter("value"), return_schema=shown),
        )
