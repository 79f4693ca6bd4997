"""One database and its transactions.

dataset leaves a thread unusable after a failed COMMIT, and leaves reads open as transactions. So everything goes
through `Database.transaction`, which always returns the connection.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ccm.db.driver.connection_pool import ConnectionPool
from ccm.db.driver.errors import storage_error
from ccm.db.driver.file_watch import FileWatch
from ccm.db.driver.permits import Permits
from ccm.db.driver.sqlite_file import sqlite_file_path
from ccm.db.driver.transaction import Transaction
from ccm.errors import DatabaseClosed, DatabaseDamaged, StorageDown

log = logging.getLogger(__name__)

# How long a transaction waits for a connection while no answered transaction returns one (seconds).
CONNECTION_TIMEOUT = 10.0
# How long `close` waits for transactions, and how often it interrupts reads meanwhile (seconds).
CLOSE_TIMEOUT = 2.0
INTERRUPT_INTERVAL = 0.05


class Database:
    """A pool of connections to one database.

    A writable one begins each transaction by taking the write lock, so that none fails halfway for lack of it. A
    process has one writer (core/storage/writer.py); everything else reads.

    Args:
        answer_seconds: how long the database may take for a statement; for a service, which must answer in time. On
            SQLite it limits reads only, because the size of a batch limits writes. None for a command, which may take
            any time and may create temporary files.
        watch: the watch of another Database on the same SQLite file, to share.

    Attributes:
        dialect: `sqlite` or `postgresql`.
        last_answer: the `time.monotonic()` of the last answered statement.
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
        path = sqlite_file_path(url)
        self.is_sqlite = path is not None
        self.dialect = "postgresql" if path is None else "sqlite"
        self.watch = watch or (None if path is None else FileWatch(str(path)))
        self.last_answer = 0.0
        self._writable = writable
        self._permits = Permits(pool_size, CONNECTION_TIMEOUT)
        self._pool = ConnectionPool(url, pool_size, writable=writable, answer_seconds=answer_seconds, watch=self.watch)

    def __str__(self) -> str:
        return str(self._pool)

    @contextmanager
    def transaction(self, uncertain: bool = False) -> Iterator[Transaction]:
        """Begin a transaction. Commit it at the end, or roll it back on an exception; return the connection either way.

        Args:
            uncertain: an earlier attempt at the same work may have been committed.

        Raises:
            StorageDown: the database is locked, full, read-only or unreachable.
            StorageRejected: the database refuses a statement.
        """
        pool = self._pool
        committing = committed = False
        answered = True
        self._permits.take()
        try:
            files = pool.take()
            cursor = pool.begin()
            self._count_answer()
            yield Transaction(cursor, self.dialect, uncertain, self._count_answer)
            committing = True
            pool.commit()
            committed = True
            self._count_answer()
            if self.watch is not None and self._writable:
                # A commit into a file that has been removed must not be acknowledged.
                self.watch.check(files)
        except Exception as error:
            fault = storage_error(error)
            if fault is None:
                raise
            answered = not isinstance(fault, StorageDown)
            pool.release(broken=True)
            if self.watch is not None and isinstance(fault, DatabaseDamaged):
                self.watch.damage = str(fault)
            if self._permits.closed and isinstance(fault, StorageDown):
                fault = DatabaseClosed(str(fault))  # `close` has most likely interrupted it
            # A COMMIT that SQLite refuses is not committed. A COMMIT whose answer was lost may be.
            fault.may_be_committed = committed or (committing and not self.is_sqlite)
            raise fault from error
        finally:
            try:
                pool.release()
                if self._permits.closed:
                    pool.dispose()  # `close` could not close this connection
            finally:
                self._permits.release(answered=answered)

    def _count_answer(self) -> None:
        self.last_answer = time.monotonic()

    def rows(self, sql: str, **parameters: Any) -> list[Mapping[str, Any]]:
        """Return all rows of a query, in a transaction of its own."""
        with self.transaction() as transaction:
            return transaction.rows(sql, **parameters)

    def close(self) -> None:
        """Refuse new transactions, interrupt SQLite's reads, and close the connections. Idempotent.

        A connection that another thread still uses after CLOSE_TIMEOUT stays open: closing it during a statement would
        crash the process.
        """
        self._permits.close()
        deadline = time.monotonic() + CLOSE_TIMEOUT
        while (unfinished := self._permits.wait_for_all(INTERRUPT_INTERVAL)) and time.monotonic() < deadline:
            if self.is_sqlite and not self._writable:
                self._pool.interrupt()
        if unfinished:
            log.error(
                "transactions have not ended; %d connections to the database are left open",
                unfinished,
                extra={"event": "connections_left_open"},
            )
        self._pool.dispose()
