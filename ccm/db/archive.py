"""What `flask export` reads and `flask import` writes: whole sessions, whatever their age."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ccm.db.driver.database import Transaction

# The sessions in the order of their first runs, so that each comes after the one that it was forked from.
FIRST_RUNS = """
SELECT r.seq, r."sessionId" FROM ccr_runs r
WHERE r.seq > :after AND NOT EXISTS (
    SELECT 1 FROM ccr_runs e WHERE e."sessionId" = r."sessionId" AND e.seq < r.seq)
ORDER BY r.seq LIMIT :limit
"""
# Whether a session has been continued after one of its runs.
GONE_ON = """
SELECT 1 FROM ccr_runs r WHERE r."sessionId" = :session AND r."hasTranscript" = 1
    AND r.seq > (SELECT p.seq FROM ccr_runs p WHERE p.id = :parent) LIMIT 1
"""
COUNT_RUN_IN = """
UPDATE ccr_sessions SET "runCount" = "runCount" + 1, "messageCount" = "messageCount" + :messages,
    "costUsd" = "costUsd" + :cost, "headRunId" = COALESCE(:head, "headRunId"), "lastRunAt" = :at, "lastRunSeq" = :seq
WHERE id = :id
"""


# ---- reading


def hold_snapshot(transaction: Transaction, dialect: str) -> None:
    """Have all reads of a transaction see the same moment. Called first; SQLite does so by itself."""
    if dialect == "postgresql":
        transaction.script("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")


def last_seq(transaction: Transaction) -> int | None:
    """The seq of the newest run, None if there is none."""
    seq: int | None = transaction.value("SELECT MAX(seq) FROM ccr_runs")
    return seq


def first_seq(transaction: Transaction) -> int | None:
    """The seq of the oldest run, None if there is none."""
    seq: int | None = transaction.value("SELECT MIN(seq) FROM ccr_runs")
    return seq


def sessions_beyond(transaction: Transaction, after: int, limit: int) -> list[tuple[int, str]]:
    """Sessions by the seq of their first run, those beyond one: that seq and the session's id."""
    return [(seq, session_id) for seq, session_id in transaction.tuples(FIRST_RUNS, after=after, limit=limit)]


def request_key(transaction: Transaction, run_id: str) -> tuple[str | None, str | None]:
    """A run's idempotency key and the digest of its request."""
    sql = 'SELECT "idempotencyKey", "requestDigest" FROM ccr_runs WHERE id = :id'
    key, digest = transaction.tuples(sql, id=run_id)[0]
    return key, digest


def dated_texts(transaction: Transaction, run_id: str, after: int, through: int) -> list[tuple[int, str, str]]:
    """Index, time and JSON text of a run's messages after one index and through another."""
    sql = (
        'SELECT "index", "createdAt", "messageJson" FROM ccr_run_messages WHERE "runId" = :run AND "index" > :after '
        'AND "index" <= :through ORDER BY "index"'
    )
    rows = transaction.tuples(sql, run=run_id, after=after, through=through)
    return [(index, created_at, text) for index, created_at, text in rows]


# ---- writing


def run_at(transaction: Transaction, seq: int) -> str | None:
    run_id: str | None = transaction.value("SELECT id FROM ccr_runs WHERE seq = :seq", seq=seq)
    return run_id


def last_seq_of_session(transaction: Transaction, session_id: str) -> int | None:
    sql = 'SELECT MAX(seq) FROM ccr_runs WHERE "sessionId" = :id'
    seq: int | None = transaction.value(sql, id=session_id)
    return seq


def has_gone_on(transaction: Transaction, session_id: str, parent_run_id: str) -> bool:
    """Whether a session has been continued after one of its runs."""
    return transaction.value(GONE_ON, session=session_id, parent=parent_run_id) is not None


def insert_session(transaction: Transaction, row: Mapping[str, Any]) -> None:
    """A session without runs yet."""
    blank = {"headRunId": None, "runCount": 0, "messageCount": 0, "costUsd": 0.0}
    transaction.insert("ccr_sessions", blank | dict(row))


def insert_run(transaction: Transaction, row: Mapping[str, Any]) -> None:
    transaction.insert("ccr_runs", row)


def complete_run(transaction: Transaction, run_id: str, values: Mapping[str, Any]) -> None:
    """Write what is known of a run only once all of it has been read."""
    assignments = ", ".join(f'"{column}" = :{column}' for column in values)
    transaction.execute(f"UPDATE ccr_runs SET {assignments} WHERE id = :id", **values, id=run_id)


def count_run_in(
    transaction: Transaction,
    session_id: str,
    *,
    seq: int,
    at: str,
    messages: int,
    cost_usd: float,
    head: str | None,
) -> None:
    """Count a run into its session, whose newest it is; `head` is its id if it can be continued."""
    transaction.execute(COUNT_RUN_IN, id=session_id, seq=seq, at=at, messages=messages, cost=cost_usd, head=head)
