"""The connection pool: its order of service, the time limit of statements, and closing during transactions."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from ccm.db.driver import database as database_module
from ccm.db.driver import sqlite_file
from ccm.db.driver.database import Database
from ccm.db.driver.permits import Permits
from ccm.errors import DatabaseClosed, StorageDown
from tests.waiting import until

SOON = 30.0
# This query runs for hours.
ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"
A_MILLION = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000) SELECT COUNT(*) FROM n"


def sqlite_url(folder: Path) -> str:
    url = f"sqlite:///{folder}/db.sqlite"
    sqlite_file.prepare(url)
    return url


class Thread(threading.Thread):
    """A thread that keeps the exception of its function."""

    def __init__(self, action: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._action = action
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._action()
        except Exception as error:
            self.error = error

    def ended(self) -> Exception | None:
        """Wait for the end, and return the exception that was raised, if any."""
        self.join(SOON)
        assert not self.is_alive()
        return self.error


# ---- the order of service


def test_a_new_transaction_does_not_overtake_a_waiting_one(database_url: str) -> None:
    database = Database(database_url, pool_size=1)
    served: list[str] = []

    def wait() -> None:
        with database.transaction():
            served.append("first")

    with database.transaction():
        waiting = Thread(wait)
        until(lambda: database._permits._waiting)
    with database.transaction():
        served.append("second")

    assert waiting.ended() is None
    assert served == ["first", "second"]
    database.close()


def test_a_lost_connection_returns_its_permit(postgresql: str) -> None:
    database = Database(f"{postgresql}/postgres", pool_size=2)
    try:
        for _ in range(5):
            with pytest.raises(LookupError), database.transaction() as transaction:
                pid = transaction.value("SELECT pg_backend_pid()")
                with psycopg.connect(f"{postgresql}/postgres", autocommit=True) as other:
                    other.execute("SELECT pg_terminate_backend(%s, 30000)", [pid])
                raise LookupError("as a run that is not found")
        with database.transaction() as transaction:
            assert transaction.value("SELECT 1") == 1
    finally:
        database.close()


def test_a_busy_database_refuses_no_transaction(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "CONNECTION_TIMEOUT", 2.0)
    database = Database(database_url, pool_size=1)

    def work() -> None:
        with database.transaction() as transaction:
            transaction.value("SELECT 1")
            time.sleep(0.5)  # the last one of six waits for more than two seconds

    threads = [Thread(work) for _ in range(6)]
    assert [thread.ended() for thread in threads] == [None] * 6
    database.close()


def test_waiting_threads_are_refused_if_the_database_answers_none() -> None:
    permits = Permits(1, 0.5)
    permits.take()
    first, second = Thread(permits.take), Thread(permits.take)
    until(lambda: len(permits._waiting) == 2)

    permits.release(answered=False)  # one of them gets it

    until(lambda: not (first.is_alive() or second.is_alive()))
    refusal = first.error or second.error
    assert isinstance(refusal, StorageDown)
    assert refusal.summary == "all connections to the database are in use"
    assert None in (first.error, second.error)


# ---- the time limit of statements


def test_a_read_beyond_the_time_limit_is_interrupted(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path), answer_seconds=0.5)
    with pytest.raises(StorageDown) as fault:
        database.rows(ENDLESS)

    assert fault.value.summary == "the database takes too long"
    assert type(fault.value) is StorageDown  # neither damaged nor closed
    assert database.watch is not None
    assert database.watch.damage is None
    with database.transaction() as transaction:
        for _ in range(5):
            assert transaction.value("SELECT 1") == 1
            time.sleep(0.1)  # the time limit restarts with each statement
        assert transaction.value(A_MILLION.replace("1000000", "1000")) == 1000
    database.close()


@pytest.mark.parametrize("service", [False, True])
def test_the_writer_and_commands_have_no_time_limit(tmp_path: Path, service: bool) -> None:
    database = Database(sqlite_url(tmp_path), writable=service, answer_seconds=0.001 if service else None)
    assert database.rows(A_MILLION) == [{"COUNT(*)": 1_000_000}]
    database.close()


# ---- closing


def test_closing_the_database_interrupts_reads(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path))
    begun = threading.Barrier(5)

    def read() -> None:
        with database.transaction() as transaction:
            begun.wait(SOON)
            transaction.value(ENDLESS)

    threads = [Thread(read) for _ in range(4)]
    begun.wait(SOON)
    database.close()

    for thread in threads:
        assert isinstance(thread.ended(), DatabaseClosed)
    with pytest.raises(DatabaseClosed):
        database.rows("SELECT 1")
    database.close()


def test_closing_the_database_refuses_waiting_transactions(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path), pool_size=1)
    begun = threading.Event()

    def read() -> None:
        with database.transaction() as transaction:
            begun.set()
            transaction.value(ENDLESS)

    thread = Thread(read)
    begun.wait(SOON)
    waiting = Thread(lambda: database.rows("SELECT 1"))
    until(lambda: database._permits._waiting)
    database.close()
    assert isinstance(thread.ended(), DatabaseClosed)
    assert isinstance(waiting.ended(), DatabaseClosed)


def test_a_connection_in_use_is_not_closed(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(database_module, "CLOSE_TIMEOUT", 0.2)
    database = Database(database_url)
    begun, closed = threading.Event(), threading.Event()
    read: list[object] = []

    def work() -> None:
        with database.transaction() as transaction:
            begun.set()
            closed.wait(SOON)
            read.append(transaction.value("SELECT 1"))

    thread = Thread(work)
    begun.wait(SOON)
    with caplog.at_level(logging.ERROR):
        database.close()
    closed.set()

    assert thread.ended() is None
    assert read == [1]
    assert caplog.messages == ["transactions have not ended; 1 connections to the database are left open"]
