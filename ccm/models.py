"""What the service is about, as frozen values: sessions, runs, messages.

The one point where the database's and the API's camelCase meets Python's snake_case.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache
from typing import Any, NamedTuple, Self

import pydantic_core

RUNNING = "running"
COMPLETED = "completed"
ERROR = "error"
CANCELLED = "cancelled"
# Sums of floats are rounded to it: a millionth of a cent.
MONEY_DIGITS = 8

STATUSES = (RUNNING, COMPLETED, ERROR, CANCELLED)

FRESH = "fresh"
RESUME = "resume"
FORK = "fork"
MODES = (FRESH, RESUME, FORK)

RUN_CREATED = "run.created"
RUN_STARTED = "run.started"
# Of a run that has ended, by its status.
RUN_ENDED = {COMPLETED: "run.completed", ERROR: "run.failed", CANCELLED: "run.cancelled"}
APPROVAL_REQUESTED = "approval.requested"
APPROVAL_RESOLVED = "approval.resolved"

# Of an approval: it waits for its answer, or has had it, or has lost its run before it had one.
PENDING = "pending"
ALLOWED = "allowed"
DENIED = "denied"
EXPIRED = "expired"
APPROVAL_STATUSES = (PENDING, ALLOWED, DENIED, EXPIRED)
DECISIONS = {ALLOWED: "allow", DENIED: "deny"}

# Why an approval is no longer pending: somebody answered; nobody did in time; nobody was asked, for want of workers; or
# its run ended, or Claude Code took the question back.
ANSWERED = "answered"
TIMED_OUT = "timed_out"
NO_WORKER = "no_worker"
WITHDRAWN = "withdrawn"
RESOLUTIONS = (ANSWERED, TIMED_OUT, NO_WORKER, WITHDRAWN)

# To whom an event is delivered: the address of its run, or that of the service.
RUN_TARGET = "run"
SERVICE_TARGET = "service"
# Of a delivery, beside PENDING.
DELIVERED = "delivered"
FAILED = "failed"
DISABLED = "disabled"

# A run of ours has a UUID; one that was imported has the id that its first service gave it.
RUN_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,127}", re.ASCII)

REJECT = "reject"
ENQUEUE = "enqueue"
INTERRUPT = "interrupt"


def timestamp(ahead: float = 0.0) -> str:
    """Now, or so many seconds from now, as ISO 8601 in UTC with milliseconds; sorts as text."""
    seconds, milliseconds = divmod(time.time_ns() // 1_000_000 + round(ahead * 1_000), 1_000)
    return f"{_second(seconds)}.{milliseconds:03}Z"


@lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().removesuffix("+00:00")


def to_json_text(value: Any) -> str:
    """JSON in pure ASCII: PostgreSQL's text refuses NUL and lone surrogates, and the escaped form keeps them."""
    try:
        # Three times as fast as json, and for thousands of messages in a second that counts.
        return pydantic_core.to_json(value, ensure_ascii=True).decode("ascii")
    except pydantic_core.PydanticSerializationError:
        return json.dumps(value, ensure_ascii=True, separators=(",", ":"))  # it holds a lone surrogate


def storable(text: object) -> str | None:
    """A text of Claude Code's as a database takes it, None if it is no text: NUL and lone surrogates are replaced."""
    if not isinstance(text, str):
        return None
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\N{REPLACEMENT CHARACTER}")


@cache
def _columns(cls: type[Any]) -> dict[str, str]:
    """Field name to column name, for the fields of a model."""
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: re.sub(r"_(\w)", lambda match: match[1].upper(), name) for name in names}


@dataclass(frozen=True)
class Row:
    """What has columns in the database."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        columns = _columns(cls)  # type: ignore[arg-type]  # a class is hashable
        return cls(**{name: row[column] for name, column in columns.items()})


@dataclass(frozen=True)
class Run(Row):
    """One invocation of the SDK. `seq` is the order in which runs were accepted."""

    id: str
    seq: int
    session_id: str
    sdk_session_id: str
    parent_run_id: str | None
    parent_session_id: str | None
    mode: str
    status: str
    cwd: str
    prompt: str
    options_json: str
    image_count: int
    timeout_ms: int | None
    approvals: int
    approval_timeout_ms: int | None
    webhook_url: str | None
    fork_at_message: str | None
    fork_at_index: int | None
    result_type: str | None
    result_json: str | None
    error_code: str | None
    error_message: str | None
    cost_usd: float | None
    message_count: int
    duration_ms: int | None
    queue_position: int | None
    pending_approvals: int
    has_transcript: int
    transcript_stored: int
    created_by: str | None
    created_at: str
    started_at: str | None
    ended_at: str | None

    @property
    def ended(self) -> bool:
        return self.status != RUNNING

    @property
    def waiting(self) -> bool:
        return self.status == RUNNING and self.started_at is None

    @property
    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = json.loads(self.options_json)
        return options

    def to_json(self) -> dict[str, Any]:
        """The run as the API shows it."""
        result = json.loads(self.result_json) if self.result_json is not None else None
        return {
            "id": self.id,
            "runId": self.id,
            "sessionId": self.session_id,
            "sdkSessionId": self.sdk_session_id,
            "parentRunId": self.parent_run_id,
            "parentSessionId": self.parent_session_id,
            "mode": self.mode,
            "status": self.status,
            "cwd": self.cwd,
            "prompt": self.prompt,
            "options": self.options,
            "imageCount": self.image_count,
            "timeoutMs": self.timeout_ms,
            "approvals": bool(self.approvals),
            "approvalTimeoutMs": self.approval_timeout_ms,
            "webhookUrl": self.webhook_url,
            "resultType": self.result_type,
            "result": result,
            "error": None if self.error_code is None else {"code": self.error_code, "message": self.error_message},
            "permissionDenials": (result or {}).get("permission_denials") or [],
            "costUsd": self.cost_usd,
            "messageCount": self.message_count,
            "durationMs": self.duration_ms,
            "queuePosition": self.queue_position,
            "transcriptStored": bool(self.transcript_stored),
            "createdBy": self.created_by,
            "pendingApprovals": self.pending_approvals,
            "createdAt": self.created_at,
            "startedAt": self.started_at,
            "endedAt": self.ended_at,
        }


@dataclass(frozen=True)
class Session(Row):
    """A line of runs. `head_run_id` is the run that a resume continues."""

    id: str
    parent_session_id: str | None
    forked_from_run_id: str | None
    cwd: str
    title: str | None
    metadata_json: str
    status: str
    head_run_id: str | None
    run_count: int
    message_count: int
    cost_usd: float
    first_run_at: str
    last_run_at: str
    last_run_seq: int

    def to_json(self) -> dict[str, Any]:
        """The session as the API shows it."""
        return {
            "sessionId": self.id,
            "parentSessionId": self.parent_session_id,
            "forkedFromRunId": self.forked_from_run_id,
            "cwd": self.cwd,
            "title": self.title,
            "metadata": json.loads(self.metadata_json),
            "status": self.status,
            "headRunId": self.head_run_id,
            "runCount": self.run_count,
            "messageCount": self.message_count,
            "costUsd": round(self.cost_usd, MONEY_DIGITS),
            "firstRunAt": self.first_run_at,
            "lastRunAt": self.last_run_at,
        }


class Message(NamedTuple):
    """One SDK message of a run, as text. `index` counts from 0 within the run.

    A tuple, because there are thousands in a second, and a frozen dataclass takes three times as long to make.
    """

    run_id: str
    session_id: str
    index: int  # type: ignore[assignment]  # and not the method of a tuple
    type: str
    json: str
    created_at: str

    @property
    def size(self) -> int:
        """Bytes; the text is ASCII."""
        return len(self.json)


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


@dataclass(frozen=True)
class Approval(Row):
    """A question of a run and what became of it. `seq` is the order in which they were asked."""

    id: str
    seq: int
    run_id: str
    session_id: str
    tool_name: str
    tool_use_id: str | None
    input_json: str
    suggestions_json: str
    title: str | None
    display_name: str | None
    description: str | None
    blocked_path: str | None
    decision_reason: str | None
    agent_id: str | None
    status: str
    resolution: str | None
    updated_input_json: str | None
    remember: int
    message: str | None
    interrupt: int
    decided_by: str | None
    created_at: str
    expires_at: str
    resolved_at: str | None

    @property
    def pending(self) -> bool:
        return self.status == PENDING

    @property
    def decision(self) -> str | None:
        """What somebody answered, None if nobody did."""
        return DECISIONS[self.status] if self.resolution == ANSWERED else None

    @property
    def suggestions(self) -> list[dict[str, Any]]:
        suggestions: list[dict[str, Any]] = json.loads(self.suggestions_json)
        return suggestions

    @property
    def answer(self) -> Answer:
        """What Claude Code is told once it is no longer pending."""
        return Answer(
            allow=self.status == ALLOWED,
            updated_input=None if self.updated_input_json is None else json.loads(self.updated_input_json),
            remember=bool(self.remember),
            message=self.message,
            interrupt=bool(self.interrupt),
        )

    def to_json(self) -> dict[str, Any]:
        """The approval as the API shows it."""
        return {
            "id": self.id,
            "approvalId": self.id,
            "runId": self.run_id,
            "sessionId": self.session_id,
            "toolName": self.tool_name,
            "toolUseId": self.tool_use_id,
            "input": json.loads(self.input_json),
            "suggestions": self.suggestions,
            "title": self.title,
            "displayName": self.display_name,
            "description": self.description,
            "blockedPath": self.blocked_path,
            "decisionReason": self.decision_reason,
            "agentId": self.agent_id,
            "status": self.status,
            "resolution": self.resolution,
            "decision": self.decision,
            "updatedInput": self.answer.updated_input,
            "remember": bool(self.remember),
            "message": self.message,
            "interrupt": bool(self.interrupt),
            "decidedBy": self.decided_by,
            "createdAt": self.created_at,
            "expiresAt": self.expires_at,
            "resolvedAt": self.resolved_at,
        }


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


@dataclass(frozen=True)
class RunRequest:
    """What a client asked for, checked. `title` and `metadata` are for the session that it opens."""

    mode: str
    prompt: str
    images: tuple[Image, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    title: str | None = None
    metadata: Mapping[str, Any] | None = None
    timeout_ms: int | None = None
    approvals: bool = False
    approval_timeout_ms: int | None = None
    webhook_url: str | None = None
    if_busy: str = REJECT
    created_by: str | None = None
    idempotency_key: IdempotencyKey | None = None


class Accepted(NamedTuple):
    """The run that a request has made, or, where it is `replayed`, that an earlier one with the same key had made."""

    run: Run
    replayed: bool


@dataclass(frozen=True)
class TakenIn:
    """A user's message that a run has taken in: its uuid, and its index among the run's messages."""

    run_id: str
    uuid: str
    index: int

    def to_json(self) -> dict[str, str | int]:
        return {"runId": self.run_id, "messageUuid": self.uuid, "messageIndex": self.index}


@dataclass(frozen=True)
class Event:
    """Something that has happened to a run or an approval. `json` is one line of ASCII.

    Its form, `type`, `timestamp` and `data`, is that of https://www.standardwebhooks.com.
    """

    id: int
    type: str
    run_id: str
    json: str


@dataclass(frozen=True)
class Delivery(Row):
    """An event on its way to one of its addresses. `reason` is why it was given up.

    `next_attempt_at` is None, too, while an earlier one of the same run to the same target is pending.
    """

    id: int
    event_id: int
    event_type: str
    run_id: str
    target: str
    webhook_id: str
    host: str
    status: str
    reason: str | None
    attempts_json: str
    next_attempt_at: str | None

    @property
    def attempts(self) -> list[dict[str, Any]]:
        attempts: list[dict[str, Any]] = json.loads(self.attempts_json)
        return attempts

    def to_json(self) -> dict[str, Any]:
        """The delivery as the API shows it."""
        return {
            "id": self.id,
            "eventId": self.event_id,
            "eventType": self.event_type,
            "runId": self.run_id,
            "target": self.target,
            "host": self.host or None,
            "webhookId": self.webhook_id,
            "status": self.status,
            "reason": self.reason,
            "attempts": self.attempts,
            "nextAttemptAt": self.next_attempt_at,
        }


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: str
    error_code: str | None = None
    error_message: str | None = None
    result: Mapping[str, Any] | None = None
    cost_usd: float | None = None
    duration_ms: int | None = None
