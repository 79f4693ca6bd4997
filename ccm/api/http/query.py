"""The query parameters: one model per route, which validates and describes them."""

from __future__ import annotations

import base64
import contextlib
import re
from enum import StrEnum
from typing import Annotated, Literal, Self, get_args

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from werkzeug.datastructures import MultiDict

from ccm.api.http.suggestions import did_you_mean, suggestion
from ccm.errors import ValidationError
from ccm.models import ApprovalStatus, RunMode, RunStatus
from ccm.models.fields import no_nul

DEFAULT_LIMIT = 100
HIGHEST_LIMIT = 1_000
LONGEST_WAIT = 300.0
SEARCH_CHARACTERS = 1_000
TYPES = 50
# The longest unknown name for which a similar one is looked for.
NAME_CHARACTERS = 100
# A run's seq. It may be negative, because imported history is placed before the existing runs.
POSITION = re.compile(r"-?\d{1,18}", re.ASCII)


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= HIGHEST_LIMIT):
        raise ValueError(f"must be a whole number from 1 to {HIGHEST_LIMIT}")
    return int(text)


def cursor_of(position: int) -> str:
    """Return the cursor that continues after a position in a list."""
    return base64.urlsafe_b64encode(str(position).encode()).decode()


def _decode_cursor(cursor: str) -> int:
    with contextlib.suppress(ValueError):
        position = base64.urlsafe_b64decode(cursor.encode("ascii")).decode("ascii")
        if POSITION.fullmatch(position):
            return int(position)
    raise ValueError("is not one that this service gave; take it from a Link header")


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
    Annotated[int, BeforeValidator(_decode_cursor), WithJsonSchema({"type": "string"})] | None,
    Field(description="Where the page begins, from the `Link` header of the page before."),
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
                hint = did_you_mean(suggestion(name[:NAME_CHARACTERS], cls.model_fields))
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
                raise ValidationError(f"{field}: must be one of {', '.join(choices)}{hint}", field=field) from None
            raise ValidationError(f"{field}: {reason}.", field=field) from None

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


class RunsQuery(Query):
    status: RunStatus | None = Field(default=None, description="Runs of this status.")
    sessionId: Text | None = Field(default=None, description="Runs of this session.")
    cwd: Text | None = Field(default=None, description="Runs in this directory.")
    mode: RunMode | None = Field(default=None, description="Runs of this mode.")
    limit: Limit = DEFAULT_LIMIT
    cursor: PageCursor = None


class SessionsQuery(Query):
    cwd: Text | None = Field(default=None, description="Sessions in this directory.")
    q: Annotated[str, AfterValidator(_search)] | None = Field(
        default=None, description="Sessions with this text in their title or in a prompt of their runs."
    )
    limit: Limit = DEFAULT_LIMIT
    cursor: PageCursor = None


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
