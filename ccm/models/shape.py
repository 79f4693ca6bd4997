"""The names and conversions of a model's fields in the database, the API and an export, derived once per model."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from enum import Enum, StrEnum, auto
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Union, cast, get_args, get_origin

from pydantic import BeforeValidator
from pydantic.alias_generators import to_camel

from ccm.json_text import from_json_text, to_json_text
from ccm.models.json_field import JsonText

if TYPE_CHECKING:
    from ccm.models.stored import StoredModel


class Archive(Enum):
    """The role of a field in an export and an import."""

    # Exported and imported: the default of every field of the API.
    BOTH = auto()
    # Exported for readers of the file; an import computes the value anew.
    EXPORTED = auto()
    # Neither: a momentary state, or a second name of another value. The default of fields that the API hides.
    LEFT_OUT = auto()


class Mark(Enum):
    """The meaning of a text or a number, beyond its type."""

    ID = auto()
    COUNT = auto()
    # Without a column: its value is known only after a row has been read.
    UNSTORED = auto()


class Kind(NamedTuple):
    """The parts of a field's type: `int | None` with its annotations is `int`, nullable."""

    type: Any
    nullable: bool
    notes: tuple[Any, ...]

    @classmethod
    def of(cls, annotation: Any, notes: Sequence[Any] = ()) -> Kind:
        """Return the parts of a type annotation."""
        if get_origin(annotation) is Annotated:
            inner, *more = get_args(annotation)
            return cls.of(inner, (*notes, *more))
        if get_origin(annotation) in (Union, types.UnionType):
            (chosen,) = (each for each in get_args(annotation) if each is not type(None))
            return cls.of(chosen, notes)._replace(nullable=True)
        return cls(annotation, nullable=False, notes=tuple(notes))

    @property
    def is_json(self) -> bool:
        return get_origin(self.type) is JsonText

    @property
    def held(self) -> Any:
        """The type of the value within the JSON text."""
        return Kind.of(get_args(self.type)[0]).type

    @property
    def choices(self) -> type[StrEnum] | None:
        """The enum of the allowed values; None if the field is not an enum."""
        return self.type if isinstance(self.type, type) and issubclass(self.type, StrEnum) else None

    def written(self, value: Any) -> Any:
        """Return a field's value in the form of its column."""
        if value is None:
            return None
        if self.is_json:
            return to_json_text(value)
        return int(value) if self.type is bool else value

    def reader(self) -> Callable[[Any], Any] | None:
        """Return the function that converts a column's value to the field's; None if they are the same."""
        for note in self.notes:
            if isinstance(note, BeforeValidator):
                return cast("Callable[[Any], Any]", note.func)
        if self.is_json:
            return JsonText
        if self.type is bool:
            return bool  # the databases store 0 and 1
        if self.choices is not None:
            return {str(member): member for member in self.choices}.__getitem__
        return None

    def shown_from_column(self) -> Callable[[Any], Any] | None:
        """Return the function that converts a column's value to that of the API's JSON; None if they are the same."""
        return from_json_text if self.is_json else None if self.choices is not None else self.reader()

    def shown(self) -> Callable[[Any], Any] | None:
        """Return the function that converts a field's value to that of the API's JSON; None if they are the same."""
        if self.is_json:
            return attrgetter("value")
        # pydantic's JSON encoder takes ten times as long for an enum's member as for a plain text.
        return str if self.choices is not None else None


# The kind of derived fields, which are shown unchanged.
ANY = Kind(Any, nullable=True, notes=())


class StoredField(NamedTuple):
    """One field of a model: its names in Python, the database (None: no column) and the API (None: not shown)."""

    name: str
    column: str | None
    shown: str | None
    kind: Kind
    archive: Archive
    default: Any


class Shape:
    """The column names, API names and conversions of a model."""

    def __init__(self, model: type[StoredModel]) -> None:
        self.fields = _fields(model)
        stored = [field for field in self.fields if field.column is not None]
        shown = [field for field in self.fields if field.shown is not None]
        self.columns = tuple(str(field.column) for field in stored)
        self.names = tuple(field.name for field in stored)
        self.set = set(self.names)
        self.unstored = {field.name: field.default for field in self.fields if Mark.UNSTORED in field.kind.notes}
        self.readers = [(field.name, reader) for field in stored if (reader := field.kind.reader())]
        self.shown = tuple(str(field.shown) for field in shown)
        names = [field.name for field in shown]
        # Without derived fields, `show` reads the instance's __dict__ directly, which is twice as fast.
        self.is_dict_only = not any(field.kind is ANY for field in shown)
        self.show: Callable[[Any], tuple[Any, ...]] = itemgetter(*names) if self.is_dict_only else attrgetter(*names)
        self.converted = [(str(field.shown), convert) for field in shown if (convert := field.kind.shown())]
        self._names_read = [str(field.shown) for field in stored if field.shown is not None]
        self._pick: Callable[[Any], tuple[Any, ...]] = itemgetter(
            *(number for number, field in enumerate(stored) if field.shown is not None)
        )
        self._unstored = {str(field.shown): field.default for field in shown if field.name in self.unstored}
        self._read = [(str(f.shown), convert) for f in stored if f.shown and (convert := f.kind.shown_from_column())]

    def row_to_json(self, row: Sequence[Any]) -> dict[str, Any]:
        """Return what the API shows of a row, the values of `columns`, of a model without derived fields.

        It equals the JSON of the row's instance, in a third of the time.
        """
        shown = dict(zip(self._names_read, self._pick(row)))  # noqa: B905  # equal lengths; `strict` costs time
        for name, convert in self._read:
            if (value := shown[name]) is not None:
                shown[name] = convert(value)
        shown |= self._unstored
        return shown


def _fields(model: type[StoredModel]) -> list[StoredField]:
    """Return the fields of a model in the order of the API, each derived field after the one that it follows."""
    fields: list[StoredField] = []
    for name, info in model.model_fields.items():
        kind = Kind.of(info.annotation, info.metadata)
        marked = [note for note in kind.notes if isinstance(note, Archive)]
        column = None if Mark.UNSTORED in kind.notes else to_camel(name) + ("Json" if kind.is_json else "")
        shown = None if info.exclude else info.serialization_alias
        archive = marked[0] if marked else Archive.LEFT_OUT if info.exclude else Archive.BOTH
        default = None if info.is_required() else info.default
        fields.append(StoredField(name, column, shown, kind, archive, default))
    for name, derivation in model.model_computed_fields.items():
        after, archive = derivation.wrapped_property.fget.place  # type: ignore[union-attr]
        place = [field.name for field in fields].index(after) + 1
        fields.insert(place, StoredField(name, None, to_camel(name), ANY, archive, None))
    return [field for field in fields if field.name not in model.left_out]
