"""Applies migrations.sql: numbered and named sections, forward only, each in its own transaction."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ccm.db import run_metadata, search
from ccm.db.driver.database import Database
from ccm.db.driver.lock import TAKEN
from ccm.db.driver.transaction import Transaction
from ccm.errors import DatabaseRefused, DatabaseTaken, StorageDown, StorageError, StorageRejected
from ccm.timestamps import timestamp

MIGRATIONS_FILE = Path(__file__).parents[3] / "migrations.sql"
# The heading of a section: its number, its name and, if it is for one dialect only, that dialect.
HEADING = re.compile(r"^-- (\d{4}) ([^(\n]+?)(?: \((sqlite|postgresql)\))?$", re.MULTILINE)

# The functions that complete a section for the rows that are there, by the section's number.
FILLS: Mapping[int, Callable[[Transaction], None]] = {12: run_metadata.fill, 13: search.fill}

# Each attempt takes as long as SQLite waits for a lock (db/driver/sqlite.py).
LOCKED_TRIES = 10

CREATE_HISTORY = """
CREATE TABLE IF NOT EXISTS ccr_migrations (number BIGINT PRIMARY KEY, name TEXT NOT NULL, "appliedAt" TEXT NOT NULL)
"""
TABLES = {
    "sqlite": "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'",
    "postgresql": "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()",
}


@dataclass(frozen=True)
class Migration:
    """One section of the file."""

    number: int
    name: str
    sql: str

    def __str__(self) -> str:
        return f"{self.number:04} {self.name}"

    def statements(self) -> Iterator[str]:
        """Yield the statements, without the comments between them."""
        statement = ""
        for line in self.sql.splitlines():
            if not statement and (not line.strip() or line.startswith("--")):
                continue
            statement += line + "\n"
            if sqlite3.complete_statement(statement):
                yield statement
                statement = ""
        if statement.strip():
            raise ValueError(f"migration {self} ends in the middle of a statement")


def read_migrations(dialect: str, file: Path = MIGRATIONS_FILE) -> list[Migration]:
    """Return the sections of the file for a dialect, in order.

    Raises:
        ValueError: the numbers are not 1, 2, 3, ... for this dialect.
    """
    # The text before the first heading, then four parts of each section: those of its heading, and its statements.
    parts = iter(HEADING.split(file.read_text(encoding="utf-8"))[1:])
    sections = [
        Migration(int(number), name, sql)
        for number, name, only_dialect, sql in zip(parts, parts, parts, parts, strict=True)
        if only_dialect in (None, dialect)
    ]
    if [section.number for section in sections] != list(range(1, len(sections) + 1)):
        raise ValueError(f"{file.name}: the {dialect} sections are not numbered 1, 2, 3, ...")
    return sections


def pending(database: Database, migrations: list[Migration] | None = None) -> list[Migration]:
    """Return the migrations that the database lacks, without changing anything.

    Raises:
        DatabaseRefused: the database is not ours, is newer than this program, or cannot be read.
    """
    migrations = read_migrations(database.dialect) if migrations is None else migrations
    try:
        _wait_until_unlocked(database)
        with database.transaction() as transaction:
            tables = transaction.column(TABLES[database.dialect])
            if "ccr_migrations" not in tables:
                if "ccr_runs" in tables:
                    raise DatabaseRefused(
                        "The database has a table ccr_runs that is not CC Manager's; give it a database of its own."
                    )
                return migrations
            applied = _applied(transaction)
    except DatabaseTaken:
        raise DatabaseRefused(TAKEN) from None
    except StorageError as error:
        raise DatabaseRefused(f"The database cannot be read: {error}.") from None
    if applied and max(applied) > len(migrations):
        raise DatabaseRefused(
            f"The database has schema {max(applied)} and this program knows {len(migrations)}: "
            "a newer CC Manager wrote it. Update the program; a schema cannot be downgraded."
        )
    return [migration for migration in migrations if migration.number not in applied]


def migrate(database: Database, migrations: list[Migration] | None = None) -> list[Migration]:
    """Apply the migrations that the database lacks, and return them. Safe to run twice, and in two processes at once.

    Args:
        database: a writable one.

    Raises:
        DatabaseRefused: as `pending`, or a section failed and was rolled back, or SQLite lacks FTS5.
    """
    applied = []
    missing = pending(database, migrations)
    if database.is_sqlite:
        _check_fts5(database)
    for migration in missing:
        try:
            with database.transaction() as transaction:
                if database.dialect == "postgresql":
                    # Admit one process at a time, as BEGIN IMMEDIATE does on SQLite.
                    transaction.execute("SELECT pg_advisory_xact_lock(hashtext('ccr_migrations'))")
                transaction.script(CREATE_HISTORY)
                if migration.number in _applied(transaction):
                    continue  # another process was faster
                for statement in migration.statements():
                    transaction.script(statement)
                if fill := FILLS.get(migration.number):
                    fill(transaction)
                row = {"number": migration.number, "name": migration.name, "appliedAt": timestamp()}
                transaction.insert("ccr_migrations", row)
        except StorageError as error:
            raise DatabaseRefused(f"Migration {migration} failed and was undone: {error}.") from None
        applied.append(migration)
    return applied


def _check_fts5(database: Database) -> None:
    try:
        database.rows("SELECT fts5(NULL)")
    except StorageRejected:
        raise DatabaseRefused(
            f"The SQLite of this Python ({sqlite3.sqlite_version}) lacks FTS5, the module for full-text search. Use a "
            "Python whose SQLite has it, as those of python.org and of Linux distributions do, or PostgreSQL "
            "(DATABASE_URL)."
        ) from None


def _wait_until_unlocked(database: Database) -> None:
    """Retry while the database is locked: a backup or a shell may hold it for a moment when the service starts."""
    for last in [False] * LOCKED_TRIES + [True]:
        try:
            with database.transaction():
                return
        except StorageDown as error:
            if last or "locked" not in str(error):
                raise


def _applied(transaction: Transaction) -> set[int]:
    return set(transaction.column("SELECT number FROM ccr_migrations"))
