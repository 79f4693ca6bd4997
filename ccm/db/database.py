"""One database, reached through dataset: connections, transactions, and the driver's errors told apart.

dataset keeps a connection for each thread id, also after the thread has died, leaves reads open as transactions, and
poisons a thread whose COMMIT failed. So everything here goes through `Database.transaction`, which always gives the
connection back, and nothing else in the project touches dataset.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import dataset
import psycopg
import sqlalchemy
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from ccm.errors import StorageDown, StorageError, StorageRejected

# How long SQLite itself waits for a lock. The recorder tries again after that, so that a cancelled write is let go.
BUSY_TIMEOUT_MS = 1_000
# How long a transaction waits for a free connection (seconds).
CONNECTION_SECONDS = 10.0
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
NAMED_PARAMETER = re.compile(r"(?<![:\w]):([A-Za-z]\w*)")
# PostgreSQL's SQLSTATEs: a class that psycopg takes for the server's trouble, though the row is to blame (it is too
# large for an index, say); and a standby, or a server made read-only when its disk is full.
PROGRAM_LIMIT_EXCEEDED = "54"
READ_ONLY_TRANSACTION = "25006"


@cache
def _driver_sql(sql: str, is_sqlite: bool) -> str:
    """A statement as the driver takes it: SQLite reads `:name` itself, psycopg wants `%(name)s`."""
    return sql if is_sqlite else NAMED_PARAMETER.sub(r"%(\1)s", sql.replace("%", "%%"))


class Transaction:
    """Statements that are committed together. Valid only within `Database.transaction`.

    They go to the driver's own cursor on dataset's connection: SQLAlchemy takes seven times as long for a short
    statement, and on its way through it no error is gained.
    """

    def __init__(self, database: dataset.Database, uncertain: bool) -> None:
        # Whether an earlier try of the same work may have been committed after all.
        self.uncertain = uncertain
        self._database = database
        self._cursor = database.executable.connection.cursor()

    def _execute(self, sql: str, parameters: Mapping[str, Any]) -> None:
        self._cursor.execute(_driver_sql(sql, self._database.is_sqlite), parameters)

    def rows(self, sql: str, **parameters: Any) -> list[Mapping[str, Any]]:
        """What a query gives, whole: a half-read cursor would hold back SQLite's checkpoints."""
        self._execute(sql, parameters)
        names = [column[0] for column in self._cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in self._cursor.fetchall()]

    def row(self, sql: str, **parameters: Any) -> Mapping[str, Any] | None:
        return next(iter(self.rows(sql, **parameters)), None)

    def tuples(self, sql: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """What a query gives, without the columns' names."""
        self._execute(sql, parameters)
        return cast("list[tuple[Any, ...]]", self._cursor.fetchall())

    def column(self, sql: str, **parameters: Any) -> list[Any]:
        """The first column of what a query gives."""
        return [row[0] for row in self.tuples(sql, **parameters)]

    def value(self, sql: str, **parameters: Any) -> Any:
        """The first column of the first row, or None."""
        return next(iter(self.column(sql, **parameters)), None)

    def execute(self, sql: str, **parameters: Any) -> int:
        """How many rows a statement changed."""
        self._execute(sql, parameters)
        return int(self._cursor.rowcount)

    def script(self, sql: str) -> None:
        """One statement as it stands, nothing bound: a colon in a comment is no parameter."""
        self._cursor.execute(sql)

    def insert(self, table: str, row: Mapping[str, Any]) -> None:
        columns = ", ".join(f'"{column}"' for column in row)
        values = ", ".join(f":{column}" for column in row)
        self._execute(f"INSERT INTO {table} ({columns}) VALUES ({values})", row)

    def insert_many(
        self, table: str, columns: Sequence[str], rows: list[tuple[Any, ...]], *, known_ignored: bool = False
    ) -> None:
        """The rows in one statement, on dataset's connection.

        Args:
            known_ignored: leave out rows whose key is there already; else they are refused.

        dataset's own insert_many goes through the keys of every row three times before it does the same, and SQLAlchemy
        through its values twice: more than the database itself takes for a row.
        """
        names = ", ".join(f'"{column}"' for column in columns)
        marks = ", ".join(["?" if self._database.is_sqlite else "%s"] * len(columns))
        if rows:
            end = " ON CONFLICT DO NOTHING" if known_ignored else ""
            self._database.executable.exec_driver_sql(f"INSERT INTO {table} ({names}) VALUES ({marks}){end}", rows)

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """What is done within is undone when it raises; the transaction goes on.

        Raises:
            StorageError: as `Database.transaction`.
        """
        self.script("SAVEPOINT part")
        try:
            yield
        except BaseException as error:
            told = storage_error(error)
            if not isinstance(told, StorageDown):
                self.script("ROLLBACK TO SAVEPOINT part")
                self.script("RELEASE SAVEPOINT part")
            if told is None:
                raise
            raise told from error
        self.script("RELEASE SAVEPOINT part")


class Database:
    """A pool of connections to one database.

    A `writer` begins its transactions with the write lock in hand, so that none fails half-way for want of it. There
    is one writer in a process (core/recorder.py); everyone else reads.
    """

    def __init__(self, url: str, *, writer: bool = False, pool_size: int = 20) -> None:
        self.url = url
        self.is_sqlite = url.startswith("sqlite")
        self._begin = "BEGIN IMMEDIATE" if writer else "BEGIN"
        # dataset takes a connection with a lock in hand that giving one back needs too: with none free everything would
        # stand still. So nobody gets there before there is one.
        self._free = threading.BoundedSemaphore(pool_size)
        self._database = dataset.connect(
            url,
            ensure_schema=False,  # or a key of a row becomes a column
            engine_kwargs={
                "pool_size": pool_size,
                "max_overflow": 0,
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
            event.listen(self._database.engine, "connect", self._teach_sqlite)

    def __str__(self) -> str:
        return sqlalchemy.make_url(self.url).render_as_string(hide_password=True)

    def _teach_sqlite(self, connection: sqlite3.Connection, _record: object) -> None:
        """SQLite's own LOWER knows ASCII only, and a search should find École in either case, as in PostgreSQL."""
        connection.create_function(
            "LOWER", 1, lambda text: None if text is None else str(text).lower(), deterministic=True
        )

    def _begin_sqlite(self, connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql(self._begin)

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return "sqlite" if self.is_sqlite else "postgresql"

    @contextmanager
    def transaction(self, uncertain: bool = False) -> Iterator[Transaction]:
        """One transaction: committed at the end, or rolled back. The connection is given back either way.

        Args:
            uncertain: an earlier try of the same work may have been committed after all.

        Raises:
            StorageDown: storage is locked, full, read-only or out of reach.
            StorageRejected: storage refuses a statement.
        """
        database = self._database
        if not self._free.acquire(timeout=CONNECTION_SECONDS):
            raise StorageDown("all connections are in use")
        committing = False
        try:
            database.begin()
            yield Transaction(database, uncertain)
            committing = True
            database.commit()
        except Exception as error:
            told = storage_error(error)
            if told is None:
                raise
            self._release(broken=True)
            # A COMMIT that SQLite refuses is not committed; one whose answer is lost on its way may be.
            told.may_be_committed = committing and not self.is_sqlite
            raise told from error
        finally:
            self._release()
            self._free.release()

    def _release(self, broken: bool = False) -> None:
        """Give this thread's connection back, rolled back if it is not committed; close it for good if it is broken.

        dataset does neither when COMMIT itself fails (it forgets the transaction first and then finds nothing to roll
        back): the thread would keep the connection, and SQLite its open transaction.
        """
        database = self._database
        database.local.tx = []
        with database.lock:
            connection = database.connections.pop(threading.get_ident(), None)
        if connection is not None:
            if broken:
                connection.invalidate()
            connection.close()

    def rows(self, sql: str, **parameters: Any) -> list[Mapping[str, Any]]:
        """What one query gives, in a transaction of its own."""
        with self.transaction() as transaction:
            return transaction.rows(sql, **parameters)

    def close(self) -> None:
        self._database.close()


def storage_error(error: BaseException) -> StorageError | None:
    """What a driver raised, by itself or wrapped by SQLAlchemy, as one of ours; None if it comes from no driver."""
    if isinstance(error, StorageError):
        return error
    if isinstance(error, UnicodeError | OverflowError):
        return StorageRejected(f"a value cannot be stored: {type(error).__name__}")
    cause = getattr(error, "orig", None) or error
    if not isinstance(error, SQLAlchemyError) and not isinstance(cause, sqlite3.Error | psycopg.Error):
        return None
    reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
    return StorageDown(reason) if _is_down(cause) else StorageRejected(reason)


def _is_down(cause: BaseException) -> bool:
    if isinstance(cause, sqlite3.Error):
        code = getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_MISUSE)
        return (code & 0xFF) not in SQLITE_STATEMENT_ERRORS
    if isinstance(cause, psycopg.Error):
        if (cause.sqlstate or "").startswith(PROGRAM_LIMIT_EXCEEDED):
            return False
        return isinstance(cause, psycopg.OperationalError | psycopg.InterfaceError) or (
            cause.sqlstate == READ_ONLY_TRANSACTION
        )
    return False
