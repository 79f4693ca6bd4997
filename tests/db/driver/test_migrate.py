"""Migrations are applied once, in order and atomically, and never to another program's database."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ccm.db.driver.database import Database
from ccm.db.driver.migrate import Migration, migrate, pending, read_migrations
from ccm.errors import DatabaseRefused

ORIGINAL_COLUMNS = {
    "ccr_runs": {
        "id",
        "cwd",
        "sessionId",
        "parentSessionId",
        "mode",
        "status",
        "prompt",
        "resultType",
        "resultJson",
        "durationMs",
        "createdAt",
    },
    "ccr_run_messages": {"id", "runId", "index", "messageType", "messageJson", "createdAt"},
}


@pytest.fixture
def empty(empty_database_url: str) -> Callable[[], Database]:
    return lambda: Database(empty_database_url, writable=True, pool_size=1)


def test_an_empty_database_gets_every_migration_once(empty: Callable[[], Database]) -> None:
    database = empty()
    expected = read_migrations(database.dialect)

    assert pending(database) == expected
    assert migrate(database) == expected
    assert pending(database) == migrate(database) == []
    database.close()


def test_the_original_tables_have_their_columns(writable: Database) -> None:
    with writable.transaction() as transaction:
        for table, columns in ORIGINAL_COLUMNS.items():
            transaction.execute(f"SELECT * FROM {table}")
            assert transaction._cursor.description is not None
            assert columns <= {column[0] for column in transaction._cursor.description}


def test_a_failed_section_changes_nothing(empty: Callable[[], Database]) -> None:
    database = empty()
    broken = [
        Migration(1, "good", "CREATE TABLE good (id BIGINT);"),
        Migration(2, "half", "CREATE TABLE half (id BIGINT);\nINSERT INTO nowhere VALUES (1);"),
    ]
    with pytest.raises(DatabaseRefused, match="0002 half failed and was undone"):
        migrate(database, broken)

    assert [migration.number for migration in pending(database, broken)] == [2]
    mended = [broken[0], Migration(2, "half", "CREATE TABLE half (id BIGINT);")]
    assert [migration.number for migration in migrate(database, mended)] == [2]
    database.close()


def test_a_newer_schema_is_refused(writable: Database) -> None:
    with writable.transaction() as transaction:
        transaction.insert("ccr_migrations", {"number": 99, "name": "of the future", "appliedAt": ""})

    with pytest.raises(DatabaseRefused, match="a newer CC Manager wrote it") as refusal:
        migrate(writable)
    assert refusal.value.exit_code == 3


def test_a_foreign_table_of_the_same_name_is_refused(empty: Callable[[], Database]) -> None:
    database = empty()
    with database.transaction() as transaction:
        transaction.execute("CREATE TABLE ccr_runs (id BIGINT)")

    with pytest.raises(DatabaseRefused, match="not CC Manager's"):
        migrate(database)
    database.close()


def test_sections_are_selected_by_dialect_and_numbered_without_gaps(tmp_path: Path) -> None:
    file = tmp_path / "migrations.sql"
    file.write_text(
        "-- a comment\n\n-- 0001 first\nCREATE TABLE a (id BIGINT);\n-- 0002 second (sqlite)\nSELECT 1;\n"
        "-- 0002 second (postgresql)\nSELECT 2; -- half; of a line\nSELECT 3;\n"
    )
    assert [str(migration) for migration in read_migrations("sqlite", file)] == ["0001 first", "0002 second"]
    second = read_migrations("postgresql", file)[1]
    assert [statement.strip() for statement in second.statements()] == ["SELECT 2; -- half; of a line", "SELECT 3;"]

    file.write_text("-- 0001 first\nSELECT 1;\n-- 0003 third\nSELECT 3;\n")
    with pytest.raises(ValueError, match="not numbered 1, 2, 3"):
        read_migrations("sqlite", file)


def test_both_dialects_have_the_same_sections() -> None:
    sections = [[str(migration) for migration in read_migrations(dialect)] for dialect in ("sqlite", "postgresql")]
    assert sections[0] == sections[1]
