"""The tables ccr_runs and ccr_run_images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ccm.db import run_metadata, search
from ccm.db.driver.transaction import Transaction
from ccm.db.select import Position, Select, existing
from ccm.errors import KeyReused, RunNotFound
from ccm.models import IdempotencyKey, Run, RunStatus, RunSummary
from ccm.models.stored import StoredModel
from ccm.timestamps import timestamp

# While a run has not ended, its messages are counted in their own table: updating a counter with each batch would
# rewrite the whole row.
_MESSAGE_COUNT = """CASE WHEN r.status = 'running'
    THEN (SELECT COALESCE(MAX(m."index") + 1, 0) FROM ccr_run_messages m WHERE m."runId" = r.id)
    ELSE r."messageCount" END"""
_QUEUE_POSITION = """CASE WHEN r.status = 'running' AND r."startedAt" IS NULL
    THEN (SELECT COUNT(*) FROM ccr_runs w WHERE w.status = 'running' AND w."startedAt" IS NULL AND w.seq <= r.seq)
    END"""
_PENDING_APPROVALS = """CASE WHEN r.status = 'running' AND r.approvals = 1
    THEN (SELECT COUNT(*) FROM ccr_approvals a WHERE a."runId" = r.id AND a.status = 'pending')
    ELSE 0 END"""
_COMPUTED = {"messageCount": _MESSAGE_COUNT, "queuePosition": _QUEUE_POSITION, "pendingApprovals": _PENDING_APPROVALS}
_FILTERS = {
    "status": "r.status = :status",
    "sessionId": 'r."sessionId" = :sessionId',
    "cwd": "r.cwd = :cwd",
    "mode": "r.mode = :mode",
    "createdBy": 'r."createdBy" = :createdBy',
    "errorCode": 'r."errorCode" = :errorCode',
    "waiting": "r.status = 'running' AND r.\"startedAt\" IS NULL",
    "working": "r.status = 'running' AND r.\"startedAt\" IS NOT NULL",
}
_COARSE = ("status", "mode")
SELECT = Select(Run, "ccr_runs r", _COMPUTED, filters=_FILTERS, time="createdAt", coarse=_COARSE)
_SELECT_SUMMARY: Select[Run] = Select(
    RunSummary, "ccr_runs r", _COMPUTED, filters=_FILTERS, time="createdAt", coarse=_COARSE
)
# How many runs have started, and the first waiting run whose session has no started run: a session has only one at a
# time.
STARTED_AND_NEXT = """
SELECT (SELECT COUNT(*) FROM ccr_runs WHERE status = 'running' AND "startedAt" IS NOT NULL AND owner = :owner), (
    SELECT w.id FROM ccr_runs w
    WHERE w.status = 'running' AND w."startedAt" IS NULL AND NOT EXISTS (
        SELECT 1 FROM ccr_runs b
        WHERE b."sessionId" = w."sessionId" AND b.status = 'running' AND b."startedAt" IS NOT NULL)
    ORDER BY w.seq LIMIT 1)
"""
# The final state of a run whose service was killed.
INTERRUPTED = {
    "status": RunStatus.ERROR,
    "errorCode": "INTERRUPTED",
    "errorMessage": "The service ended while this run was in progress. It was not run again; resume or fork its "
    "session to continue.",
}


def find(transaction: Transaction, run_id: str) -> Run | None:
    """Return a run, or None."""
    return SELECT.find(transaction, "WHERE r.id = :id", id=run_id)


def get(transaction: Transaction, run_id: str) -> Run:
    """Return a run.

    Raises:
        RunNotFound: there is no such run.
    """
    return existing(find(transaction, run_id), "run", run_id, RunNotFound)


def find_by_sdk_session(transaction: Transaction, sdk_session_id: str) -> Run | None:
    """Return the run with an SDK session id, or None."""
    return SELECT.find(transaction, 'WHERE r."sdkSessionId" = :id', id=sdk_session_id)


def find_by_idempotency_key(transaction: Transaction, key: IdempotencyKey) -> Run | None:
    """Return the run that an earlier request with this key created, or None.

    Raises:
        KeyReused: the key belongs to a different request.
    """
    run = SELECT.find(transaction, 'WHERE r."idempotencyKey" = :key', key=key.text)
    if run is not None and run.request_digest != key.digest:
        raise KeyReused(
            f"This Idempotency-Key was used for another request, which created run {run.id}. Use a new key for a new "
            "request; a retry must have the same path and body."
        )
    return run


def page(
    transaction: Transaction,
    filters: Mapping[str, Any],
    *,
    limit: int,
    after: Position | None,
    oldest_first: bool = False,
    summary: bool = False,
) -> list[Run]:
    """Return runs after a position, in the order of their acceptance or its reverse.

    Args:
        filters: values by the names of SELECT's filters. With `since` or `until` the order is that of the time.
        after: `seq`; with `since` or `until`, `createdAt` and `seq`.
        summary: return the runs as RunSummary.
    """
    select = _SELECT_SUMMARY if summary else SELECT
    return select.page(transaction, filters, limit, after, newest_first=not oldest_first)


class Link(StoredModel):
    """The part of a run that its session's history and its messages need, without the texts that may be long."""

    id: str
    status: str
    parent_run_id: str | None
    fork_at_index: int | None
    message_count: int
    ended_at: str | None

    @property
    def ended(self) -> bool:
        return self.status != RunStatus.RUNNING


_SELECT_LINK = Select(Link, "ccr_runs r", {"messageCount": _MESSAGE_COUNT})


def links(transaction: Transaction, session_id: str) -> list[Link]:
    """Return the links of a session's runs, in order."""
    return _SELECT_LINK.rows(transaction, 'WHERE r."sessionId" = :id ORDER BY r.seq', id=session_id)


def get_link(transaction: Transaction, run_id: str) -> Link:
    """Return the link of a run.

    Raises:
        RunNotFound: there is no such run.
    """
    return existing(_SELECT_LINK.find(transaction, "WHERE r.id = :id", id=run_id), "run", run_id, RunNotFound)


def next_seq(transaction: Transaction) -> int:
    """Return the seq of the next run. Only the writer may call this."""
    return int(transaction.value("SELECT COALESCE(MAX(seq), 0) + 1 FROM ccr_runs"))


def insert(transaction: Transaction, row: Mapping[str, Any], images_json: str | None) -> None:
    """Insert a waiting run of a stored session. `row` has the columns that are known when it is accepted."""
    transaction.insert("ccr_runs", {"messageCount": 0, "hasTranscript": 0, **row})
    run_metadata.add(transaction, row["sessionId"], row["seq"])
    search.add_prompt(transaction, row["id"], row["seq"], row["prompt"])
    if images_json is not None:
        transaction.insert("ccr_run_images", {"runId": row["id"], "imagesJson": images_json})


def find_prompt(transaction: Transaction, run_id: str, characters: int) -> str | None:
    """Return the first characters of a run's prompt, or None."""
    sql = "SELECT SUBSTR(prompt, 1, :characters) FROM ccr_runs WHERE id = :id"
    prompt: str | None = transaction.value(sql, id=run_id, characters=characters)
    return prompt


def find_images_json(transaction: Transaction, run_id: str) -> str | None:
    """Return the images of a run that has not ended, as JSON text; None if it has none."""
    text: str | None = transaction.value('SELECT "imagesJson" FROM ccr_run_images WHERE "runId" = :id', id=run_id)
    return text


def not_ended(transaction: Transaction, session_id: str) -> list[Run]:
    """Return the runs of a session that have not ended, in order: the started one and the waiting ones."""
    clauses = "WHERE r.\"sessionId\" = :id AND r.status = 'running' ORDER BY r.seq"
    return SELECT.rows(transaction, clauses, id=session_id)


def find_first_not_ended(transaction: Transaction, session_id: str) -> str | None:
    """Return the id of the first run of a session that has not ended."""
    sql = "SELECT id FROM ccr_runs WHERE \"sessionId\" = :id AND status = 'running' ORDER BY seq LIMIT 1"
    run_id: str | None = transaction.value(sql, id=session_id)
    return run_id


def count_started_and_find_next(transaction: Transaction, owner: str) -> tuple[int, str | None]:
    """Return how many runs this owner has started that have not ended, and the id of the next run that may start."""
    started, next_id = transaction.tuples(STARTED_AND_NEXT, owner=owner)[0]
    return started, next_id


def count_waiting(transaction: Transaction) -> int:
    """Return how many runs wait for a worker."""
    sql = "SELECT COUNT(*) FROM ccr_runs WHERE status = 'running' AND \"startedAt\" IS NULL"
    return int(transaction.value(sql))


def start(transaction: Transaction, run: Run, parent_run_id: str | None, owner: str) -> Run:
    """Take a run from the queue, and return its new state."""
    started = run.model_copy(update={"started_at": timestamp(), "parent_run_id": parent_run_id, "queue_position": None})
    values = {"startedAt": started.started_at, "parentRunId": parent_run_id, "owner": owner}
    transaction.update("ccr_runs", values, "id = :id", id=run.id)
    return started


def end(transaction: Transaction, run: Run, values: Mapping[str, Any]) -> bool:
    """End a run: a compare-and-set, and the regular way into a final state.

    Returns: False if the run had ended already.
    """
    final = {**values, "endedAt": timestamp()}
    changed = transaction.update("ccr_runs", final, "id = :id AND status = 'running'", id=run.id)
    if changed and run.image_count:
        transaction.execute('DELETE FROM ccr_run_images WHERE "runId" = :id', id=run.id)
    return bool(changed)


def end_row_only(transaction: Transaction, run_id: str, code: str, message: str) -> None:
    """End a run in error. Only its row is written, and not read, so that unreadable data cannot prevent it."""
    transaction.execute(
        'UPDATE ccr_runs SET status = \'error\', "errorCode" = :code, "errorMessage" = :message, '
        '"messageCount" = (SELECT COALESCE(MAX(m."index") + 1, 0) FROM ccr_run_messages m WHERE m."runId" = :id), '
        "\"endedAt\" = :now WHERE id = :id AND status = 'running'",
        code=code,
        message=message,
        now=timestamp(),
        id=run_id,
    )


def started(transaction: Transaction, owner: str) -> list[Run]:
    """Return the runs that an owner has started and that have not ended."""
    clauses = "WHERE r.status = 'running' AND r.\"startedAt\" IS NOT NULL AND r.owner = :owner ORDER BY r.seq"
    return SELECT.rows(transaction, clauses, owner=owner)


def started_elsewhere(transaction: Transaction, owner: str) -> list[str]:
    """Return the ids of runs that other owners have started and that have not ended: their services were killed."""
    return transaction.column(
        "SELECT id FROM ccr_runs WHERE status = 'running' AND \"startedAt\" IS NOT NULL "
        "AND (owner IS NULL OR owner <> :owner) ORDER BY seq",
        owner=owner,
    )
