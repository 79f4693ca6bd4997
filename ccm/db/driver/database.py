"""One database, reached through dataset: connections, transactions, and the driver's errors told apart.

dataset keeps a connection for each thread id, also after the thread has died, leaves reads open as transactions, and
poisons a thread whose COMMIT failed. So everything here goes through `Database.transaction`, which always gives the
connection back, and nothing else in the project touches dataset.
"""

from __future__ import annotations

import logging
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import dataset
import sqlalchemy
from sqlalchemy import event

from ccm.db.driver import postgresql, sqlite
from ccm.db.driver.errors import storage_error
from ccm.db.driver.file_watch import FileWatch, OpenFiles
from ccm.db.driver.permits import Permits
from ccm.errors import DatabaseClosed, DatabaseDamaged, StorageDown

log = logging.getLogger(__name__)

# How long SQLite itself waits for a lock. The writer tries again after that, so that a cancelled write is let go.
BUSY_TIMEOUT_MS = 1_000
# How long a transaction waits for a connection while none is given back by a transaction that was answered (seconds).
CONNECTION_TIMEOUT = 10.0
# How long transactions are waited for at the end, and how often those that read are interrupted meanwhile (seconds).
CLOSE_TIMEOUT = 2.0
INTERRUPT_INTERVAL = 0.05
# How many rows go to SQLite before it is known that it answers.
ROWS_AT_ONCE = 50
NAMED_PARAMETER = re.compile(r"(?<![:\w]):([A-Za-z]\w*)")


@cache
def _driver_sql(sql: str, is_sqlite: bool) -> str:
    """A statement as the driver takes it: SQLite reads `:name` itself, psycopg wants `%(name)s`."""
    return sql if is_sqlite else NAMED_PARAMETER.sub(r"%(\1)s", sql.replace("%", "%%"))


class Transaction:
    """Statements that are committed together. Valid only within `Database.transaction`.

    They go to the driver's own cursor on dataset's connection: SQLAlchemy takes seven times as long for a short
    statement, and on its way through it no error is gained.
    """

    def __init__(self, database: dataset.Database, uncertain: bool, answered: Callable[[], None]) -> None:
        # Whether an earlier try of the same work may have been committed after all.
        self.uncertain = uncertain
        self._database = database
        self._answered = answered
        self._cursor = database.executable.connection.cursor()

    def _execute(self, sql: str, parameters: Mapping[str, Any]) -> None:
        self._cursor.execute(_driver_sql(sql, self._database.is_sqlite), parameters)
        self._answered()

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
        self._answered()

    def insert(self, table: str, row: Mapping[str, Any]) -> None:
        columns = ", ".join(f'"{column}"' for column in row)
        values = ", ".join(f":{column}" for column in row)
        self._execute(f"INSERT INTO {table} ({columns}) VALUES ({values})", row)

    def insert_many(
        self, table: str, columns: Sequence[str], rows: list[tuple[Any, ...]], *, known_ignored: bool = False
    ) -> None:
        """The rows in a few statements, on dataset's connection.

        Args:
            known_ignored: leave out rows whose key is there already; else they are refused.

        dataset's own insert_many goes through the keys of every row three times before it does the same, and SQLAlchemy
        through its values twice: more than the database itself takes for a row.
        """
        names = ", ".join(f'"{column}"' for column in columns)
        marks = ", ".join(["?" if self._database.is_sqlite else "%s"] * len(columns))
        end = " ON CONFLICT DO NOTHING" if known_ignored else ""
        sql = f"INSERT INTO {table} ({names}) VALUES ({marks}){end}"
        # SQLite's module lets other threads have the interpreter with each row, so that many rows may take long.
        at_once = ROWS_AT_ONCE if self._database.is_sqlite else len(rows)
        for first in range(0, len(rows), at_once or 1):
            self._database.executable.exec_driver_sql(sql, rows[first : first + at_once])
            self._answered()

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
    is one writer in a process (core/storage/writer.py); everyone else reads.

    Args:
        answer_seconds: for a service, which has to answer in time: how long the database may take for a statement.
            SQLite's bound holds for reads; what it writes is bounded by its size. None for a command, which may take
            its time, and room for temporary files.
        watch: what a Database of the same SQLite file knows about it, to be shared.
    """

    def __init__(
        self,
        url: str,
        *,
        writable: bool = False,
        pool_size: int = 20,
        answer_seconds: float | None = None,
        watch: FileWatch | None = None,
    ) -> None:
        self.url = url
        self.is_sqlite = url.startswith("sqlite")
        self.watch = watch or (FileWatch(url.removeprefix("sqlite:///")) if self.is_sqlite else None)
        self._writable = writable
        self._answer_seconds = answer_seconds
        self._permits = Permits(pool_size, CONNECTION_TIMEOUT)
        # The `time.monotonic()` of the last statement that was answered.
        self.last_answer = 0.0
        self._database = dataset.connect(
            url,
            ensure_schema=False,  # or a key of a row becomes a column
            engine_kwargs={
                "pool_size": pool_size,
                "max_overflow": 0,
                "pool_timeout": 0,  # one connection for each permit: there is always one
                "pool_pre_ping": not self.is_sqlite,
                # None: the sqlite3 module begins no transaction of its own, see _begin_sqlite.
                "connect_args": {"isolation_level": None, "factory": sqlite.Connection} if self.is_sqlite else {},
            },
            on_connect_statements=self._pragmas() if self.is_sqlite else [],
        )
        self._engine = cast("sqlalchemy.Engine", self._database.engine)
        if self.is_sqlite:
            event.listen(self._engine, "begin", self._begin_sqlite)
            event.listen(self._engine, "connect", self._sqlite_opened)
        else:
            event.listen(self._engine, "do_connect", self._connect_postgresql)

    def __str__(self) -> str:
        return sqlalchemy.make_url(self.url).render_as_string(hide_password=True)

    def _pragmas(self) -> list[str]:
        pragmas = [
            f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}",
            "PRAGMA foreign_keys = ON",
            "PRAGMA synchronous = FULL",
        ]
        if self._answer_seconds is not None:
            # Even a savepoint may need a temporary file, and agents can fill the directory of such files.
            pragmas.append("PRAGMA temp_store = MEMORY")
        return pragmas

    def _sqlite_opened(self, connection: sqlite.Connection, record: sqlalchemy.pool.ConnectionPoolEntry) -> None:
        if self._answer_seconds is not None and not self._writable:
            connection.limit_statements(self._answer_seconds * postgresql.STATEMENT_SHARE)
        if self.watch is not None:
            try:
                connection.execute("SELECT 1 FROM sqlite_master LIMIT 1")  # opens the write-ahead log
                record.info["files"] = self.watch.opened()
            except BaseException:
                connection.close()
                raise

    def _begin_sqlite(self, connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if self._writable else "BEGIN")

    def _connect_postgresql(
        self, _dialect: object, _record: object, _words: object, parameters: dict[str, Any]
    ) -> postgresql.Connection:
        return postgresql.connect(writable=self._writable, answer_seconds=self._answer_seconds, **parameters)

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
        committing = committed = False
        answered = True
        self._permits.take()
        try:
            files = self._take_connection()
            database.begin()
            self._count_answer()
            yield Transaction(database, uncertain, self._count_answer)
            committing = True
            database.commit()
            committed = True
            self._count_answer()
            if self.watch is not None and self._writable:
                # Committed into a file that is no longer there: not to be acknowledged.
                self.watch.check(files)
        except Exception as error:
            told = storage_error(error)
            if told is None:
                raise
            answered = not isinstance(told, StorageDown)
            self._release(broken=True)
            if self.watch is not None and isinstance(told, DatabaseDamaged):
                self.watch.damage = str(told)
            if self._permits.closed and isinstance(told, StorageDown):
                told = DatabaseClosed(str(told))  # interrupted, most likely
            # A COMMIT that SQLite refuses is not committed; one whose answer is lost on its way may be.
            told.may_be_committed = committed or (committing and not self.is_sqlite)
            raise told from error
        finally:
            try:
                self._release()
                if self._permits.closed:
                    self._engine.pool.dispose()  # this connection was not there to be closed
            finally:
                self._permits.give_back(answered=answered)

    def _count_answer(self) -> None:
        self.last_answer = time.monotonic()

    def _take_connection(self) -> OpenFiles:
        """Have a connection for this thread's transaction. Gives the files that it has open, if it is SQLite's.

        dataset itself would take it with a lock in hand that giving one back needs too: with none free, or a server
        that does not answer, everything would stand still.
        """
        if self.watch is not None:
            self.watch.check_path()
            if self._writable:
                self.watch.check_damage()
        connection = self._engine.connect()
        files: OpenFiles = connection.info.get("files", ())
        try:
            if self.watch is not None:
                self.watch.check(files)
        except StorageDown:
            # Given back and not closed: should the file come back, it is the one that this connection has.
            connection.close()
            raise
        with self._database.lock:
            self._database.connections[threading.get_ident()] = connection
        return files

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
            try:
                connection.close()
            except Exception as error:
                # The way to the server was lost meanwhile. What the transaction has come to is known already.
                log.debug("a connection could not be rolled back: %s", error)
                if not connection.closed:
                    connection.invalidate()
                    connection.close()

    def rows(self, sql: str, **parameters: Any) -> list[Mapping[str, Any]]:
        """What one query gives, in a transaction of its own."""
        with self.transaction() as transaction:
            return transaction.rows(sql, **parameters)

    def close(self) -> None:
        """Refuse new transactions, interrupt SQLite's reads, and close the connections. Idempotent.

        A connection that another thread still uses after CLOSE_TIMEOUT is left to that thread: closing it under a
        statement would crash the process.
        """
        self._permits.close()
        deadline = time.monotonic() + CLOSE_TIMEOUT
        while (unfinished := self._permits.wait_for_all(INTERRUPT_INTERVAL)) and time.monotonic() < deadline:
            self._interrupt()
        if unfinished:
            log.error("transactions have not ended; %d connections to the database are left open", unfinished)
        self._engine.pool.dispose()

    def _interrupt(self) -> None:
        if self.is_sqlite and not self._writable:
            with self._database.lock:  # none of these is closed meanwhile
                for connection in self._database.connections.values():
                    cast(sqlite3.Connection, connection.connection.dbapi_connection).interrupt()
