"""An approval: a question of Claude Code's before it uses a tool, and the answer that it gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from ccm.models.fields import UPDATED_INPUT, DenialMessage, Id, Interrupt, JsonObject, Remember, Timestamp
from ccm.models.json_field import JsonText
from ccm.models.shape import Archive
from ccm.models.stored import StoredModel, derived


class ApprovalStatus(StrEnum):
    # It waits for its answer.
    PENDING = "pending"
    # Claude Code may use the tool.
    ALLOWED = "allowed"
    # It may not: `resolution` says who or what decided so.
    DENIED = "denied"
    # Its run has ended, or Claude Code took the question back, before there was an answer.
    EXPIRED = "expired"


class Resolution(StrEnum):
    """Why an approval is no longer pending."""

    # A client answered.
    ANSWERED = "answered"
    # No client answered in time.
    TIMED_OUT = "timed_out"
    # No client was asked, because too many runs were waiting for answers already.
    NO_WORKER = "no_worker"
    # Its run ended, or Claude Code took the question back.
    WITHDRAWN = "withdrawn"


class Decision(StrEnum):
    """What a client answers."""

    ALLOW = "allow"
    DENY = "deny"


DECISIONS = {ApprovalStatus.ALLOWED: Decision.ALLOW, ApprovalStatus.DENIED: Decision.DENY}


@dataclass(frozen=True)
class Question:
    """What Claude Code asks before it uses a tool, as the SDK tells it.

    `suggestions` are the SDK's own permission updates that would spare the next such question.
    """

    tool_name: str
    tool_use_id: str | None
    input: Mapping[str, Any]
    suggestions: tuple[Mapping[str, Any], ...] = ()
    title: str | None = None
    display_name: str | None = None
    description: str | None = None
    blocked_path: str | None = None
    decision_reason: str | None = None
    agent_id: str | None = None


@dataclass(frozen=True)
class Answer:
    """What becomes of a question.

    Args:
        updated_input: what is executed instead of what was asked for; with `allow` only.
        remember: take the question's suggestions for the rest of the run; with `allow` only.
        message: for the model to read; without `allow` only.
        interrupt: end the model's turn; without `allow` only.
    """

    allow: bool
    updated_input: Mapping[str, Any] | None = None
    remember: bool = False
    message: str | None = None
    interrupt: bool = False


class Approval(StoredModel):
    """A question of a run and what became of it."""

    id: Annotated[Id, Archive.LEFT_OUT] = Field(description="The approval's id.")
    run_id: Id = Field(description="The run that asks.")
    session_id: Annotated[Id, Archive.LEFT_OUT] = Field(description="The session of that run.")
    tool_name: str = Field(description="The tool that Claude Code wants to use.")
    tool_use_id: str | None = Field(description="The id of the tool's use in the messages.")
    input: JsonText[JsonObject] = Field(description="What the tool is to be given.")
    suggestions: JsonText[list[JsonObject]] = Field(
        description="The SDK's own permission updates that would spare the next such question."
    )
    title: str | None = Field(description="Claude Code's title of the question.")
    display_name: str | None = Field(description="Claude Code's name of the tool for people.")
    description: str | None = Field(description="Claude Code's own description of the use.")
    blocked_path: str | None = Field(description="The path because of which Claude Code asks.")
    decision_reason: str | None = Field(description="Why Claude Code asks.")
    agent_id: str | None = Field(description="The subagent that asks; null for the main one.")
    status: ApprovalStatus = Field(description="Where the approval stands.")
    resolution: Resolution | None = Field(description="Why it is no longer pending; null while it is.")
    updated_input: JsonText[JsonObject] | None = Field(description=UPDATED_INPUT)
    remember: Remember
    message: DenialMessage
    interrupt: Interrupt
    decided_by: str | None = Field(description="The name of the token of the client that answered.")
    created_at: Timestamp = Field(description="When Claude Code asked.")
    expires_at: Timestamp = Field(description="Until when an answer is waited for.")
    resolved_at: Timestamp | None = Field(description="When the approval stopped being pending.")

    # The order in which they were asked.
    seq: int = Field(exclude=True)

    @derived(after="id", description="The approval's id once more.")
    def approval_id(self) -> Id:
        return self.id

    @derived(
        after="resolution",
        description="What a client answered; null if none did.",
        archive=Archive.LEFT_OUT,
    )
    def decision(self) -> Decision | None:
        return DECISIONS[self.status] if self.resolution == Resolution.ANSWERED else None

    @property
    def pending(self) -> bool:
        return self.status == ApprovalStatus.PENDING

    @property
    def answer(self) -> Answer:
        """What Claude Code is told once it is no longer pending."""
        return Answer(
            allow=self.status == ApprovalStatus.ALLOWED,
            updated_input=None if self.updated_input is None else self.updated_input.value,
            remember=self.remember,
            message=self.message,
            interrupt=self.interrupt,
        )
