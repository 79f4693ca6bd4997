"""The parts of dataset and SQLAlchemy that ccm's `Database` uses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dataset
import pytest
import sqlalchemy
from sqlalchemy import event
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

ENGINE = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0, "connect_args": {"isolation_level": None}}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Any]:
    database = dataset.connect(
        f"sqlite:///{tmp_path}/db.sqlite",
        ensure_schema=False,
        engine_kwargs=dict(ENGINE),
        on_connect_statements=["PRAGMA user_version = 7"],
    )
    yield database
    database.close()


# ---- dataset


@pytest.mark.parametrize(
    ("name", "kind", "used"),
    [
        ("engine", sqlalchemy.Engine, "Database takes connections from it"),
        ("connections", dict, "Database._take_connection and _release put a connection in and take it out"),
        ("local", threading.local, "Database._release resets its `tx`"),
        ("lock", type(threading.RLock()), "Database holds it around `connections`"),
        ("is_sqlite", bool, "Transaction reads it"),
    ],
)
def test_a_database_has_the_attribute(database: Any, name: str, kind: type, used: str) -> None:
    assert isinstance(getattr(database, name, None), kind), (
        f"dataset's Database.{name} is missing or has another type: {used}"
    )


def test_a_thread_uses_the_connection_that_was_put_there(database: Any) -> None:
    connection = database.engine.connect()
    database.connections[threading.get_ident()] = connection

    assert database.executable is connection, "Transaction would use another connection than Database took"
    database.begin()
    assert database.local.tx, "begin() records its transaction elsewhere: Database._release resets `local.tx`"
    database.commit()
    assert database.connections == {}, "commit() keeps the connection: Database would have to release it"


def test_a_removed_connection_leaves_no_transaction(database: Any) -> None:
    database.begin()
    database.local.tx = []
    connection = database.connections.pop(threading.get_ident())
    connection.close()

    assert not database.in_transaction, "Database._release leaves a transaction behind"
    database.begin()
    database.rollback()


def test_each_new_connection_runs_the_statements_and_uses_wal(database: Any) -> None:
    with database.engine.connect() as connection:
        values = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("user_version", "journal_mode")]

    assert values == [7, "wal"], "dataset does not run on_connect_statements, or does not switch to WAL"


# ---- SQLAlchemy


@pytest.mark.parametrize("name", ["begin", "connect", "do_connect"])
def test_the_engine_fires_the_event(database: Any, name: str) -> None:
    def listener(*_: Any) -> None:
        fired.append(name)

    fired: list[str] = []
    event.listen(database.engine, name, listener)
    database.begin()
    database.rollback()

    assert fired == [name], f"SQLAlchemy no longer fires `{name}`: Database opens connections and transactions with it"


@pytest.mark.parametrize(
    ("name", "used"),
    [
        ("info", "Database records there which files a connection has open"),
        ("connection", "Transaction takes the driver's cursor from it"),
        ("invalidate", "Database._release closes a broken connection with it"),
        ("closed", "Database._release reads it"),
        ("exec_driver_sql", "Transaction.insert_many calls it"),
    ],
)
def test_a_connection_has_the_attribute(database: Any, name: str, used: str) -> None:
    with database.engine.connect() as connection:
        assert hasattr(connection, name), f"SQLAlchemy's Connection.{name} is missing: {used}"


def test_the_drivers_own_connection_can_be_reached(database: Any) -> None:
    with database.engine.connect() as connection:
        cursor = connection.connection.cursor()
        cursor.execute("SELECT 1 AS one")
        assert cursor.description[0][0] == "one", "Transaction.rows reads the column names from the driver's cursor"
        cursor.close()
        assert callable(connection.connection.dbapi_connection.interrupt), (
            "Database._interrupt calls sqlite3's interrupt()"
        )


def test_a_connection_shares_the_info_of_its_pool_record(database: Any) -> None:
    def note(_connection: Any, record: Any) -> None:
        record.info["files"] = "noted"

    event.listen(database.engine, "connect", note)
    with database.engine.connect() as connection:
        assert connection.info.get("files") == "noted", (
            "the info that Database._sqlite_opened sets does not reach the connection"
        )


def test_rows_reach_the_driver_unchanged(database: Any) -> None:
    with database.engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE t (a, b)")
        connection.exec_driver_sql("INSERT INTO t (a, b) VALUES (?, ?)", [(1, ":x"), (2, "%s")])
        rows = connection.exec_driver_sql("SELECT a, b FROM t ORDER BY a").fetchall()
        connection.rollback()

    assert [tuple(row) for row in rows] == [(1, ":x"), (2, "%s")], "Transaction.insert_many needs them unchanged"


def test_a_driver_error_is_wrapped_once(database: Any) -> None:
    with database.engine.connect() as connection, pytest.raises(OperationalError) as raised:
        connection.exec_driver_sql("SELECT * FROM no_such_table")

    assert isinstance(raised.value, SQLAlchemyError), "storage_error() recognises SQLAlchemy's errors by this class"
    assert getattr(raised.value.orig, "sqlite_errorname", None) == "SQLITE_ERROR", (
        "storage_error() reads the driver's error in `orig`"
    )


def test_an_exhausted_pool_raises_at_once(database: Any) -> None:
    with database.engine.connect(), pytest.raises(PoolTimeout):
        database.engine.connect()


def test_an_invalidated_connection_is_not_used_again(database: Any) -> None:
    connection = database.engine.connect()
    first = connection.connection.dbapi_connection
    connection.invalidate()
    connection.close()
    with database.engine.connect() as second:
        assert second.connection.dbapi_connection is not first, (
            "Database._release would return a broken connection to the pool"
        )


def test_a_disposed_pool_closes_its_connections(database: Any) -> None:
    opened: list[Any] = []
    event.listen(database.engine, "connect", lambda connection, _record: opened.append(connection))
    with database.engine.connect():
        pass
    database.engine.pool.dispose()

    with pytest.raises(Exception, match="closed"):
        opened[0].execute("SELECT 1")


def test_postgresql_means_psycopg_3() -> None:
    engine = sqlalchemy.create_engine("postgresql://user@localhost/none")

    assert engine.dialect.driver == "psycopg", "DATABASE_URL would use another driver"


def test_a_url_is_shown_without_its_password() -> None:
    shown = sqlalchemy.make_url("postgresql://user:secret@localhost/db").render_as_string(hide_password=True)

    assert shown == "postgresql://user:***@localhost/db", "the log would show the password"
