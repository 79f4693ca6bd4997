"""Applies migrations.sql: numbered, named sections, forward only, each in a transaction of its own."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ccm.db.driver.database import Database
from ccm.db.driver.lock import TAKEN
from ccm.db.driver.transaction import Transaction
from ccm.errors import DatabaseRefused, DatabaseTaken, StorageDown, StorageError
from ccm.timestamps import timestamp

MIGRATIONS_FILE = Path(__file__).parents[3] / "migrations.sql"
HEADING = re.compile(r"^-- (?P<number>\d{4}) (?P<name>[^(]+?)(?: \((?P<dialect>sqlite|postgresql)\))?$")

# Each takes as long as SQLite waits for a lock (db/driver/sqlite.py).
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
    """One section of the file, for one dialect."""

    number: int
    name: str
    dialect: str | None
    sql: str

    def __str__(self) -> str:
        return f"{self.number:04} {self.name}"

    def statements(self) -> Iterator[str]:
        """The statements, one by one; comments between them are left out."""
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
    """The sections of the file that concern a dialect, in order.

    Raises:
        ValueError: the numbers are not 1, 2, 3, ... for this dialect.
    """
    sections: list[Migration] = []
    lines: list[str] = []
    heading: re.Match[str] | None = None

    def close() -> None:
        if heading is not None and heading["dialect"] in (None, dialect):
            number, name = int(heading["number"]), heading["name"]
            sections.append(Migration(number, name, heading["dialect"], "\n".join(lines)))

    for line in file.read_text(encoding="utf-8").splitlines():
        match = HEADING.match(line)
        if match:
            close()
            heading, lines = match, []
        else:
            lines.append(line)
    close()
    if [section.number for section in sections] != list(range(1, len(sections) + 1)):
        raise ValueError(f"{file.name}: the {dialect} sections are not numbered 1, 2, 3, ...")
    return sections


def pending(database: Database, migrations: list[Migration] | None = None) -> list[Migration]:
    """What the database lacks. Changes nothing.

    Raises:
        DatabaseRefused: it is not ours, newer than this program, or cannot be read.
    """
    migrations = read_migrations(database.dialect) if migrations is None else migrations
    try:
        _wait_for(database)
        with database.transaction() as transaction:
            tables = transaction.column(TABLES[database.dialect])
            if "ccr_migrations" not in tables:
                if "ccr_runs" in tables:
                    raise DatabaseRefused(
                        "The database has a table ccr_runs that is not CC Manager's; give it a database of its own."
                    )
                return migrations
            done = _applied(transaction)
    except DatabaseTaken:
        raise DatabaseRefused(TAKEN) from None
    except StorageError as error:
        raise DatabaseRefused(f"The database cannot be read: {error}.") from None
    if done and max(done) > len(migrations):
        raise DatabaseRefused(
            f"The database has schema {max(done)} and this program knows {len(migrations)}: a newer CC Manager wrote "
            "it. Update the program; a schema never goes back."
        )
    return [migration for migration in migrations if migration.number not in done]


def migrate(database: Database, migrations: list[Migration] | None = None) -> list[Migration]:
    """Apply what the database lacks, and say what that was. Safe to run twice, and by two processes at once.

    Args:
        database: a writer.

    Raises:
        DatabaseRefused: as `pending`, or a section fails; then that section has changed nothing.
    """
    applied = []
    for migration in pending(database, migrations):
        try:
            with database.transaction() as transaction:
                if database.dialect == "postgresql":
                    # SQLite's BEGIN IMMEDIATE lets one in at a time; this does the same here.
                    transaction.execute("SELECT pg_advisory_xact_lock(hashtext('ccr_migrations'))")
                transaction.script(CREATE_HISTORY)
                if migration.number in _applied(transaction):
                    continue  # another process was quicker
                for statement in migration.statements():
                    transaction.script(statement)
                row = {"number": migration.number, "name": migration.name, "appliedAt": timestamp()}
                transaction.insert("ccr_migrations", row)
        except StorageError as error:
            raise DatabaseRefused(f"Migration {migration} failed and was undone: {error}.") from None
        applied.append(migration)
    return applied


def _wait_for(database: Database) -> None:
    """A backup or a shell may hold the database for a moment just when the service starts."""
    for last in [False] * LOCKED_TRIES + [True]:
        try:
            with database.transaction():
                return
        except StorageDown as error:
            if last or "locked" not in str(error):
                raise


def _applied(transaction: Transaction) -> set[int]:
    return set(transaction.column("SELECT number FROM ccr_migrations"))
