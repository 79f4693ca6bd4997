"""The table ccr_run_metadata: the metadata of each run's session, for the filter `metadata.KEY=VALUE`."""

from __future__ import annotations

import hashlib

from ccm.db.driver.transaction import Transaction
from ccm.json_text import from_json_text, to_json_text

# The most values of a session that filters know, because each is a row for each run.
INDEXED_VALUES = 50
# A bound of the memory of `fill`.
SESSIONS_AT_ONCE = 100
# The statements for one entry and the runs of a session.
INSERT = """
INSERT INTO ccr_run_metadata (entry, seq) SELECT :entry, seq FROM ccr_runs WHERE "sessionId" = :id
"""
DELETE = """
DELETE FROM ccr_run_metadata WHERE entry = :entry AND seq IN (SELECT seq FROM ccr_runs WHERE "sessionId" = :id)
"""
OF_LAST_RUN = """
SELECT entry FROM ccr_run_metadata WHERE seq = (SELECT MAX(seq) FROM ccr_runs WHERE "sessionId" = :id)
"""


def entry(key: str, value: str) -> str:
    """Return the digest of a key and a value, because an index of PostgreSQL takes no long values."""
    return hashlib.blake2b(to_json_text([key, value]).encode("ascii"), digest_size=16).hexdigest()


def add(transaction: Transaction, session_id: str, seq: int) -> None:
    """Add the present metadata of a session to one of its runs."""
    entries = _present(transaction, session_id)
    transaction.insert_many("ccr_run_metadata", ("entry", "seq"), [(entry, seq) for entry in entries])


def replace(transaction: Transaction, session_id: str) -> None:
    """Write what has changed in the metadata of a session for its runs. All of them have the same."""
    present, before = _present(transaction, session_id), transaction.column(OF_LAST_RUN, id=session_id)
    for statement, entries in ((DELETE, set(before) - set(present)), (INSERT, set(present) - set(before))):
        for changed in entries:
            transaction.execute(statement, entry=changed, id=session_id)


def fill(transaction: Transaction) -> None:
    """Add the metadata of all runs to the empty table."""
    after = ""
    sql = "SELECT id FROM ccr_sessions WHERE id > :after AND \"metadataJson\" <> '{}' ORDER BY id LIMIT :limit"
    while session_ids := transaction.column(sql, after=after, limit=SESSIONS_AT_ONCE):
        for session_id in session_ids:
            replace(transaction, session_id)
        after = session_ids[-1]


def _present(transaction: Transaction, session_id: str) -> list[str]:
    """Return the digests of the first values of a session that a URL can hold: texts as they are, others as JSON."""
    text = transaction.value('SELECT "metadataJson" FROM ccr_sessions WHERE id = :id', id=session_id)
    metadata = {} if text in (None, "{}") else from_json_text(text)
    values = [(key, value) for key, value in metadata.items() if not isinstance(value, dict | list)]
    return [
        entry(key, value if isinstance(value, str) else to_json_text(value)) for key, value in values[:INDEXED_VALUES]
    ]
