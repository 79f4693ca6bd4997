"""One database, reached through dataset: connections, transactions, and the driver's errors told apart.

dataset keeps a connection for each thread id, also after the thread has died, leaves reads open as transactions, and
poisons a thread whose COMMIT failed. So everything here goes through `Database.transaction`, which always gives the
connection back, and nothing else in the project touches dataset.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import dataset
import sqlalchemy
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from ccm.errors import StorageDown, StorageError, StorageRejected

# How long SQLite itself waits for a lock. The recorder tries again after that, so that a cancelled write is let go.
BUSY_TIMEOUT_MS = 1_000
# What SQLite answers when the statement is to blame and not the file; all other codes are the storage's trouble.
SQLITE_STATEMENT_ERRORS = frozenset(
    {
        sqlite3.SQLITE_ERROR,
        sqlite3.SQLITE_TOOBIG,
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_MISMATCH,
        sqlite3.SQLITE_MISUSE,
        sqlite3.SQLITE_RANGE,
    }
)
READ_ONLY_TRANSACTION = "25006"  # PostgreSQL's SQLSTATE: a standby, or one made read-only when its disk is full


@cache
def _statement(sql: str) -> sqlalchemy.TextClause:
    return sqlalchemy.text(sql)


class Transaction:
    """Statements that are committed together. Valid only within `Database.transaction`."""

    def __init__(self, database: dataset.Database) -> None:
        self._database = database

    def rows(self, sql: str, **parameters: Any) -> list[Mapping[str, Any]]:
        """What a query gives, whole: a half-read cursor would hold back SQLite's checkpoints."""
        result = self._database.executable.execute(_statement(sql), parameters)
        return cast("list[Mapping[str, Any]]", [row._mapping for row in result])

    def row(self, sql: str, **parameters: Any) -> Mapping[str, Any] | None:
        return next(iter(self.rows(sql, **parameters)), None)

    def column(self, sql: str, **parameters: Any) -> list[Any]:
        """The first column of what a query gives."""
        return list(self._database.executable.execute(_statement(sql), parameters).scalars())

    def value(self, sql: str, **parameters: Any) -> Any:
        """The first column of the first row, or None."""
        return self._database.executable.execute(_statement(sql), parameters).scalar()

    def execute(self, sql: str, **parameters: Any) -> int:
        """How many rows a statement changed."""
        result = self._database.executable.execute(_statement(sql), parameters)
        return int(result.rowcount)

    def script(self, sql: str) -> None:
        """One statement as it stands, nothing bound: a colon in a comment is no parameter."""
        self._database.executable.exec_driver_sql(sql)

    def insert(self, table: str, row: Mapping[str, Any]) -> None:
        self._database[table].insert(dict(row))

    def insert_many(self, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """The rows in one statement. All must have the same keys: dataset pads what is missing."""
        self._database[table].insert_many([dict(row) for row in rows], chunk_size=len(rows))

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """What is done within is undone when it raises; the transaction goes on.

        Raises:
            StorageError: as `Database.transaction`.
        """
        nested = self._database.executable.begin_nested()
        try:
            yield
        except SQLAlchemyError as error:
            told = storage_error(error)
            if isinstance(told, StorageRejected):
                nested.rollback()
            raise told from error
        except BaseException:
            nested.rollback()
            raise
        nested.commit()


class Database:
    """A pool of connections to one database.

    A `writer` begins its transactions with the write lock in hand, so that none fails half-way for want of it. There
    is one writer in a process (core/recorder.py); everyone else reads.
    """

    def __init__(self, url: str, *, writer: bool = False, pool_size: int = 10) -> None:
        self.url = url
        self.is_sqlite = url.startswith("sqlite")
        self._begin = "BEGIN IMMEDIATE" if writer else "BEGIN"
        self._database = dataset.connect(
            url,
            ensure_schema=False,  # or a key of a row becomes a column
            engine_kwargs={
                "pool_size": pool_size,
                "max_overflow": 0 if writer else pool_size,
                "pool_timeout": 10,
                "pool_pre_ping": not self.is_sqlite,
                # None: the sqlite3 module begins no transaction of its own, see _begin_sqlite.
                "connect_args": {"isolation_level": None} if self.is_sqlite else {},
            },
            on_connect_statements=[
                f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}",
                "PRAGMA foreign_keys = ON",
                "PRAGMA synchronous = FULL",
            ]
            if self.is_sqlite
            else [],
        )
        if self.is_sqlite:
            event.listen(self._database.engine, "begin", self._begin_sqlite)

    def _begin_sqlite(self, connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql(self._begin)

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return "sqlite" if self.is_sqlite else "postgresql"

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """One transaction: committed at the end, or rolled back. The connection is given back either way.

        Raises:
            StorageDown: storage is locked, full, read-only or out of reach.
            StorageRejected: storage refuses a statement.
        """
        database = self._database
        try:
            database.begin()
            yield Transaction(database)
            database.commit()
        except SQLAlchemyError as error:
            raise storage_error(error) from error
        finally:
            self._release()

    def _release(self) -> None:
        """Give this thread's connection back, rolled back if it is not committed.

        dataset does neither when COMMIT itself fails (it forgets the transaction first and then finds nothing to roll
        back), and the thread keeps the broken connection for good.
        """
        database = self._database
        database.local.tx = []
        with database.lock:
            connection = database.connections.pop(threading.get_ident(), None)
        if connection is not None:
            connection.close()

    def rows(self, sql: str, **parameters: Any) -> list[Mapping[str, Any]]:
        """What one query gives, in a transaction of its own."""
        with self.transaction() as transaction:
            return transaction.rows(sql, **parameters)

    def close(self) -> None:
        self._database.close()


def storage_error(error: SQLAlchemyError) -> StorageError:
    """What the driver raised, as one of ours."""
    reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
    return StorageDown(reason) if _is_down(error) else StorageRejected(reason)


def _is_down(error: SQLAlchemyError) -> bool:
    if isinstance(error, PoolTimeoutError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    code = getattr(error.orig, "sqlite_errorcode", None)
    if code is not None:
        return (code & 0xFF) not in SQLITE_STATEMENT_ERRORS
    if isinstance(error.orig, sqlite3.ProgrammingError):
        return False
    state = getattr(error.orig, "sqlstate", None)
    return (
        isinstance(error, OperationalError | InterfaceError)
        or error.connection_invalidated
        or state == READ_ONLY_TRANSACTION
    )
