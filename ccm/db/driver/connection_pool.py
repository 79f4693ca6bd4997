"""The connections of one database, held by dataset: one for each thread that has a transaction.

This is the only file that uses dataset and SQLAlchemy's engine. It relies on undocumented attributes of dataset:
`connections`, the connection of each thread by the thread's id; `lock`, which guards them; and `local.tx`, the
transactions that a thread has begun. tests/contracts/test_dataset.py fails when an upgrade changes any of them.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from contextlib import suppress
from functools import partial
from typing import Any, cast

import dataset
import sqlalchemy
from sqlalchemy import event

from ccm.db.driver import sqlite
from ccm.db.driver.file_watch import FileWatch, OpenFiles
from ccm.errors import StorageDown

log = logging.getLogger(__name__)

# The share of `answer_seconds` that a statement may take: it must time out before the connection does.
STATEMENT_SHARE = 0.8


class ConnectionPool:
    """Connections that are opened when needed and kept for later transactions.

    dataset keeps a connection for each thread id, even after the thread has died, and leaves reads open as
    transactions. So each transaction gets a connection with `take` and returns it with `release`.

    Args:
        size: the maximum number of connections. `take` fails at once if none is free.
        writable: transactions begin by taking the write lock.
        answer_seconds: how long the database may take for a statement; None for no limit.
        watch: the watch of the SQLite file; None for PostgreSQL.
    """

    def __init__(
        self, url: str, size: int, *, writable: bool, answer_seconds: float | None, watch: FileWatch | None
    ) -> None:
        is_sqlite = watch is not None
        self._writable = writable
        self._statement_seconds = None if answer_seconds is None else answer_seconds * STATEMENT_SHARE
        self._watch = watch
        self._dataset = dataset.connect(
            url,
            ensure_schema=False,  # otherwise unknown keys of a row become columns
            engine_kwargs={
                "pool_size": size,
                "max_overflow": 0,
                "pool_timeout": 0,  # never needed: there is one connection for each permit
                "pool_use_lifo": True,  # the connection that was used last has its pages in memory
                "pool_pre_ping": not is_sqlite,
                # None keeps the sqlite3 module from beginning transactions itself; _begin_sqlite does.
                "connect_args": {"isolation_level": None, "factory": sqlite.Connection} if is_sqlite else {},
            },
            on_connect_statements=sqlite.pragmas(service=answer_seconds is not None) if is_sqlite else [],
        )
        self._engine = cast("sqlalchemy.Engine", self._dataset.engine)
        if is_sqlite:
            event.listen(self._engine, "begin", self._begin_sqlite)
            event.listen(self._engine, "connect", self._sqlite_opened)
        else:
            from ccm.db.driver import postgresql  # noqa: PLC0415  # imported for PostgreSQL only

            connect = partial(
                postgresql.connect,
                writable=writable,
                answer_seconds=answer_seconds,
                statement_seconds=self._statement_seconds,
            )
            event.listen(self._engine, "do_connect", lambda _dialect, _record, _words, given: connect(**given))

    def __str__(self) -> str:
        return self._engine.url.render_as_string(hide_password=True)

    def _sqlite_opened(self, connection: sqlite.Connection, record: sqlalchemy.pool.ConnectionPoolEntry) -> None:
        if self._statement_seconds is not None and not self._writable:
            connection.limit_statements(self._statement_seconds)
        if self._watch is not None:
            try:
                connection.execute("SELECT 1 FROM sqlite_master LIMIT 1")  # opens the write-ahead log
                record.info["files"] = self._watch.opened()
            except BaseException:
                connection.close()
                raise

    def _begin_sqlite(self, connection: sqlalchemy.Connection) -> None:
        # Not through SQLAlchemy, which takes as long for this statement as for a short transaction's others.
        driver_connection = cast(sqlite3.Connection, connection.connection.dbapi_connection)
        driver_connection.execute("BEGIN IMMEDIATE" if self._writable else "BEGIN")

    def take(self) -> OpenFiles:
        """Get a connection for this thread's transaction. Return the files that it has open, for SQLite.

        dataset itself would connect while holding the lock that `release` needs too: if no connection were free, or the
        server did not answer, all threads would block.

        Raises:
            StorageDown: the SQLite file is gone, or damage was found in it. Driver errors pass through unchanged.
        """
        if self._watch is not None:
            self._watch.check_path()
            if self._writable:
                self._watch.check_damage()
        connection = self._engine.connect()
        files: OpenFiles = connection.info.get("files", ())
        try:
            if self._watch is not None:
                self._watch.check(files)
        except StorageDown:
            # Return the connection to the pool: if the file comes back, this connection still has it open.
            connection.close()
            raise
        with self._dataset.lock:
            self._dataset.connections[threading.get_ident()] = connection
        return files

    def begin(self) -> Any:
        """Begin this thread's transaction and return the driver's cursor."""
        self._dataset.begin()
        return self._dataset.executable.connection.cursor()

    def commit(self) -> None:
        """Commit this thread's transaction."""
        self._dataset.commit()

    def release(self, broken: bool = False) -> None:
        """Return this thread's connection, rolled back unless committed. Close it if it is broken.

        dataset does neither if COMMIT itself fails, because it forgets the transaction before it rolls back: the thread
        would keep the connection, and SQLite the open transaction.
        """
        self._dataset.local.tx = []
        with self._dataset.lock:
            connection = self._dataset.connections.pop(threading.get_ident(), None)
        if connection is None:
            return
        if broken:
            if self._watch is not None:
                # Release SQLite's write lock. A closed connection stays alive, with its transaction, as long as a
                # cursor with a failed statement exists, and the error's traceback keeps that cursor until it is
                # garbage-collected.
                with suppress(sqlite3.Error):
                    cast(sqlite3.Connection, connection.connection.dbapi_connection).rollback()
            connection.invalidate()
        try:
            connection.close()
        except Exception as error:
            # The connection was lost meanwhile. The outcome of the transaction is known already.
            log.debug("cannot roll back a connection: %s", error, extra={"event": "rollback_failed"})
            if not connection.closed:
                connection.invalidate()
                connection.close()

    def interrupt(self) -> None:
        """Interrupt all SQLite statements in progress."""
        with self._dataset.lock:  # so that no connection is closed meanwhile
            for connection in self._dataset.connections.values():
                cast(sqlite3.Connection, connection.connection.dbapi_connection).interrupt()

    def dispose(self) -> None:
        """Close the idle connections."""
        self._engine.pool.dispose()
