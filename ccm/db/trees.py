"""Trees of sessions (a root with all its forks): list, measure and permanently delete them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from ccm.db import search
from ccm.db.driver.database import Database
from ccm.db.driver.errors import storage_error
from ccm.db.driver.sqlite_file import sqlite_file_path
from ccm.db.driver.transaction import Transaction
from ccm.db.select import existing
from ccm.errors import SessionNotFound, StorageDown

TREE = """
WITH RECURSIVE tree (id) AS (
    SELECT CAST(:root AS TEXT) UNION ALL SELECT s.id FROM ccr_sessions s JOIN tree t ON s."parentSessionId" = t.id)
"""
RUNS = '"sessionId" IN (SELECT id FROM tree)'
TRANSCRIPTS = f'"sdkSessionId" IN (SELECT "sdkSessionId" FROM ccr_runs WHERE {RUNS})'
OLDER = """
WITH RECURSIVE tree (root, id) AS (
    SELECT id, id FROM ccr_sessions WHERE "parentSessionId" IS NULL
    UNION ALL SELECT t.root, s.id FROM ccr_sessions s JOIN tree t ON s."parentSessionId" = t.id)
SELECT t.root FROM tree t JOIN ccr_sessions s ON s.id = t.id
GROUP BY t.root HAVING MAX(s."lastRunAt") < :time ORDER BY MIN(CASE WHEN s.id = t.root THEN s."lastRunSeq" END)
"""
ROOT = """
WITH RECURSIVE line (id, parent) AS (
    SELECT s.id, s."parentSessionId" FROM ccr_sessions s WHERE s.id = :id
    UNION ALL SELECT s.id, s."parentSessionId" FROM ccr_sessions s JOIN line l ON s.id = l.parent)
SELECT id FROM line WHERE parent IS NULL
"""
MESSAGES = f"""
SELECT COUNT(*), COALESCE(SUM(m.size), 0) FROM ccr_runs r JOIN ccr_run_messages m ON m."runId" = r.id
WHERE r.{RUNS}
"""
PLACES = f"""
{TREE}
SELECT seq, id, cwd, "sdkSessionId", "optionsJson" FROM ccr_runs WHERE {RUNS} AND seq > :after ORDER BY seq LIMIT :limit
"""
# Deletes the texts in a range of digests that no transcript uses any more.
UNUSED_TEXTS = """
DELETE FROM ccr_transcript_texts WHERE digest > :after AND digest <= :through AND digest NOT IN (
    SELECT digest FROM ccr_transcript_entries WHERE digest > :after AND digest <= :through)
"""
EMPTIED = (
    f'UPDATE ccr_runs SET "messageCount" = 0, "hasTranscript" = 0, "transcriptStored" = 0 WHERE {RUNS}',
    'UPDATE ccr_sessions SET "messageCount" = 0, "headRunId" = NULL WHERE id IN (SELECT id FROM tree)',
)
# Bounds of one transaction.
ROWS = 5_000
TEXTS = 50_000
RUNS_AT_ONCE = 500
# Less than the seq of any run; those of imported runs may be negative.
BEFORE_ALL = -(2**62)
# How long to wait for other programs that use the database (seconds).
CLEAR_TIMEOUT = 10.0
POSTGRESQL_TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = current_schema() AND tablename ~ '^ccr_'"


class Tree(NamedTuple):
    """A root session with all its forks. `message_bytes` counts the texts of the messages."""

    root: str
    sessions: list[str]
    runs: int
    messages: int
    message_bytes: int
    transcripts: int
    last_run_at: str
    not_ended: int


class RunPlace(NamedTuple):
    """The columns of a run that locate its files."""

    seq: int
    id: str
    cwd: str
    sdk_session_id: str
    options_json: str


def older_than(transaction: Transaction, time: str) -> list[str]:
    """Return the roots of the trees whose latest activity is before a time."""
    return transaction.column(OLDER, time=time)


def get_root(transaction: Transaction, session_id: str) -> str:
    """Return the id of the root of a session's tree.

    Raises:
        SessionNotFound: there is no such session.
    """
    root: str = existing(transaction.value(ROOT, id=session_id), "session", session_id, SessionNotFound)
    return root


def measure(transaction: Transaction, root: str) -> Tree:
    """Return the contents of a tree in numbers.

    Raises:
        SessionNotFound: there is no such root.
    """
    session_ids = transaction.column(TREE + "SELECT id FROM tree", root=root)
    latest = f'{TREE} SELECT MAX("lastRunAt") FROM ccr_sessions WHERE id IN (SELECT id FROM tree)'
    at = existing(transaction.value(latest, root=root), "session", root, SessionNotFound)
    run_sql = f"{TREE} SELECT COUNT(*), COALESCE(SUM(CASE status WHEN 'running' THEN 1 ELSE 0 END), 0) FROM ccr_runs"
    runs, not_ended = transaction.tuples(f"{run_sql} WHERE {RUNS}", root=root)[0]
    messages, size = transaction.tuples(TREE + MESSAGES, root=root)[0]
    transcripts = transaction.value(f"{TREE} SELECT COUNT(*) FROM ccr_transcripts WHERE {TRANSCRIPTS}", root=root)
    return Tree(root, session_ids, int(runs), int(messages), int(size), int(transcripts), at, int(not_ended))


def run_places(database: Database, root: str) -> Iterator[RunPlace]:
    """Yield the runs of a tree, without a transaction that stays open."""
    after: int | None = BEFORE_ALL
    while after is not None:
        with database.transaction() as transaction:
            rows = transaction.tuples(PLACES, root=root, after=after, limit=RUNS_AT_ONCE)
        yield from map(RunPlace._make, rows)
        after = rows[-1][0] if rows else None


def delete(database: Database, root: str) -> None:
    """Delete a tree in transactions of bounded size. Calling it again completes an interrupted deletion.

    The runs and sessions are deleted last and together: as long as anything is left, the tree can still be named. Their
    counts are set to zero first. A service that starts in between then neither waits for deleted messages nor continues
    an incomplete transcript.

    Args:
        database: a writable one.

    Raises:
        StorageError: the deletion is incomplete, and can be repeated.
    """
    with database.transaction() as transaction:
        for statement in EMPTIED:
            transaction.execute(TREE + statement, root=root)
    for session in database.rows(TREE + "SELECT id FROM tree", root=root):
        _delete_search_texts(database, session["id"])
    for run in run_places(database, root):
        for transcript in database.rows(
            'SELECT id FROM ccr_transcripts WHERE "sdkSessionId" = :id', id=run.sdk_session_id
        ):
            _delete_by_index(database, "ccr_transcript_entries", "transcriptId", transcript["id"])
        _delete_by_index(database, "ccr_run_messages", "runId", run.id)
    with _erasing(database) as transaction:
        transaction.execute(f"{TREE} DELETE FROM ccr_transcripts WHERE {TRANSCRIPTS}", root=root)
        for table in ("ccr_approvals", "ccr_deliveries", "ccr_events", "ccr_run_images"):
            of_runs = f'DELETE FROM {table} WHERE "runId" IN (SELECT id FROM ccr_runs WHERE {RUNS})'
            transaction.execute(TREE + of_runs, root=root)
        transaction.execute(f"{TREE} DELETE FROM ccr_runs WHERE {RUNS}", root=root)
        transaction.execute(f"{TREE} DELETE FROM ccr_sessions WHERE id IN (SELECT id FROM tree)", root=root)


def _delete_search_texts(database: Database, session_id: str) -> None:
    more = True
    while more:
        with _erasing(database) as transaction:
            more = search.delete_of_session(transaction, session_id, ROWS)


def _delete_by_index(database: Database, table: str, owner: str, owner_id: object) -> None:
    """Delete the rows of a run or a transcript in a table, from the highest index down."""
    while True:
        with _erasing(database) as transaction:
            where = f'FROM {table} WHERE "{owner}" = :id'
            last = transaction.value(f'SELECT MAX("index") {where}', id=owner_id)
            if last is not None:
                transaction.execute(f'DELETE {where} AND "index" > :kept', id=owner_id, kept=last - ROWS)
        if last is None or last < ROWS:
            return


def delete_unused_texts(database: Database) -> None:
    """Delete the texts that no transcript uses any more, including those that an interrupted deletion has left."""
    after = ""
    while True:
        with _erasing(database) as transaction:
            page = "SELECT digest FROM ccr_transcript_texts WHERE digest > :after ORDER BY digest LIMIT :limit"
            digests = transaction.column(page, after=after, limit=TEXTS)
            if not digests:
                return
            transaction.execute(UNUSED_TEXTS, after=after, through=digests[-1])
            after = digests[-1]


@contextmanager
def _erasing(database: Database) -> Iterator[Transaction]:
    """Begin a transaction that overwrites deleted data."""
    with database.transaction() as transaction:
        if database.is_sqlite:
            transaction.script("PRAGMA secure_delete = ON")
            # A statement on the search index needs a small temporary file, and TMPDIR may be full.
            transaction.script("PRAGMA temp_store = MEMORY")
        yield transaction


def clear(url: str, deleted: bool) -> None:
    """Remove the bytes of deleted rows from the database's files, SQLite's write-ahead log and its index included.

    Args:
        deleted: whether anything was deleted. If not, SQLite's file is rewritten only if an earlier deletion has left
            something in it.

    Raises:
        StorageError: the bytes are still there.
    """
    try:
        path = sqlite_file_path(url)
        if path is not None:
            _clear_sqlite(path, deleted)
        else:
            import psycopg  # noqa: PLC0415  # imported for PostgreSQL only

            with psycopg.connect(url, autocommit=True) as connection:
                for (table,) in connection.execute(POSTGRESQL_TABLES).fetchall():
                    connection.execute(f"VACUUM {table}")
                connection.execute(f"REINDEX INDEX {search.WORD_INDEX}")  # it would keep deleted words
    except Exception as error:
        raise storage_error(error) or error from None


def _clear_sqlite(path: Path, deleted: bool) -> None:
    with closing(sqlite3.connect(path, timeout=CLEAR_TIMEOUT, isolation_level=None)) as connection:
        connection.execute("PRAGMA secure_delete = ON")
        # VACUUM writes a temporary file first. Put it beside the database, where there is room, and not in memory or in
        # TMPDIR, which may be small. A SQLite without this deprecated pragma ignores it.
        folder = str(path.absolute().parent).replace("'", "''")
        connection.execute(f"PRAGMA temp_store_directory = '{folder}'")
        connection.execute(search.MERGE)  # always, because an earlier prune may have been killed before it
        # Pages that were split long ago still contain copies of rows in their unused parts; only a new file does not.
        if deleted or connection.execute("PRAGMA freelist_count").fetchone()[0]:
            connection.execute("VACUUM")
        if connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            raise StorageDown("another program is reading the database")
