"""Reads of `flask export` and writes of `flask import`: whole sessions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ccm.db import search
from ccm.db.driver.transaction import Transaction

# Sessions in the order of their first runs, so that each comes after its parent session.
FIRST_RUNS = """
SELECT r.seq, r."sessionId" FROM ccr_runs r
WHERE r.seq > :after AND NOT EXISTS (
    SELECT 1 FROM ccr_runs e WHERE e."sessionId" = r."sessionId" AND e.seq < r.seq)
ORDER BY r.seq LIMIT :limit
"""
SAME_OR_LATER = """
SELECT 1 FROM ccr_runs WHERE seq = :seq
UNION ALL SELECT 1 FROM ccr_runs WHERE "sessionId" = :session AND seq > :seq
UNION ALL SELECT 1 FROM ccr_runs WHERE id = :parent AND seq > :seq LIMIT 1
"""
# Finds a run that continues a session after one of its runs.
CONTINUED = """
SELECT 1 FROM ccr_runs r WHERE r."sessionId" = :session AND r."hasTranscript" = 1
    AND r.seq > (SELECT p.seq FROM ccr_runs p WHERE p.id = :parent) LIMIT 1
"""


# ---- reading


def find_first_seq(transaction: Transaction) -> int | None:
    """Return the seq of the oldest run."""
    seq: int | None = transaction.value("SELECT MIN(seq) FROM ccr_runs")
    return seq


def sessions_beyond(transaction: Transaction, after: int, limit: int) -> list[tuple[int, str]]:
    """Return sessions whose first run has a seq after one, in order: that seq and the session's id."""
    return transaction.tuples(FIRST_RUNS, after=after, limit=limit)


def dated_texts(transaction: Transaction, run_id: str, after: int, through: int) -> list[tuple[int, str, str]]:
    """Return index, time and JSON text of a run's messages after one index and through another."""
    sql = (
        'SELECT "index", "createdAt", "messageJson" FROM ccr_run_messages WHERE "runId" = :run AND "index" > :after '
        'AND "index" <= :through ORDER BY "index"'
    )
    return transaction.tuples(sql, run=run_id, after=after, through=through)


# ---- writing


def has_idempotency_key(transaction: Transaction, key: str) -> bool:
    """Return whether any run has this key."""
    return transaction.value('SELECT 1 FROM ccr_runs WHERE "idempotencyKey" = :key', key=key) is not None


def is_seq_usable(transaction: Transaction, seq: int, session_id: str, parent_run_id: str | None) -> bool:
    """Return whether no run has a seq, it is after those of a session's runs and of a parent run, and not too high."""
    if abs(seq) > search.HIGHEST_SEQ:
        return False
    later = transaction.value(SAME_OR_LATER, seq=seq, session=session_id, parent=parent_run_id)
    return later is None


def was_continued(transaction: Transaction, session_id: str, parent_run_id: str) -> bool:
    """Return whether a session has been continued after one of its runs."""
    return transaction.value(CONTINUED, session=session_id, parent=parent_run_id) is not None


def complete_run(transaction: Transaction, run_id: str, values: Mapping[str, Any]) -> None:
    """Write the columns that are known only after the whole run has been read."""
    transaction.update("ccr_runs", values, "id = :id", id=run_id)
