"""Types that fields of several models and request bodies share: each bound and each description stands here once."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, JsonValue

from ccm.models.shape import Mark
from ccm.settings.webhook_urls import web_address

# A run of ours has a UUID; one that was imported has the id that its first service gave it.
RUN_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,127}", re.ASCII)
# Sums of floats are rounded to it: a millionth of a cent.
MONEY_DIGITS = 8
PROMPT_CHARACTERS = 1_000_000
TITLE_CHARACTERS = 500
# Linux takes 128 KiB in one argument of a program; some options travel as one.
ARGUMENT_CHARACTERS = 100_000
TIMEOUT_MS = 24 * 3600 * 1000
APPROVAL_TIMEOUT_MS = 30 * TIMEOUT_MS
# Of what the model is told with a denial.
MESSAGE_CHARACTERS = 100_000


def no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain the character NUL")
    return text


def not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return no_nul(text)


def finite(value: Any) -> Any:
    """Refuse NaN and Infinity, which pydantic reads and JSON does not have: it could not be written out again."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("must not contain NaN or Infinity") from None
    return value


def plain_json(value: Any) -> Any:
    """Refuse what JSON does not have or what is too long."""
    if len(json.dumps(finite(value))) > ARGUMENT_CHARACTERS:
        raise ValueError(f"must be at most {ARGUMENT_CHARACTERS} characters of JSON")
    return value


Id = Annotated[str, Field(pattern=rf"^{RUN_ID.pattern}$"), Mark.ID]
Timestamp = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Count = Annotated[int, Field(ge=0), Mark.COUNT]
JsonObject = dict[str, Any]

PROMPT = "What the user says to Claude Code."
Prompt = Annotated[str, Field(max_length=PROMPT_CHARACTERS, description=PROMPT), AfterValidator(not_blank)]
TimeoutMs = Annotated[
    Annotated[int, Field(ge=1, le=TIMEOUT_MS)] | None,
    Field(description="How long the run may take once it has started (ms); null for no limit of its own."),
]
Approvals = Annotated[
    bool, Field(description="Whether Claude Code's questions before it uses a tool are put to clients.")
]
ApprovalTimeoutMs = Annotated[
    Annotated[int, Field(ge=1, le=APPROVAL_TIMEOUT_MS)] | None,
    Field(description="How long each approval waits for its answer (ms); null for the service's own time."),
]
WebhookUrl = Annotated[
    Annotated[str, AfterValidator(web_address)] | None,
    Field(description="The address that is told what becomes of the run; null for none."),
]
Title = Annotated[
    Annotated[str, Field(max_length=TITLE_CHARACTERS), AfterValidator(no_nul)] | None,
    Field(description="The session's title, as the client gave it."),
]
Metadata = Annotated[
    dict[str, JsonValue],
    AfterValidator(plain_json),
    Field(description="The client's own data on the session, a JSON object."),
]
UPDATED_INPUT = "What is executed instead of what was asked for; null for no change."
UpdatedInput = Annotated[
    Annotated[dict[str, JsonValue], AfterValidator(finite)] | None, Field(description=UPDATED_INPUT)
]
Remember = Annotated[
    bool, Field(description="Whether the question's suggestions hold for the rest of the run, so that it asks less.")
]
DenialMessage = Annotated[
    Annotated[str, Field(max_length=MESSAGE_CHARACTERS), AfterValidator(not_blank)] | None,
    Field(description="What the model is told with a denial."),
]
Interrupt = Annotated[bool, Field(description="Whether a denial also ends the model's turn.")]
