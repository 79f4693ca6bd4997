"""The table ccr_run_metadata: the metadata of each run's session, for the filter `metadata.KEY=VALUE`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from ccm.db.driver.transaction import Transaction
from ccm.json_text import from_json_text, to_json_text

COLUMNS = ("entry", "seq")
# Bounds of the memory of `fill`.
SESSIONS_AT_ONCE = 100


def entry(key: str, value: str) -> str:
    """Return the digest of a key and a value, because an index of PostgreSQL takes no long values."""
    return hashlib.blake2b(to_json_text([key, value]).encode("ascii"), digest_size=16).hexdigest()


def add(transaction: Transaction, session_id: str, seq: int | None = None) -> None:
    """Add the present metadata of a session to one of its runs, or to all.

    Args:
        seq: that of the run; None for all runs.
    """
    sql = 'SELECT "metadataJson" FROM ccr_sessions WHERE id = :id'
    text = transaction.value(sql, id=session_id)
    entries = _entries(from_json_text(text)) if text not in (None, "{}") else []
    if entries:
        of_session = 'SELECT seq FROM ccr_runs WHERE "sessionId" = :id'
        seqs = transaction.column(of_session, id=session_id) if seq is None else [seq]
        transaction.insert_many("ccr_run_metadata", COLUMNS, [(entry, seq) for entry in entries for seq in seqs])


def replace(transaction: Transaction, session_id: str) -> None:
    """Write the metadata of a session's runs anew."""
    transaction.execute(
        'DELETE FROM ccr_run_metadata WHERE seq IN (SELECT seq FROM ccr_runs WHERE "sessionId" = :id)', id=session_id
    )
    add(transaction, session_id)


def fill(transaction: Transaction) -> None:
    """Add the metadata of all runs to the empty table."""
    after = ""
    sql = "SELECT id FROM ccr_sessions WHERE id > :after AND \"metadataJson\" <> '{}' ORDER BY id LIMIT :limit"
    while session_ids := transaction.column(sql, after=after, limit=SESSIONS_AT_ONCE):
        for session_id in session_ids:
            add(transaction, session_id)
        after = session_ids[-1]


def _entries(metadata: Mapping[str, Any]) -> list[str]:
    """Return the digests of the values that a URL can hold: texts as they are, others as JSON. Skip nested values."""
    return [
        entry(key, value if isinstance(value, str) else to_json_text(value))
        for key, value in metadata.items()
        if not isinstance(value, dict | list)
    ]
