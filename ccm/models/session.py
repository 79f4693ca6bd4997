"""A session: a line of runs, each of which continues the one before it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from typing_extensions import TypedDict

from ccm.models.fields import MONEY_DIGITS, Count, Id, Metadata, Timestamp, Title
from ccm.models.json_field import JsonText
from ccm.models.shape import Archive, Mark
from ccm.models.stored import StoredModel


class SessionStatus(StrEnum):
    # A run of the session has not ended.
    RUNNING = "running"
    # All runs of the session have ended.
    IDLE = "idle"


class Where(StrEnum):
    """The kind of a text that a search found."""

    # The session's title.
    TITLE = "title"
    # The prompt of one of its runs.
    PROMPT = "prompt"
    # A message of one of its runs: what Claude said, its result, or a user's message to the running run.
    MESSAGE = "message"


class Match(TypedDict):
    """The text that a search found."""

    where: Annotated[Where, Field(description="The kind of the text.")]
    runId: Annotated[Id | None, Field(description="The run of the prompt or message; null for a title.")]
    index: Annotated[int | None, Field(description="The index of the message in its run; null for other texts.")]
    snippet: Annotated[str, Field(description="The part of the text with the words that were searched, on one line.")]


class Session(StoredModel):
    """A line of runs."""

    id: Annotated[Id, Field(serialization_alias="sessionId")] = Field(description="The session's id.")
    parent_session_id: Id | None = Field(description="The session that this one was forked from.")
    forked_from_run_id: Id | None = Field(description="The run that this session branches off.")
    cwd: str = Field(description="The directory of the session's runs.")
    title: Title
    metadata: JsonText[Metadata]
    status: Annotated[SessionStatus, Archive.LEFT_OUT] = Field(description="Whether any of its runs has not ended.")
    head_run_id: Annotated[Id | None, Archive.EXPORTED] = Field(description="The run that a resume continues.")
    run_count: Annotated[Count, Archive.EXPORTED] = Field(description="How many runs the session has.")
    message_count: Annotated[Count, Archive.EXPORTED] = Field(description="How many messages its runs have.")
    cost_usd: Annotated[float, BeforeValidator(partial(round, ndigits=MONEY_DIGITS)), Archive.EXPORTED] = Field(
        description="The total cost of its ended runs (USD)."
    )
    first_run_at: Annotated[Timestamp, Archive.EXPORTED] = Field(description="When its first run was accepted.")
    last_run_at: Annotated[Timestamp, Archive.EXPORTED] = Field(description="When its newest run was accepted.")

    # The `seq` of its newest run, by which sessions are listed.
    last_run_seq: int = Field(exclude=True)

    @classmethod
    def to_columns(cls, shown: Mapping[str, Any]) -> dict[str, Any]:
        """Convert the API's names and values to those of columns. Missing metadata becomes an empty object."""
        return super().to_columns({**shown, "metadata": shown["metadata"] or {}} if "metadata" in shown else shown)


class ListedSession(Session):
    """A session in the list of all sessions."""

    match: Annotated[Match | None, Mark.UNSTORED, Archive.LEFT_OUT] = Field(
        default=None, description="The best of the session's texts that `q` has found; null without `q`."
    )


class SessionSummary(ListedSession):
    """A session in that list without what may be long."""

    left_out = frozenset({"metadata"})
