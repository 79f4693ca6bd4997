"""The health of storage on a service that has nothing else to write."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ccm.core.storage.health import FRESH_INTERVAL, SILENCE, StorageHealth
from ccm.core.storage.notifier import Notifier
from ccm.core.storage.writer import Writer
from ccm.db.driver import sqlite_file
from ccm.db.driver.database import Database
from ccm.db.driver.migrate import migrate
from ccm.db.driver.transaction import Transaction
from tests.postgresql import PostgreSQLServer
from tests.waiting import until

SOON = 60.0


def until_last_error_is(storage_health: StorageHealth, last_error: str | None) -> None:
    until(lambda: storage_health.last_error() == last_error)


class Idle:
    """A writer with an empty queue."""

    def __init__(self, url: str, answer_seconds: float | None = None) -> None:
        self.database = Database(url, writable=True, pool_size=1, answer_seconds=answer_seconds)
        migrate(self.database)
        self.writer = Writer(self.database, Notifier(), 2**20, lambda _run, _error: None)
        self.storage_health = StorageHealth(self.writer, self.database)
        self.writer.start()

    def stop(self) -> None:
        self.writer.stop(time.monotonic() + SOON)
        self.database.close()


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Idle]:
    url = f"sqlite:///{tmp_path}/db.sqlite"
    sqlite_file.prepare(url)
    idle = Idle(url)
    yield idle
    idle.stop()


def test_frequent_checks_write_nothing(idle: Idle) -> None:
    assert idle.storage_health.last_error() is None
    before = idle.writer.last_commit
    for _ in range(1_000):
        assert idle.storage_health.last_error() is None
    assert idle.writer.last_commit == before


def test_a_removed_file_and_its_return_are_noticed(idle: Idle, tmp_path: Path) -> None:
    assert idle.storage_health.last_error() is None
    (tmp_path / "db.sqlite").rename(tmp_path / "away")
    until_last_error_is(idle.storage_health, "the database file has been removed or replaced")
    (tmp_path / "away").rename(tmp_path / "db.sqlite")
    until_last_error_is(idle.storage_health, None)


def test_all_concurrent_checks_notice_a_server_that_stands_still(postgresql_server: PostgreSQLServer) -> None:
    idle = Idle(postgresql_server.new_database(), answer_seconds=5.0)
    assert idle.storage_health.last_error() is None
    errors: list[str | None] = []

    def check() -> None:
        errors.append(idle.storage_health.last_error())

    with postgresql_server.standing_still():
        until_last_error_is(idle.storage_health, "the database does not answer")
        threads = [threading.Thread(target=check) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
    assert errors == ["the database does not answer"] * 20
    until_last_error_is(idle.storage_health, None)
    idle.stop()


class SlowClock:
    """The clock of an interpreter so busy that each thread wakes up late."""

    def monotonic(self) -> float:
        return time.monotonic() * 10


def blocked(idle: Idle) -> threading.Event:
    """Make the writer wait, within a transaction, for the event that is returned."""
    begun, end = threading.Event(), threading.Event()

    def work(transaction: Transaction) -> None:
        begun.set()
        end.wait(SOON)

    idle.writer.submit(work)
    begun.wait(SOON)
    return end


def test_a_writer_that_makes_progress_is_healthy(idle: Idle) -> None:
    end = threading.Event()

    def work(transaction: Transaction) -> None:
        while not end.wait(0.01):
            transaction.value("SELECT 1")

    idle.writer.submit(work)
    until_stale(idle)
    assert idle.storage_health.last_error() is None
    end.set()


def until_stale(idle: Idle) -> None:
    """Wait until the last commit is too old to prove anything."""
    until(lambda: time.monotonic() - idle.writer.last_commit >= FRESH_INTERVAL)


def test_a_writer_without_progress_is_noticed(idle: Idle) -> None:
    end = blocked(idle)
    until_last_error_is(idle.storage_health, SILENCE)
    end.set()
    until_last_error_is(idle.storage_health, None)


def test_a_busy_interpreter_is_not_at_first_a_fault_of_the_database(
    idle: Idle, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = blocked(idle)
    until_stale(idle)
    monkeypatch.setattr("ccm.core.storage.health.time", SlowClock())
    assert idle.storage_health.last_error() is None
    until_last_error_is(idle.storage_health, SILENCE)
    end.set()
    until_last_error_is(idle.storage_health, None)


def test_busy_threads_cause_no_false_alarm(idle: Idle) -> None:
    stop = False
    interval = sys.getswitchinterval()

    def spin() -> None:
        while not stop:
            pass

    threads = [threading.Thread(target=spin) for _ in range(4)]
    until_stale(idle)
    sys.setswitchinterval(0.1)
    try:
        for thread in threads:
            thread.start()
        assert idle.storage_health.last_error() is None
    finally:
        sys.setswitchinterval(interval)
        stop = True
        for thread in threads:
            thread.join()
