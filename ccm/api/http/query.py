"""The query parameters: one model per route, which validates and describes them."""

from __future__ import annotations

import base64
import contextlib
import re
from enum import StrEnum
from typing import Annotated, Any, Literal, Self, get_args

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from werkzeug.datastructures import MultiDict

from ccm.api.http.suggestions import did_you_mean, suggestion
from ccm.core.search import Place, SearchPosition
from ccm.errors import ValidationError
from ccm.models import ApprovalStatus, RunErrorCode, RunMode, RunStatus
from ccm.models.fields import no_nul
from ccm.timestamps import timestamp_of

DEFAULT_LIMIT = 100
HIGHEST_LIMIT = 1_000
LONGEST_WAIT = 300.0
SEARCH_CHARACTERS = 1_000
TYPES = 50
# The longest unknown name for which a similar one is looked for.
NAME_CHARACTERS = 100
METADATA = "metadata."
METADATA_FILTERS = 10
# How other APIs write the key of an object in a query.
BRACKETED = re.compile(r"metadata\[([^\[\]]+)\]")
# Each property is a parameter of its own, because an object in a query is written as one.
METADATA_SCHEMA = {
    "type": "object",
    "propertyNames": {"pattern": rf"^{re.escape(METADATA)}."},
    "additionalProperties": {"type": "string"},
    "maxProperties": METADATA_FILTERS,
}
# The forms of a Place. A number may be negative, because imported history is placed before the existing runs.
NUMBER = re.compile(r"-?\d{1,18}", re.ASCII)
NUMBER_AT_TIME = re.compile(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{3}}Z,{NUMBER.pattern}", re.ASCII)
ROWID = r"-?[0-4]?\d{1,18}"
IN_SEARCH = re.compile(rf"{ROWID},{ROWID},[012],{NUMBER.pattern}", re.ASCII)


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= HIGHEST_LIMIT):
        raise ValueError(f"must be a whole number from 1 to {HIGHEST_LIMIT}")
    return int(text)


NOT_OURS = "is not one that this service gave; take it from a Link header"


def cursor_of(place: Place) -> str:
    """Return the cursor that continues after a place in a list."""
    text = str(place) if isinstance(place, int) else ",".join(map(str, place))
    return base64.urlsafe_b64encode(text.encode()).decode()


def _decode_place(cursor: str) -> Place:
    with contextlib.suppress(ValueError):
        text = base64.urlsafe_b64decode(cursor.encode("ascii")).decode("ascii")
        if NUMBER.fullmatch(text):
            return int(text)
        if NUMBER_AT_TIME.fullmatch(text):
            time, number = text.split(",")
            return time, int(number)
        if IN_SEARCH.fullmatch(text):
            return SearchPosition(*map(int, text.split(",")))
    raise ValueError(NOT_OURS)


def _decode_number(cursor: str) -> int:
    place = _decode_place(cursor)
    if isinstance(place, int):
        return place
    raise ValueError(NOT_OURS)


def _time(text: str) -> str:
    with contextlib.suppress(ValueError):
        return timestamp_of(text)
    raise ValueError(
        "must be a time such as 2026-11-22T05:40:54Z or a date such as 2026-11-22; write + as %2B in a URL"
    )


def _true_or_false(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("must be true or false")
    return text == "true"


def _metadata(_: str) -> dict[str, str]:
    raise ValueError(f"needs a key and a value: {METADATA}KEY=VALUE")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= LONGEST_WAIT:
        raise ValueError(f"must be a number of seconds from 0 to {LONGEST_WAIT:.0f}")
    return seconds


def _types(text: str) -> list[str]:
    types = [name.strip() for name in text.split(",")]
    if not all(types) or len(types) > TYPES or "\0" in text:
        raise ValueError("must be message types separated by commas")
    return types


def _search(text: str) -> str:
    if len(no_nul(text)) > SEARCH_CHARACTERS:
        raise ValueError(f"must be at most {SEARCH_CHARACTERS} characters")
    return text


def _history(text: str) -> str:
    if text not in ("own", "full"):
        raise ValueError("must be full, or left out for the session's own runs")
    return text


Limit = Annotated[
    Annotated[int, Field(ge=1, le=HIGHEST_LIMIT)],
    BeforeValidator(_limit),
    Field(description="The maximum number of items."),
]
PageCursor = Annotated[
    Annotated[int, BeforeValidator(_decode_number), WithJsonSchema({"type": "string"})] | None,
    Field(description="Where the page begins, from the `Link` header of the page before."),
]
ListCursor = Annotated[
    Annotated[Any, BeforeValidator(_decode_place), WithJsonSchema({"type": "string"})],
    Field(description="Where the page begins, from the `Link` header of the page before."),
]
Time = Annotated[
    Annotated[str, BeforeValidator(_time), WithJsonSchema({"type": "string", "format": "date-time"})] | None,
    Field(),
]
Wait = Annotated[
    Annotated[float, Field(ge=0, le=LONGEST_WAIT)],
    BeforeValidator(_seconds),
    Field(description="How long to wait for a result (seconds)."),
]
After = Annotated[str | None, Field(description="The position that was read last. The response begins after it.")]
Types = Annotated[
    Annotated[list[str], BeforeValidator(_types), WithJsonSchema({"type": "string"})] | None,
    Field(description="The types of message to keep, separated by commas."),
]
Text = Annotated[str, AfterValidator(no_nul)]


class Order(StrEnum):
    # The newest or latest first.
    DESC = "desc"
    # The oldest first.
    ASC = "asc"


class Fields(StrEnum):
    # Without the fields that may be long.
    SUMMARY = "summary"


class Query(BaseModel):
    """The parameters of a route that takes none, and the base class of the others. Errors list them in this order."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    @classmethod
    def read(cls, given: MultiDict[str, str]) -> Self:
        """Validate the parameters of a request.

        Raises:
            ValidationError: a parameter is invalid, or unknown, which is most likely a typo, or repeated: the second
                value would be ignored.
        """
        for name, values in given.lists():
            if name not in cls.model_fields:
                known = f"it takes {', '.join(cls.model_fields)}" if cls.model_fields else "it takes none"
                hint = cls._hint(name[:NAME_CHARACTERS])
                raise ValidationError(f"{name} is not a known query parameter here: {known}{hint}", field=name)
            if len(values) > 1:
                raise ValidationError(f"{name} is given {len(values)} times; give it once.", field=name)
        try:
            return cls.model_validate(given.to_dict())
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            field, reason = str(first["loc"][0]), first["msg"].removeprefix("Value error, ")
            if first["type"] == "enum":
                choices: type[StrEnum] = get_args(cls.model_fields[field].annotation)[0]
                hint = did_you_mean(suggestion(first["input"], choices))
                known = ", ".join(choices) if len(choices) == 1 else f"one of {', '.join(choices)}"
                raise ValidationError(f"{field}: must be {known}{hint}", field=field) from None
            raise ValidationError(f"{field}: {reason}.", field=field) from None

    @classmethod
    def _hint(cls, name: str) -> str:
        """Return the end of the sentence about an unknown parameter."""
        return did_you_mean(suggestion(name, cls.model_fields))

    def given(self, *names: str) -> dict[str, str]:
        """Return those of the named parameters that have a value."""
        return self.model_dump(include=set(names), exclude_none=True)


class PageQuery(Query):
    limit: Limit = DEFAULT_LIMIT
    cursor: PageCursor = None


class WaitQuery(Query):
    wait: Wait = 0.0


class StreamQuery(Query):
    after: After = None


class ListQuery(Query):
    """The parameters that the lists of runs and of sessions share."""

    createdBy: Text | None = Field(default=None, description="Those that a client started, by the name of its token.")
    since: Time = Field(default=None, description="Those of this time or later. The list is then ordered by time.")
    until: Time = Field(default=None, description="Those before this time. The list is then ordered by time.")
    metadata: Annotated[dict[str, str], BeforeValidator(_metadata), WithJsonSchema(METADATA_SCHEMA)] = Field(
        default_factory=dict,
        description="Those whose session has this value in its metadata, written `metadata.KEY=VALUE`. The value is a "
        "text, a number, true, false or null. May be repeated with other keys.",
    )
    order: Order | None = Field(
        default=None, description="`asc` lists the oldest first, `desc`, the default, the newest."
    )
    fields: Fields | None = Field(default=None, description="`summary` leaves out the fields that may be long.")
    limit: Limit = DEFAULT_LIMIT
    cursor: ListCursor = None

    @classmethod
    def read(cls, given: MultiDict[str, str]) -> Self:
        """Validate the parameters of a request, and collect those that begin with METADATA.

        Raises:
            ValidationError: as Query.read, or the cursor belongs to a list with other parameters.
        """
        others = MultiDict([item for item in given.items(multi=True) if not item[0].startswith(METADATA)])
        metadata: dict[str, str] = {}
        for name, values in given.lists():
            if name.startswith(METADATA):
                key = name.removeprefix(METADATA)
                if not key:
                    raise ValidationError(f"{name} needs a key: {METADATA}KEY=VALUE.", field=name)
                if len(values) > 1:
                    raise ValidationError(f"{name} is given {len(values)} times; give it once.", field=name)
                metadata[key] = values[0]
        if len(metadata) > METADATA_FILTERS:
            raise ValidationError(f"metadata: at most {METADATA_FILTERS} keys can be given.", field="metadata")
        query = super().read(others).model_copy(update={"metadata": metadata})
        if query.cursor is not None and type(query.cursor) is not query.place:
            raise ValidationError(f"cursor: {NOT_OURS}.", field="cursor")
        return query

    @classmethod
    def _hint(cls, name: str) -> str:
        key = BRACKETED.fullmatch(name)
        return did_you_mean(METADATA + key[1]) if key else super()._hint(name)

    @property
    def place(self) -> type[int | tuple[Any, ...]]:
        """The type of the places in this list."""
        return tuple if self.since or self.until else int

    def filters(self, *names: str) -> dict[str, Any]:
        """Return those filters of the list, and of the named ones, that have a value."""
        return self.given("createdBy", "since", "until", *names) | (
            {"metadata": self.metadata} if self.metadata else {}
        )


class RunsQuery(ListQuery):
    status: RunStatus | None = Field(default=None, description="Runs of this status.")
    sessionId: Text | None = Field(default=None, description="Runs of this session.")
    cwd: Text | None = Field(default=None, description="Runs in this directory.")
    mode: RunMode | None = Field(default=None, description="Runs of this mode.")
    errorCode: RunErrorCode | None = Field(default=None, description="Runs that failed with this code.")
    waiting: Annotated[bool, BeforeValidator(_true_or_false)] | None = Field(
        default=None, description="Running runs: `true` for those in the queue, `false` for those that work."
    )

    @classmethod
    def _hint(cls, name: str) -> str:
        # Runs have no search of their own: it finds sessions.
        return did_you_mean("GET /api/sessions?q=WORDS") if name in ("q", "search") else super()._hint(name)


class SessionsQuery(ListQuery):
    cwd: Text | None = Field(default=None, description="Sessions in this directory.")
    q: Annotated[str, AfterValidator(_search)] | None = Field(
        default=None,
        description="Sessions with all of these words in their title, in a prompt or in a message, the best first. "
        "The last word also finds longer words.",
    )

    @classmethod
    def read(cls, given: MultiDict[str, str]) -> Self:
        query = super().read(given)
        if query.searches and query.order is not None:
            raise ValidationError("order: with q the best sessions come first; leave order out.", field="order")
        return query

    @property
    def searches(self) -> bool:
        """Whether this is a search. An empty text is none."""
        return bool(self.q and self.q.strip())

    @property
    def place(self) -> type[int | tuple[Any, ...]]:
        return SearchPosition if self.searches else super().place


class ApprovalsQuery(Query):
    status: ApprovalStatus | None = Field(default=None, description="Approvals of this status.")
    runId: Text | None = Field(default=None, description="Approvals of this run.")
    sessionId: Text | None = Field(default=None, description="Approvals of this session.")
    limit: Limit = DEFAULT_LIMIT
    cursor: PageCursor = None
    wait: Wait = 0.0


# The parameters of a request for a page.
Paged = PageQuery | RunsQuery | SessionsQuery | ApprovalsQuery


class MessagesQuery(Query):
    """The parameters of a list of messages."""

    after: After = None
    limit: Limit | None = None
    type: Types = None
    wait: Wait = 0.0


class SessionMessagesQuery(MessagesQuery):
    history: Annotated[Literal["own", "full"], BeforeValidator(_history)] = Field(
        default="own", description="`full` prepends the messages that the session continued."
    )
