"""A run: one invocation of the SDK, and what a request for one brings along."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from ccm.models.fields import (
    PROMPT,
    Approvals,
    ApprovalTimeoutMs,
    Count,
    Id,
    JsonObject,
    TimeoutMs,
    Timestamp,
    WebhookUrl,
)
from ccm.models.json_field import JsonText
from ccm.models.shape import Archive
from ccm.models.stored import StoredModel, derived


class RunStatus(StrEnum):
    # Accepted and not ended: it waits for a worker while it has no `startedAt`.
    RUNNING = "running"
    # Claude Code gave a result that is no error.
    COMPLETED = "completed"
    # It failed, or was ended by a limit or a fault: `error` says why.
    ERROR = "error"
    # A client ended it.
    CANCELLED = "cancelled"


class RunMode(StrEnum):
    # The first run of a new session.
    FRESH = "fresh"
    # The next run of its session.
    RESUME = "resume"
    # The first run of a session that branches off another.
    FORK = "fork"


class RunError(TypedDict):
    """Why a run failed."""

    code: str
    message: str | None


class Run(StoredModel):
    """One invocation of the SDK."""

    id: Annotated[Id, Archive.LEFT_OUT] = Field(description="The run's id.")
    session_id: Id = Field(description="The session that the run belongs to.")
    sdk_session_id: Id = Field(description="Claude Code's own session id, which names the transcript.")
    parent_run_id: Id | None = Field(description="The run that this one continues.")
    parent_session_id: Id | None = Field(description="The session that a fork branches off.")
    mode: RunMode = Field(description="How the run came about.")
    status: RunStatus = Field(description="Where the run stands.")
    cwd: str = Field(description="The directory that Claude Code works in.")
    # Not within the bounds of a request's: a run of the original service may have none.
    prompt: str = Field(description=PROMPT)
    options: JsonText[JsonObject] = Field(description="The SDK's options, as the client gave them.")
    image_count: Count = Field(description="How many pictures came with the prompt.")
    timeout_ms: TimeoutMs
    # Older exports have neither this nor the next two.
    approvals: Approvals = False
    approval_timeout_ms: ApprovalTimeoutMs
    webhook_url: WebhookUrl
    result_type: str | None = Field(description="The subtype of Claude Code's result, such as `success`.")
    result: JsonText[JsonObject] | None = Field(description="Claude Code's result message, as the SDK gave it.")
    error_code: str | None = Field(exclude=True)
    error_message: str | None = Field(exclude=True)
    cost_usd: float | None = Field(description="What the run itself cost, without what it continues (USD).")
    message_count: Count = Field(description="How many messages are recorded.")
    duration_ms: Count | None = Field(description="How long Claude Code was at work (ms).")
    queue_position: Annotated[Count | None, Archive.LEFT_OUT] = Field(
        description="The run's place among those that wait for a worker, from 1; null once it has started."
    )
    transcript_stored: bool = Field(description="Whether the database holds the run's transcript whole.")
    created_by: str | None = Field(description="The name of the token that the client showed.")
    pending_approvals: Annotated[Count, Archive.LEFT_OUT] = Field(
        description="How many approvals of the run wait for answers."
    )
    created_at: Timestamp = Field(description="When the run was accepted.")
    started_at: Timestamp | None = Field(description="When the run left the queue.")
    ended_at: Timestamp | None = Field(description="When the run ended.")

    # The order in which runs were accepted.
    seq: Annotated[int, Archive.BOTH] = Field(exclude=True)
    # Where a fork branches off in its parent: the message, and its index.
    fork_at_message: Annotated[Id | None, Archive.BOTH] = Field(exclude=True)
    fork_at_index: Annotated[Count | None, Archive.BOTH] = Field(exclude=True)
    # Whether Claude Code has written a transcript, so that the run can be continued.
    has_transcript: Annotated[bool, Archive.BOTH] = Field(exclude=True)
    # The client's own name for its request, and a digest of that request.
    idempotency_key: Annotated[str | None, Archive.BOTH] = Field(default=None, exclude=True)
    request_digest: Annotated[str | None, Archive.BOTH] = Field(default=None, exclude=True)

    @derived(after="id", description="The run's id once more, under the name that other resources have for it.")
    def run_id(self) -> Id:
        return self.id

    @derived(after="result", description="Why the run failed; null if it did not.")
    def error(self) -> RunError | None:
        return None if self.error_code is None else {"code": self.error_code, "message": self.error_message}

    @derived(
        after="error",
        description="What Claude Code was not allowed to do, as its result lists it.",
        archive=Archive.LEFT_OUT,
    )
    def permission_denials(self) -> list[Any]:
        result = None if self.result is None else self.result.value
        return (result or {}).get("permission_denials") or []

    @property
    def ended(self) -> bool:
        return self.status != RunStatus.RUNNING

    @property
    def waiting(self) -> bool:
        return self.status == RunStatus.RUNNING and self.started_at is None


@dataclass(frozen=True)
class Image:
    """A picture that goes with a prompt; `data` is base64."""

    media_type: str
    data: str


@dataclass(frozen=True)
class IdempotencyKey:
    """A client's own name for a request, and a digest of that request: the same name goes with the same request."""

    text: str
    digest: str
