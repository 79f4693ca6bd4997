"""Every error that a client or an operator can be told, in one tree. A client's has one class for each code.

CCMError                        an answer to a client: message, code, HTTP status, the field at fault
├── ValidationError, Unauthorized, TooLarge, UnsupportedMediaType, KeyReused, QueueFull
├── Forbidden                   403: OptionForbidden, CwdForbidden, TimeoutForbidden, ApprovalsForbidden,
│                                    WebhookForbidden, HostForbidden, OriginForbidden
├── NotFound                    404: RunNotFound, SessionNotFound, ApprovalNotFound
├── Conflict                    409: SessionBusy, SessionNotResumable, RunAlreadyEnded, RunEnding, RunNotStarted,
│                                    ApprovalResolved
└── Unavailable                 503, worth another try: ShuttingDown, StorageUnavailable, NotTakenIn, OutcomeUnknown,
                                     StillEnding, SlotsTaken, OutOfDescriptors

StartRefused                    the service does not start; said to the operator in one sentence
├── BadSetting                  exit code 2
└── DatabaseRefused             exit code 3

CommandRefused                  a command of the operator's is not done; said in one sentence, exit code 1

StorageError                    what the database's driver raised, told apart at one edge
├── StorageDown                 not now: locked, full, unreachable; worth another try
│   ├── DatabaseTaken           another service has the right to write
│   ├── DatabaseDamaged         what is stored cannot be relied on
│   └── DatabaseClosed          the service is shutting down
└── StorageRejected             never: this very statement is refused
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class CCMError(Exception):
    """An answer to a client. `message` says what is wrong and what to do about it; only classes with a code are raised.

    Attributes:
        retry_after: after how many seconds another try makes sense, None if it makes none.
    """

    status: ClassVar[int]
    code: ClassVar[str]
    retry_after: ClassVar[int | None] = None

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field

    def to_json(self) -> dict[str, Any]:
        error = {"code": self.code, "message": self.message}
        if self.field is not None:
            error["field"] = self.field
        return {"error": error}


class ValidationError(CCMError):
    status = 400
    code = "VALIDATION_ERROR"


class Unauthorized(CCMError):
    status = 401
    code = "UNAUTHORIZED"


class Forbidden(CCMError):
    status = 403


class OptionForbidden(Forbidden):
    code = "OPTION_FORBIDDEN"


class CwdForbidden(Forbidden):
    code = "CWD_FORBIDDEN"


class TimeoutForbidden(Forbidden):
    code = "TIMEOUT_FORBIDDEN"


class ApprovalsForbidden(Forbidden):
    code = "APPROVALS_FORBIDDEN"


class WebhookForbidden(Forbidden):
    code = "WEBHOOK_FORBIDDEN"


class HostForbidden(Forbidden):
    code = "HOST_FORBIDDEN"


class OriginForbidden(Forbidden):
    code = "ORIGIN_FORBIDDEN"


class NotFound(CCMError):
    status = 404


class RunNotFound(NotFound):
    code = "RUN_NOT_FOUND"


class SessionNotFound(NotFound):
    code = "SESSION_NOT_FOUND"


class ApprovalNotFound(NotFound):
    code = "APPROVAL_NOT_FOUND"


class Conflict(CCMError):
    status = 409


class SessionBusy(Conflict):
    code = "SESSION_BUSY"


class SessionNotResumable(Conflict):
    code = "SESSION_NOT_RESUMABLE"


class RunAlreadyEnded(Conflict):
    code = "RUN_ALREADY_ENDED"


class RunEnding(Conflict):
    code = "RUN_ENDING"


class RunNotStarted(Conflict):
    code = "RUN_NOT_STARTED"


class ApprovalResolved(Conflict):
    """Another answer, or the time limit, came first. `approval` is its present state, as the API shows it."""

    code = "APPROVAL_ALREADY_RESOLVED"

    def __init__(self, message: str, approval: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.approval = approval

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "approval": self.approval}


class TooLarge(CCMError):
    status = 413
    code = "BODY_TOO_LARGE"


class UnsupportedMediaType(CCMError):
    status = 415
    code = "UNSUPPORTED_MEDIA_TYPE"


class KeyReused(CCMError):
    status = 422
    code = "IDEMPOTENCY_KEY_REUSED"


class QueueFull(CCMError):
    status = 429
    code = "QUEUE_FULL"
    retry_after = 5


class Unavailable(CCMError):
    status = 503
    retry_after = 5


class ShuttingDown(Unavailable):
    code = "SHUTTING_DOWN"

    def __init__(self) -> None:
        super().__init__("The service is shutting down; try again when it is back.")


class StorageUnavailable(Unavailable):
    code = "STORAGE_UNAVAILABLE"


class NotTakenIn(Unavailable):
    code = "NOT_TAKEN_IN"


class OutcomeUnknown(Unavailable):
    code = "OUTCOME_UNKNOWN"


class StillEnding(Unavailable):
    code = "STILL_ENDING"


class SlotsTaken(Unavailable):
    code = "SLOTS_TAKEN"


class OutOfDescriptors(Unavailable):
    code = "OUT_OF_DESCRIPTORS"


class StartRefused(Exception):
    """The service does not start; the message is one sentence for the operator."""

    exit_code = 1


class BadSetting(StartRefused):
    exit_code = 2


class DatabaseRefused(StartRefused):
    exit_code = 3


class CommandRefused(Exception):
    """A command cannot be done; the message is one sentence for the operator."""

    exit_code = 1


class StorageError(Exception):
    """What the database's driver raised.

    `str()` is its own reason, for the log; `summary` says the same to anybody: it names no path, no host and no SQL.
    `may_be_committed`: it was in COMMIT, and its outcome is unknown.
    """

    summary = "the database refuses it"
    may_be_committed = False

    def __init__(self, reason: str, summary: str | None = None) -> None:
        super().__init__(reason)
        if summary is not None:
            self.summary = summary


class StorageDown(StorageError):
    """Storage takes nothing at the moment: locked, full, read-only, unreachable. Another try may succeed."""

    summary = "the database is out of order"


class DatabaseTaken(StorageDown):
    """Another service has the right to write."""

    summary = "another CC Manager, or what is left of a lost connection, has the right to write to the database"


class DatabaseDamaged(StorageDown):
    """What is stored cannot be relied on."""

    summary = "the database is damaged"


class DatabaseClosed(StorageDown):
    """The database is closed, or being closed, and takes no more transactions."""

    summary = "the service is shutting down"


class StorageRejected(StorageError):
    """Storage is well and refuses this very statement; another try would be refused too."""
