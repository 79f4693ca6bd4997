"""The table ccr_sessions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ccm.db import run_metadata, runs, search
from ccm.db.driver.transaction import Transaction, parameter_list
from ccm.db.search import Kind
from ccm.db.select import Listed, Position, Select, existing
from ccm.errors import SessionNotFound
from ccm.models import ListedSession, Session, SessionSummary

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
    "createdBy": 's."createdBy" = :createdBy',
    "parentSessionId": 's."parentSessionId" = :parentSessionId',
}
SELECT = Select(Session, "ccr_sessions s", _COMPUTED, filters=_FILTERS, order="lastRunSeq", time="lastRunAt")
_SELECT_LISTED, _SELECT_SUMMARY = (
    Select(model, "ccr_sessions s", _COMPUTED, filters=_FILTERS, order="lastRunSeq", time="lastRunAt")
    for model in (ListedSession, SessionSummary)
)
_FOUND = 'SELECT s."firstRunSeq", s.id, s."lastRunSeq" FROM ccr_sessions s {joins} WHERE {conditions}'


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


def page(
    transaction: Transaction,
    filters: Mapping[str, Any],
    *,
    limit: int,
    after: Position | None,
    oldest_first: bool = False,
    summary: bool = False,
) -> list[Listed]:
    """Return sessions after a position, in the order of their latest activity or its reverse.

    Args:
        filters: values by the names of SELECT's filters. With `since` or `until` the order is that of the time.
        after: `lastRunSeq`; with `since` or `until`, `lastRunAt` and `lastRunSeq`.
        summary: return the sessions as SessionSummary, otherwise as ListedSession.
    """
    select = _SELECT_SUMMARY if summary else _SELECT_LISTED
    return select.listed(transaction, filters, limit, after, newest_first=not oldest_first)


def forks(transaction: Transaction, session_id: str, *, limit: int, after: int | None) -> list[Session]:
    """Return the forks of a session after the one whose last run has seq `after`, latest activity first."""
    return SELECT.page(transaction, {"parentSessionId": session_id}, limit, after, newest_first=True)


class Rank(NamedTuple):
    """The place of a session among those that a search finds, the greatest first."""

    kind: Kind
    last_run_seq: int


class Found(NamedTuple):
    """A session that a search finds, and its best text."""

    rank: Rank
    session_id: str
    rowid: int


def ranked(transaction: Transaction, rowids: Collection[int], filters: Mapping[str, Any]) -> list[Found]:
    """Return the sessions of some texts that meet the filters, the best first.

    Args:
        rowids: those of the best text of each session.
        filters: values by the names of SELECT's filters.
    """
    if not rowids:
        return []
    by_seq = {search.first_seq(rowid): rowid for rowid in rowids}
    joins, where, parameters, _ = SELECT.conditions(filters)
    names, seqs = parameter_list("seq", by_seq)
    sql = _FOUND.format(joins=joins, conditions=" AND ".join([f's."firstRunSeq" IN ({names})', *where]))
    rows = transaction.tuples(sql, **seqs, **parameters)
    found = [Found(Rank(Kind.of(by_seq[seq]), last), session_id, by_seq[seq]) for seq, session_id, last in rows]
    return sorted(found, reverse=True)


def listed(transaction: Transaction, ids: Collection[str], *, summary: bool) -> dict[str, ListedSession]:
    """Return sessions by their ids."""
    if not ids:
        return {}
    names, parameters = parameter_list("id", ids)
    select = _SELECT_SUMMARY if summary else _SELECT_LISTED
    rows = select.rows(transaction, f"WHERE s.id IN ({names})", **parameters)
    return {session.id: session for session in rows}


def insert(transaction: Transaction, row: Mapping[str, Any]) -> None:
    """Insert a session. Its `lastRunSeq` is the seq of its first run. It counts one run unless `row` says otherwise."""
    counts = {"runCount": 1, "messageCount": 0, "costUsd": 0.0}
    transaction.insert("ccr_sessions", {"headRunId": None, "firstRunSeq": row["lastRunSeq"], **counts, **row})
    if row.get("title"):
        search.put_title(transaction, row["lastRunSeq"], row["title"])


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
    if not transaction.update("ccr_sessions", values, "id = :id", id=session_id):
        return False
    if "title" in values:
        search.replace_title(transaction, session_id, values["title"])
    if "metadataJson" in values:
        run_metadata.replace(transaction, session_id)
    return True
