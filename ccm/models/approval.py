"""An approval: Claude Code's request for permission to use a tool, and the answer to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from ccm.models.fields import UPDATED_INPUT, DenialMessage, Id, Interrupt, Remember, Timestamp
from ccm.models.json_field import JsonObject, JsonText
from ccm.models.shape import Archive
from ccm.models.stored import StoredModel, derived


class ApprovalStatus(StrEnum):
    # Waiting for an answer.
    PENDING = "pending"
    # Claude Code may use the tool.
    ALLOWED = "allowed"
    # Claude Code may not use the tool; `resolution` says why.
    DENIED = "denied"
    # The run ended, or Claude Code withdrew the request, before there was an answer.
    EXPIRED = "expired"


class Resolution(StrEnum):
    """Why an approval is no longer pending."""

    # A client answered.
    ANSWERED = "answered"
    # No client answered in time.
    TIMED_OUT = "timed_out"
    # No client was asked, because too many runs were waiting for answers already.
    NO_WORKER = "no_worker"
    # The run ended, or Claude Code withdrew the request.
    WITHDRAWN = "withdrawn"


class Decision(StrEnum):
    """A client's answer."""

    ALLOW = "allow"
    DENY = "deny"


DECISIONS = {ApprovalStatus.ALLOWED: Decision.ALLOW, ApprovalStatus.DENIED: Decision.DENY}


@dataclass(frozen=True)
class Question:
    """Claude Code's request for permission to use a tool, as the SDK reports it.

    `suggestions` are the SDK's permission updates that would make the next such request unnecessary.
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
    """The answer to a request.

    Args:
        updated_input: the input to execute instead of the requested one; with `allow` only.
        remember: apply the request's suggestions for the rest of the run; with `allow` only.
        message: shown to the model; without `allow` only.
        interrupt: end the model's turn; without `allow` only.
    """

    allow: bool
    updated_input: Mapping[str, Any] | None = None
    remember: bool = False
    message: str | None = None
    interrupt: bool = False


class Approval(StoredModel):
    """A run's request for permission, and its outcome."""

    id: Annotated[Id, Archive.LEFT_OUT] = Field(description="The approval's id.")
    run_id: Id = Field(description="The run that asks.")
    session_id: Annotated[Id, Archive.LEFT_OUT] = Field(description="The session of that run.")
    tool_name: str = Field(description="The tool that Claude Code wants to use.")
    tool_use_id: str | None = Field(description="The id of the tool's use in the messages.")
    input: JsonText[JsonObject] = Field(description="The input for the tool.")
    suggestions: JsonText[list[JsonObject]] = Field(
        description="The SDK's permission updates that would make the next such request unnecessary."
    )
    title: str | None = Field(description="Claude Code's title for the request.")
    display_name: str | None = Field(description="Claude Code's display name for the tool.")
    description: str | None = Field(description="Claude Code's description of the tool's use.")
    blocked_path: str | None = Field(description="The path that made Claude Code ask.")
    decision_reason: str | None = Field(description="Why Claude Code asks.")
    agent_id: str | None = Field(description="The subagent that asks; null for the main one.")
    status: ApprovalStatus = Field(description="The state of the approval.")
    resolution: Resolution | None = Field(description="Why the approval is no longer pending; null while it is.")
    updated_input: JsonText[JsonObject] | None = Field(description=UPDATED_INPUT)
    remember: Remember
    message: DenialMessage
    interrupt: Interrupt
    decided_by: str | None = Field(description="The name of the token of the client that answered.")
    created_at: Timestamp = Field(description="When Claude Code asked.")
    expires_at: Timestamp = Field(description="When the approval times out.")
    resolved_at: Timestamp | None = Field(description="When the approval stopped being pending.")

    # The order of the requests.
    seq: int = Field(exclude=True)

    @derived(after="id", description="The approval's id again.")
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
        """The answer for Claude Code, once the approval is no longer pending."""
        return Answer(
            allow=self.status == ApprovalStatus.ALLOWED,
            updated_input=None if self.updated_input is None else self.updated_input.value,
            remember=self.remember,
            message=self.message,
            interrupt=self.interrupt,
        )
