"""The table ccr_sessions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ccm.db import runs
from ccm.db.driver.transaction import Transaction
from ccm.db.select import Select, existing
from ccm.errors import SessionNotFound
from ccm.models import Session

# The stored counts lack the messages of runs that have not ended, of which there are few.
_COMPUTED = {
    "status": """CASE WHEN EXISTS (SELECT 1 FROM ccr_runs r WHERE r."sessionId" = s.id AND r.status = 'running')
        THEN 'running' ELSE 'idle' END""",
    "messageCount": """CAST(s."messageCount" + COALESCE((
        SELECT SUM((SELECT COALESCE(MAX(m."index") + 1, 0) FROM ccr_run_messages m WHERE m."runId" = r.id))
        FROM ccr_runs r WHERE r."sessionId" = s.id AND r.status = 'running'), 0) AS BIGINT)""",
}
_FILTERS = {
    "cwd": "s.cwd = :cwd",
    "parentSessionId": 's."parentSessionId" = :parentSessionId',
    # A full-text search reads the texts: the only query here without an index. STRPOS, because LIKE takes time in the
    # product of both lengths for a text that nearly matches everywhere.
    "q": """(STRPOS(LOWER(s.title), :q) > 0 OR EXISTS (
        SELECT 1 FROM ccr_runs r WHERE r."sessionId" = s.id AND STRPOS(LOWER(r.prompt), :q) > 0))""",
}
SELECT = Select(Session, "ccr_sessions s", _COMPUTED, filters=_FILTERS, order="lastRunSeq")


def find(transaction: Transaction, session_id: str) -> Session | None:
    """Return a session by its own id, or None."""
    return SELECT.find(transaction, "WHERE s.id = :id", id=session_id)


def get(transaction: Transaction, session_id: str) -> Session:
    """Return a session by its own id, or by the SDK session id of any of its runs.

    Raises:
        SessionNotFound: there is no such session.
    """
    session = find(transaction, session_id)
    if session is None:
        run = runs.find_by_sdk_session(transaction, session_id)
        session = None if run is None else find(transaction, run.session_id)
    return existing(session, "session", session_id, SessionNotFound)


def page(transaction: Transaction, filters: Mapping[str, str], *, limit: int, after: int | None) -> list[Session]:
    """Return sessions after the one whose last run has seq `after`, latest activity first."""
    if "q" in filters:
        filters = {**filters, "q": filters["q"].lower()}
    return SELECT.page(transaction, filters, limit, after, newest_first=True)


def insert(transaction: Transaction, row: Mapping[str, Any]) -> None:
    """Insert a session. It counts one run unless `row` has another `runCount`."""
    transaction.insert("ccr_sessions", {"headRunId": None, "runCount": 1, "messageCount": 0, "costUsd": 0.0, **row})


def run_added(transaction: Transaction, session_id: str, seq: int, at: str) -> None:
    """Count another run."""
    transaction.execute(
        'UPDATE ccr_sessions SET "runCount" = "runCount" + 1, "lastRunAt" = :at, "lastRunSeq" = :seq WHERE id = :id',
        id=session_id,
        seq=seq,
        at=at,
    )


def run_ended(transaction: Transaction, session_id: str, messages: int, cost_usd: float, head: str | None) -> None:
    """Add the totals of an ended run. `head` is its id if it can be continued."""
    transaction.execute(
        'UPDATE ccr_sessions SET "messageCount" = "messageCount" + :messages, "costUsd" = "costUsd" + :cost, '
        '"headRunId" = COALESCE(:head, "headRunId") WHERE id = :id',
        id=session_id,
        messages=messages,
        cost=cost_usd,
        head=head,
    )


def update(transaction: Transaction, session_id: str, values: Mapping[str, Any]) -> bool:
    """Set `title`, `metadataJson` or both. Return False if there is no such session."""
    return bool(transaction.update("ccr_sessions", values, "id = :id", id=session_id))
