"""Storage faults for both kinds of database: another program's lock, a damaged file, a lost connection."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from ccm.db.driver.database import Database

# How long a statement waits for a lock in these tests (milliseconds); a service waits for a second.
LOCK_TIMEOUT_MS = 20
PAGE_SIZE = 4096
TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = current_schema() ORDER BY tablename"


def path_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


def impatient(url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of a database whose new connections give up a lock after LOCK_TIMEOUT_MS."""
    if url.startswith("sqlite"):
        monkeypatch.setattr("ccm.db.driver.sqlite.BUSY_TIMEOUT_MS", LOCK_TIMEOUT_MS)
        return url
    return f"{url}?options=-c%20lock_timeout%3D{LOCK_TIMEOUT_MS}ms"


@contextmanager
def locked(url: str, *, spared: str | None = None) -> Iterator[None]:
    """Lock a database as another program would: SQLite against writers, PostgreSQL's tables against all access.

    Args:
        spared: a PostgreSQL table to leave unlocked.
    """
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(path_of(url), isolation_level=None, check_same_thread=False)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
        return
    with psycopg.connect(url.partition("?")[0]) as other:
        tables = [name for (name,) in other.execute(TABLES) if name != spared]
        other.execute(f"LOCK TABLE {', '.join(tables)} IN ACCESS EXCLUSIVE MODE".encode())
        yield
        other.rollback()


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Overwrite the first page of each table and index of a SQLite file that is not open; restore it at the end.

    The schema stays intact, so that each statement compiles and meets the damage when it runs.
    """
    with closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as plain:
        pages = [page for (page,) in plain.execute("SELECT rootpage FROM sqlite_master WHERE rootpage > 1")]
    whole = path.read_bytes()
    broken = bytearray(whole)
    for page in pages:
        broken[(page - 1) * PAGE_SIZE : page * PAGE_SIZE] = b"\xff" * PAGE_SIZE
    _overwrite(path, broken)
    yield
    assert path.read_bytes() == broken, "the service wrote to a damaged file"
    _overwrite(path, whole)


def _overwrite(path: Path, content: bytes | bytearray) -> None:
    """Overwrite a file in place, because the service detects a replaced file as another fault."""
    with path.open("r+b") as file:
        file.write(content)


@contextmanager
def cut_off(database: Database) -> Iterator[None]:
    """Terminate each transaction's PostgreSQL connection right after it begins and writes something."""
    pool = database._pool
    begin = pool.begin

    def begin_and_lose() -> Any:
        cursor = begin()
        if database._writable:
            cursor.execute("UPDATE ccr_migrations SET name = 'half-written' WHERE number = 1")
        (pid,) = cursor.execute("SELECT pg_backend_pid()").fetchone()
        with psycopg.connect(database.url.partition("?")[0], autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(%s, 30000)", [pid])
        return cursor

    pool.begin = begin_and_lose  # type: ignore[method-assign]
    try:
        yield
    finally:
        pool.begin = begin  # type: ignore[method-assign]


def content(url: str) -> dict[str, list[Any]]:
    """Return all rows of all tables, read without the code under test."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(path_of(url))) as plain:
            # Without the tables of FTS5, whose index may change while its content stays the same.
            tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'ccr_search_%'"
            names = [row[0] for row in plain.execute(tables)]
            return {name: sorted(plain.execute(f"SELECT * FROM {name}"), key=repr) for name in names}
    with psycopg.connect(url.partition("?")[0]) as server:
        names = [name for (name,) in server.execute(TABLES)]
        return {name: sorted(server.execute(f"SELECT * FROM {name}".encode()), key=repr) for name in names}
