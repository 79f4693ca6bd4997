"""Every error that a client or an operator can be told, in one tree.

CCMError                        an answer to a client: code, HTTP status, the field at fault
├── ValidationError             400 VALIDATION_ERROR
├── Unauthorized                401 UNAUTHORIZED
├── Forbidden                   403 OPTION_FORBIDDEN, CWD_FORBIDDEN, TIMEOUT_FORBIDDEN, APPROVALS_FORBIDDEN,
│                                   WEBHOOK_FORBIDDEN, HOST_FORBIDDEN, ORIGIN_FORBIDDEN
├── NotFound                    404 RUN_NOT_FOUND, SESSION_NOT_FOUND, APPROVAL_NOT_FOUND
├── Conflict                    409 SESSION_BUSY, SESSION_NOT_RESUMABLE, RUN_ALREADY_ENDED, RUN_ENDING, RUN_NOT_STARTED
│   └── ApprovalResolved        409 APPROVAL_ALREADY_RESOLVED, with the approval as it is
├── TooLarge                    413 BODY_TOO_LARGE
├── UnsupportedMediaType        415 UNSUPPORTED_MEDIA_TYPE
├── KeyReused                   422 IDEMPOTENCY_KEY_REUSED
├── QueueFull                   429 QUEUE_FULL
└── Unavailable                 503 SHUTTING_DOWN, STORAGE_UNAVAILABLE, OUTCOME_UNKNOWN, STILL_ENDING, SLOTS_TAKEN,
                                OUT_OF_DESCRIPTORS

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
from typing import Any


class CCMError(Exception):
    """An answer to a client. `message` says what is wrong and what to do about it."""

    status = 500
    code = "INTERNAL_ERROR"
    retry_after: int | None = None

    def __init__(self, message: str, *, code: str | None = None, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        if code is not None:
            self.code = code

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
    code = "FORBIDDEN"


class NotFound(CCMError):
    status = 404
    code = "NOT_FOUND"


class Conflict(CCMError):
    status = 409
    code = "CONFLICT"


class ApprovalResolved(Conflict):
    """Somebody else was first, or nobody was in time. `approval` is what became of it, as the API shows it."""

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
    code = "UNAVAILABLE"
    retry_after = 5


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
