"""Transactions on both databases: commit, rollback, and the translation of driver errors."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.errors import StorageDown, StorageRejected
from ccm.json_text import to_json_text


def session(transaction: Transaction, name: str) -> None:
    transaction.insert(
        "ccr_sessions",
        {
            "id": name,
            "cwd": "/",
            "metadataJson": "{}",
            "runCount": 0,
            "messageCount": 0,
            "costUsd": 0,
            "firstRunAt": "",
            "lastRunAt": "",
            "lastRunSeq": 0,
        },
    )


def names(database: Database) -> list[str]:
    return [row["id"] for row in database.rows("SELECT id FROM ccr_sessions ORDER BY id")]


def test_a_transaction_is_atomic(writable: Database, reader: Database) -> None:
    with writable.transaction() as transaction:
        session(transaction, "a")
        session(transaction, "b")
    with pytest.raises(RuntimeError), writable.transaction() as transaction:
        session(transaction, "c")
        raise RuntimeError

    assert names(reader) == ["a", "b"]


def test_a_savepoint_rolls_back_alone(writable: Database, reader: Database) -> None:
    with writable.transaction() as transaction:
        session(transaction, "a")
        with pytest.raises(StorageRejected), transaction.savepoint():
            session(transaction, "b")
            session(transaction, "a")
        with pytest.raises(KeyError), transaction.savepoint():
            session(transaction, "c")
            raise KeyError
        with transaction.savepoint():
            session(transaction, "d")

    assert names(reader) == ["a", "d"]


def test_camel_case_columns_and_named_parameters(writable: Database) -> None:
    with writable.transaction() as transaction:
        session(transaction, "50% :off")
        rows = transaction.rows(
            'SELECT id, "lastRunSeq" AS "lastRunSeq" FROM ccr_sessions WHERE id LIKE :q', q="50\\% :o%"
        )
        rows = rows or transaction.rows(
            "SELECT id FROM ccr_sessions WHERE id LIKE '50%' AND id = :name", name="50% :off"
        )

    assert rows[0]["id"] == "50% :off"


def test_nul_and_lone_surrogates_survive_storage(writable: Database) -> None:
    text = to_json_text({"text": "\0 \ud800 \U0001f600"})
    with writable.transaction() as transaction:
        session(transaction, "a")
        transaction.execute('UPDATE ccr_sessions SET "metadataJson" = :text', text=text)
        assert transaction.value('SELECT "metadataJson" FROM ccr_sessions') == text


def test_a_rejected_statement_returns_its_connection(writable: Database) -> None:
    for _ in range(3):  # the pool has one connection, so a leak would be noticed
        with pytest.raises(StorageRejected), writable.transaction() as transaction:
            transaction.execute("SELECT nothing FROM nowhere")
    with writable.transaction() as transaction:
        session(transaction, "a")
    assert names(writable) == ["a"]


def test_a_rejected_statement_keeps_no_lock_while_its_error_is_referenced(writable: Database) -> None:
    """The traceback keeps the cursor alive, and with it the statement and SQLite's closed connection."""
    with pytest.raises(StorageRejected) as kept, writable.transaction() as transaction:
        session(transaction, "a")
        session(transaction, "a")
    with writable.transaction() as transaction:
        session(transaction, "b")
    assert kept.value.__traceback__ is not None
    assert names(writable) == ["b"]


def test_threads_that_end_return_their_connections(reader: Database, writable: Database) -> None:
    def read() -> None:
        reader.rows("SELECT 1 AS one")

    for _ in range(50):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert reader.rows("SELECT 1 AS one") == [{"one": 1}]


def test_a_failed_commit_leaves_the_thread_usable(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/db.sqlite", writable=True, pool_size=1)
    with database.transaction() as transaction:
        transaction.execute("CREATE TABLE a (id INTEGER PRIMARY KEY)")
        transaction.execute("CREATE TABLE b (a INTEGER REFERENCES a (id) DEFERRABLE INITIALLY DEFERRED)")

    with pytest.raises(StorageRejected, match="FOREIGN KEY"), database.transaction() as transaction:
        transaction.execute("INSERT INTO b VALUES (1)")

    with database.transaction() as transaction:
        assert transaction.value("SELECT COUNT(*) FROM b") == 0
        transaction.execute("INSERT INTO a VALUES (1)")
        transaction.execute("INSERT INTO b VALUES (1)")
    database.close()


def test_an_unreachable_database_is_down() -> None:
    database = Database("postgresql://u@127.0.0.1:1/db")
    with pytest.raises(StorageDown):
        database.rows("SELECT 1")
    database.close()


def test_sqlite_is_as_durable_as_promised(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/db.sqlite")
    with database.transaction() as transaction:
        assert transaction.value("PRAGMA journal_mode") == "wal"
        assert transaction.value("PRAGMA synchronous") == 2
        assert transaction.value("PRAGMA foreign_keys") == 1
    database.close()
