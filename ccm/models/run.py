"""A run: one invocation of the SDK. Also the images and the idempotency key of its request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from ccm.models.fields import PROMPT, Approvals, ApprovalTimeoutMs, Count, Id, TimeoutMs, Timestamp, WebhookUrl
from ccm.models.json_field import JsonObject, JsonText
from ccm.models.shape import Archive
from ccm.models.stored import StoredModel, derived


class RunStatus(StrEnum):
    # Accepted and not ended. Without a `startedAt` it waits for a worker.
    RUNNING = "running"
    # Claude Code returned a result that is not an error.
    COMPLETED = "completed"
    # Failed, or ended by a limit or a fault; `error` says why.
    ERROR = "error"
    # Ended by a client.
    CANCELLED = "cancelled"


class RunMode(StrEnum):
    # The first run of a new session.
    FRESH = "fresh"
    # The next run of its session.
    RESUME = "resume"
    # The first run of a session that branches off another.
    FORK = "fork"


class RunErrorCode(StrEnum):
    # The service stopped or died while the run was in progress.
    INTERRUPTED = "INTERRUPTED"
    # Claude Code is not logged in, or its key is refused.
    AUTHENTICATION_FAILED = "AUTHENTICATION_FAILED"
    # The model's API gave an error.
    API_ERROR = "API_ERROR"
    # It took maxTurns, or CCM_MAX_TURNS.
    MAX_TURNS_REACHED = "MAX_TURNS_REACHED"
    # It cost maxBudgetUsd, or CCM_MAX_BUDGET_USD.
    MAX_BUDGET_REACHED = "MAX_BUDGET_REACHED"
    # It took timeoutMs, or CCM_RUN_TIMEOUT.
    TIMEOUT = "TIMEOUT"
    # An approval was denied with interrupt.
    APPROVAL_DENIED = "APPROVAL_DENIED"
    # The model did not keep to the outputFormat.
    STRUCTURED_OUTPUT_FAILED = "STRUCTURED_OUTPUT_FAILED"
    # Claude Code is not there, or may not be executed.
    CLI_NOT_FOUND = "CLI_NOT_FOUND"
    # Claude Code ended without a result.
    CLI_CRASHED = "CLI_CRASHED"
    # Claude Code was started and did not answer.
    CLI_NOT_RESPONDING = "CLI_NOT_RESPONDING"
    # The directory for the run's temporary files (TMPDIR) is full or cannot be written.
    TMPDIR_NOT_WRITABLE = "TMPDIR_NOT_WRITABLE"
    # Its directory is not there any more.
    CWD_NOT_FOUND = "CWD_NOT_FOUND"
    # Its directory is outside CCM_ALLOWED_ROOTS by now.
    CWD_FORBIDDEN = "CWD_FORBIDDEN"
    # The settings do not allow an option any more.
    OPTION_FORBIDDEN = "OPTION_FORBIDDEN"
    # The SDK cannot use its options.
    OPTIONS_UNUSABLE = "OPTIONS_UNUSABLE"
    # A message was larger than CCM_MAX_MESSAGE_BYTES.
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    # The transcript that it was to continue is not there.
    SESSION_NOT_RESUMABLE = "SESSION_NOT_RESUMABLE"
    # Anything else; the message says what.
    EXECUTION_ERROR = "EXECUTION_ERROR"


class RunError(TypedDict):
    """Why a run failed."""

    code: Annotated[str, Field(description="The reason, such as `TIMEOUT` or `INTERRUPTED`.")]
    message: Annotated[str | None, Field(description="The reason in words, and what to do about it.")]


class Run(StoredModel):
    """One invocation of the SDK."""

    id: Annotated[Id, Archive.LEFT_OUT] = Field(description="The run's id.")
    session_id: Id = Field(description="The session that the run belongs to.")
    sdk_session_id: Id = Field(description="Claude Code's own session id, which names the transcript.")
    parent_run_id: Id | None = Field(description="The run that this one continues.")
    parent_session_id: Id | None = Field(description="The session that this fork branches off.")
    mode: RunMode = Field(description="Whether the run is the first of a new session, a resume or a fork.")
    status: RunStatus = Field(description="The state of the run.")
    cwd: str = Field(description="The directory that Claude Code works in.")
    # Without the limits of a request, because an imported run may have an empty prompt.
    prompt: str = Field(description=PROMPT)
    options: JsonText[JsonObject] = Field(description="The SDK's options, as the client gave them.")
    image_count: Count = Field(description="How many images came with the prompt.")
    timeout_ms: TimeoutMs
    # Older exports lack this field and the next two.
    approvals: Approvals = False
    approval_timeout_ms: ApprovalTimeoutMs
    webhook_url: WebhookUrl
    result_type: str | None = Field(description="The subtype of Claude Code's result, such as `success`.")
    result: JsonText[JsonObject] | None = Field(description="Claude Code's result message, as the SDK gave it.")
    error_code: str | None = Field(exclude=True)
    error_message: str | None = Field(exclude=True)
    cost_usd: float | None = Field(description="The cost of the run itself, without the runs that it continues (USD).")
    message_count: Count = Field(description="How many messages are recorded.")
    duration_ms: Count | None = Field(description="How long Claude Code worked (ms).")
    queue_position: Annotated[Count | None, Archive.LEFT_OUT] = Field(
        description="The run's position in the queue for a worker, from 1; null once it has started."
    )
    transcript_stored: bool = Field(description="Whether the database has the run's complete transcript.")
    created_by: str | None = Field(description="The name of the client's token.")
    pending_approvals: Annotated[Count, Archive.LEFT_OUT] = Field(
        description="How many approvals of the run are pending."
    )
    created_at: Timestamp = Field(description="When the run was accepted.")
    started_at: Timestamp | None = Field(description="When the run left the queue.")
    ended_at: Timestamp | None = Field(description="When the run ended.")

    # The order in which runs were accepted.
    seq: Annotated[int, Archive.BOTH] = Field(exclude=True)
    # The message at which a fork branches off its parent, and its index.
    fork_at_message: Annotated[Id | None, Archive.BOTH] = Field(exclude=True)
    fork_at_index: Annotated[Count | None, Archive.BOTH] = Field(exclude=True)
    # Whether Claude Code has written a transcript, without which the run cannot be continued.
    has_transcript: Annotated[bool, Archive.BOTH] = Field(exclude=True)
    # The Idempotency-Key of the request, and a digest of the request.
    idempotency_key: Annotated[str | None, Archive.BOTH] = Field(default=None, exclude=True)
    request_digest: Annotated[str | None, Archive.BOTH] = Field(default=None, exclude=True)

    @derived(after="id", description="The run's id again, under the name that other resources use.")
    def run_id(self) -> Id:
        return self.id

    @derived(after="result", description="Why the run failed; null if it did not.")
    def error(self) -> RunError | None:
        return None if self.error_code is None else {"code": self.error_code, "message": self.error_message}

    @derived(
        after="error",
        description="The denied uses of tools, as Claude Code's result lists them.",
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


class RunSummary(Run):
    """A run without what may be long."""

    left_out = frozenset({"prompt", "options", "result", "permission_denials"})


@dataclass(frozen=True)
class Image:
    """An image of a prompt; `data` is base64."""

    media_type: str
    data: str


@dataclass(frozen=True)
class IdempotencyKey:
    """A client's key for a request, and a digest of that request. A key belongs to one request."""

    text: str
    digest: str
