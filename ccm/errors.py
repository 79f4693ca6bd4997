"""The exceptions that reach a client or an operator. Each error code of the API has its own class.

CCMError                        an answer to a client: message, code, HTTP status, the field at fault
├── ValidationError, Unauthorized, TooLarge, UnsupportedMediaType, KeyReused, QueueFull
├── BadRequest, HeadersTooLarge, InternalError, UnknownCoding, NotStarted
├── Forbidden                   403: OptionForbidden, CwdForbidden, TimeoutForbidden, ApprovalsForbidden,
│                                    WebhookForbidden, HostForbidden, OriginForbidden
├── NotFound                    404: RunNotFound, SessionNotFound, ApprovalNotFound
├── Conflict                    409: SessionBusy, SessionNotResumable, RunAlreadyEnded, RunEnding, RunNotStarted,
│                                    ApprovalResolved
└── Unavailable                 503, may be retried: ShuttingDown, StorageUnavailable, NotTakenIn, OutcomeUnknown,
                                     StillEnding, SlotsTaken, OutOfDescriptors, OutOfDisk, Unhealthy

StartRefused                    the service does not start; the message is one sentence for the operator
├── BadSetting                  exit code 2
├── DatabaseRefused             exit code 3
└── ListenFailed                exit code 4

CommandRefused                  a command fails; the message is one sentence for the operator, exit code 1

StorageError                    a fault of the database, translated from its driver in one place
├── StorageDown                 temporary: locked, full, unreachable; may be retried
│   ├── DatabaseTaken           another service has the right to write
│   ├── DatabaseDamaged         the stored data cannot be trusted
│   └── DatabaseClosed          the service is shutting down
└── StorageRejected             permanent: the database refuses this statement
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class CCMError(Exception):
    """An error answer to a client. `message` says what is wrong and what to do. Only classes with a code are raised.

    Attributes:
        field: the field of the request at fault, if any.
        retry_after: when the client may retry (seconds); None if a retry is pointless.
    """

    status: ClassVar[int]
    code: ClassVar[str]
    retry_after: ClassVar[int | None] = None

    def __init_subclass__(cls, *, status: int | None = None, code: str | None = None) -> None:
        if status is not None:
            cls.status = status
        if code is not None:
            cls.code = code

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field

    def to_json(self) -> dict[str, Any]:
        """Return the body of the answer."""
        error = {"code": self.code, "message": self.message}
        if self.field is not None:
            error["field"] = self.field
        return {"error": error}


class ValidationError(CCMError, status=400, code="VALIDATION_ERROR"):
    """A header, a parameter or the body of a request is invalid."""


class BadRequest(CCMError, status=400, code="BAD_REQUEST"):
    """The request is no valid HTTP."""


class Unauthorized(CCMError, status=401, code="UNAUTHORIZED"):
    """The request has no accepted token."""


class Forbidden(CCMError, status=403):
    """The operator's settings do not allow it."""


class OptionForbidden(Forbidden, code="OPTION_FORBIDDEN"):
    """An option is privileged, or above its ceiling."""


class CwdForbidden(Forbidden, code="CWD_FORBIDDEN"):
    """The directory is outside CCM_ALLOWED_ROOTS."""


class TimeoutForbidden(Forbidden, code="TIMEOUT_FORBIDDEN"):
    """`timeoutMs` is above the ceiling."""


class ApprovalsForbidden(Forbidden, code="APPROVALS_FORBIDDEN"):
    """Approvals would take the only worker."""


class WebhookForbidden(Forbidden, code="WEBHOOK_FORBIDDEN"):
    """CCM_WEBHOOK_ALLOW does not list the host of `webhookUrl`."""


class HostForbidden(Forbidden, code="HOST_FORBIDDEN"):
    """CCM_ALLOWED_HOSTS does not list the Host header."""


class OriginForbidden(Forbidden, code="ORIGIN_FORBIDDEN"):
    """A web page of another origin sends the request."""


class NotFound(CCMError, status=404):
    """No resource has this id."""


class RunNotFound(NotFound, code="RUN_NOT_FOUND"):
    """No run has this id."""


class SessionNotFound(NotFound, code="SESSION_NOT_FOUND"):
    """No session has this id."""


class ApprovalNotFound(NotFound, code="APPROVAL_NOT_FOUND"):
    """No approval has this id."""


class Conflict(CCMError, status=409):
    """The state of a run, a session or an approval does not allow it."""


class SessionBusy(Conflict, code="SESSION_BUSY"):
    """A run of the session has not ended."""


class SessionNotResumable(Conflict, code="SESSION_NOT_RESUMABLE"):
    """No run can be continued, because there is no transcript."""


class RunAlreadyEnded(Conflict, code="RUN_ALREADY_ENDED"):
    """The run has ended."""


class RunEnding(Conflict, code="RUN_ENDING"):
    """The run takes no more messages."""


class RunNotStarted(Conflict, code="RUN_NOT_STARTED"):
    """The run waits for a worker."""


class ApprovalResolved(Conflict, code="APPROVAL_ALREADY_RESOLVED"):
    """Another answer or the timeout came first. `approval` is its present state, as the API shows it."""

    def __init__(self, message: str, approval: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.approval = approval

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "approval": self.approval}


class TooLarge(CCMError, status=413, code="BODY_TOO_LARGE"):
    """The body or the message exceeds its limit."""


class UnsupportedMediaType(CCMError, status=415, code="UNSUPPORTED_MEDIA_TYPE"):
    """The body is not `application/json` in UTF-8, or it is compressed."""


class KeyReused(CCMError, status=422, code="IDEMPOTENCY_KEY_REUSED"):
    """The Idempotency-Key belongs to another request."""


class QueueFull(CCMError, status=429, code="QUEUE_FULL"):
    """CCM_MAX_QUEUED_RUNS runs wait for a worker."""

    retry_after = 5


class HeadersTooLarge(CCMError, status=431, code="HEADERS_TOO_LARGE"):
    """The request has more than 64 KiB of headers."""


class InternalError(CCMError, status=500, code="INTERNAL_ERROR"):
    """The service failed; its log says more."""


class UnknownCoding(CCMError, status=501, code="NOT_IMPLEMENTED"):
    """The request has a transfer coding other than `chunked`."""


class NotStarted(CCMError, status=503, code="NOT_STARTED"):
    """Under `flask run` only: the service cannot start; its log says why."""


class Unavailable(CCMError, status=503):
    """It may work later."""

    retry_after = 5


class ShuttingDown(Unavailable, code="SHUTTING_DOWN"):
    """The service is stopping."""

    def __init__(self) -> None:
        super().__init__("The service is shutting down; try again when it is back.")


class StorageUnavailable(Unavailable, code="STORAGE_UNAVAILABLE"):
    """The database cannot be used; nothing was stored."""


class NotTakenIn(Unavailable, code="NOT_TAKEN_IN"):
    """Claude Code did not take in the message."""


class OutcomeUnknown(Unavailable, code="OUTCOME_UNKNOWN"):
    """The database may or may not have stored the request."""


class StillEnding(Unavailable, code="STILL_ENDING"):
    """The cancelled run has not ended yet."""


class SlotsTaken(Unavailable, code="SLOTS_TAKEN"):
    """No more requests can be held open."""


class OutOfDescriptors(Unavailable, code="OUT_OF_DESCRIPTORS"):
    """A run would need more files than the service may open."""


class OutOfDisk(Unavailable, code="OUT_OF_DISK"):
    """A body over 512 KiB does not fit into the directory for temporary files; nothing was stored."""


class Unhealthy(Unavailable, code="UNHEALTHY"):
    """The service cannot do its job.

    `problems` are the faults that persist, one sentence each.
    """

    def __init__(self, message: str, problems: Sequence[str]) -> None:
        super().__init__(message)
        self.problems = list(problems)

    def to_json(self) -> dict[str, Any]:
        problems = {"problems": self.problems} if self.problems else {}
        return {"status": "unavailable", **super().to_json(), **problems}


class StartRefused(Exception):
    """The service does not start; the message is one sentence for the operator."""

    exit_code = 1


class BadSetting(StartRefused):
    exit_code = 2


class DatabaseRefused(StartRefused):
    exit_code = 3


class ListenFailed(StartRefused):
    # Not that of a bad setting, which no supervisor retries: the address may be free or assigned a moment later.
    exit_code = 4


class CommandRefused(Exception):
    """A command fails; the message is one sentence for the operator."""

    exit_code = 1


class StorageError(Exception):
    """A fault of the database.

    Attributes:
        summary: the reason for clients, without a path, a host or SQL. `str()` is the driver's reason, for the log.
        may_be_committed: the fault occurred in COMMIT, and its outcome is unknown.
    """

    summary = "the database refuses it"
    may_be_committed = False

    def __init__(self, reason: str, summary: str | None = None) -> None:
        super().__init__(reason)
        if summary is not None:
            self.summary = summary


class StorageDown(StorageError):
    """The database is locked, full, read-only or unreachable. A retry may succeed."""

    summary = "the database cannot be used"


class DatabaseTaken(StorageDown):
    """Another service has the right to write."""

    summary = "another CC Manager, or the remains of a lost connection, holds the right to write to the database"


class DatabaseDamaged(StorageDown):
    """The stored data cannot be trusted."""

    summary = "the database is damaged"


class DatabaseClosed(StorageDown):
    """The database is closed or closing, and accepts no more transactions."""

    summary = "the service is shutting down"


class StorageRejected(StorageError):
    """The database works but refuses this statement. A retry would be refused too."""
