"""Types that several models and request bodies share, with their limits and descriptions."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, JsonValue

from ccm.models.shape import Mark
from ccm.settings.webhook_urls import web_address

# Our runs have UUIDs. An imported run keeps the id from its original service.
RUN_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,127}", re.ASCII)
# Not ids of runs, because these paths below /api/runs are actions.
RESERVED_RUN_IDS = ("start", "resume", "fork")
# Sums of dollars are rounded to this many digits: a millionth of a cent.
MONEY_DIGITS = 8
PROMPT_CHARACTERS = 1_000_000
TITLE_CHARACTERS = 500
# Linux limits one argument of a program to 128 KiB, and some options are passed as one argument.
ARGUMENT_CHARACTERS = 100_000
TIMEOUT_MS = 24 * 3600 * 1000
APPROVAL_TIMEOUT_MS = 30 * TIMEOUT_MS
# The limit of a denial's message for the model.
MESSAGE_CHARACTERS = 100_000


def no_nul(text: str) -> str:
    """Refuse a text with NUL, which PostgreSQL cannot store."""
    if "\0" in text:
        raise ValueError("must not contain the character NUL")
    return text


def not_blank(text: str) -> str:
    """Refuse a text that is empty, blank or contains NUL."""
    if not text.strip():
        raise ValueError("must not be blank")
    return no_nul(text)


def finite(value: Any) -> Any:
    """Refuse NaN and Infinity: pydantic accepts them, but they are not valid JSON in an answer."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("must not contain NaN or Infinity") from None
    return value


def plain_json(value: Any) -> Any:
    """Refuse a value that is not valid JSON, or is too long."""
    if len(json.dumps(finite(value))) > ARGUMENT_CHARACTERS:
        raise ValueError(f"must be at most {ARGUMENT_CHARACTERS} characters of JSON")
    return value


Id = Annotated[str, Field(pattern=rf"^{RUN_ID.pattern}$"), Mark.ID]
Timestamp = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Count = Annotated[int, Field(ge=0), Mark.COUNT]

# What not_blank checks, for JSON schemas.
NOT_BLANK = {"pattern": r"[^\s\x1c-\x1f\x85]"}
PROMPT = "The user's message to Claude Code."
Prompt = Annotated[
    str,
    Field(max_length=PROMPT_CHARACTERS, description=PROMPT, json_schema_extra=NOT_BLANK),
    AfterValidator(not_blank),
]
TimeoutMs = Annotated[
    Annotated[int, Field(ge=1, le=TIMEOUT_MS)] | None,
    Field(description="The time limit of the run from its start (ms); null for no limit of its own."),
]
Approvals = Annotated[bool, Field(description="Whether clients decide on Claude Code's requests to use tools.")]
ApprovalTimeoutMs = Annotated[
    Annotated[int, Field(ge=1, le=APPROVAL_TIMEOUT_MS)] | None,
    Field(description="How long each approval waits for an answer (ms); null for the service's default."),
]
WebhookUrl = Annotated[
    Annotated[str, AfterValidator(web_address)] | None,
    Field(description="The address that receives the run's events; null for none."),
]
Title = Annotated[
    Annotated[str, Field(max_length=TITLE_CHARACTERS), AfterValidator(no_nul)] | None,
    Field(description="The session's title, as the client gave it."),
]
Metadata = Annotated[
    dict[str, JsonValue],
    AfterValidator(plain_json),
    Field(description="The client's own data about the session, a JSON object."),
]
UPDATED_INPUT = "The input to execute instead of the requested one; null for no change."
UpdatedInput = Annotated[
    Annotated[dict[str, JsonValue], AfterValidator(finite)] | None, Field(description=UPDATED_INPUT)
]
Remember = Annotated[
    bool, Field(description="Whether the request's suggestions apply to the rest of the run, so that it asks less.")
]
DenialMessage = Annotated[
    Annotated[str, Field(max_length=MESSAGE_CHARACTERS, json_schema_extra=NOT_BLANK), AfterValidator(not_blank)] | None,
    Field(description="The message to the model about a denial."),
]
Interrupt = Annotated[bool, Field(description="Whether a denial also ends the model's turn.")]
