"""One database and its transactions.

dataset poisons a thread whose COMMIT failed, and leaves reads open as transactions. So everything goes through
`Database.transaction`, which always gives the connection back.
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
from ccm.db.driver.transaction import Transaction
from ccm.errors import DatabaseClosed, DatabaseDamaged, StorageDown

log = logging.getLogger(__name__)

# How long a transaction waits for a connection while none is given back by a transaction that was answered (seconds).
CONNECTION_TIMEOUT = 10.0
# How long transactions are waited for at the end, and how often those that read are interrupted meanwhile (seconds).
CLOSE_TIMEOUT = 2.0
INTERRUPT_INTERVAL = 0.05


class Database:
    """A pool of connections to one database.

    A `writer` begins its transactions with the write lock in hand, so that none fails half-way for want of it. There
    is one writer in a process (core/storage/writer.py); everyone else reads.

    Args:
        answer_seconds: for a service, which has to answer in time: how long the database may take for a statement.
            SQLite's bound holds for reads; what it writes is bounded by its size. None for a command, which may take
            its time, and room for temporary files.
        watch: what a Database of the same SQLite file knows about it, to be shared.

    Attributes:
        last_answer: the `time.monotonic()` of the last statement that was answered.
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
        self.last_answer = 0.0
        self._writable = writable
        self._permits = Permits(pool_size, CONNECTION_TIMEOUT)
        self._pool = ConnectionPool(url, pool_size, writable=writable, answer_seconds=answer_seconds, watch=self.watch)

    def __str__(self) -> str:
        return str(self._pool)

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._pool.dialect

    @contextmanager
    def transaction(self, uncertain: bool = False) -> Iterator[Transaction]:
        """One transaction: committed at the end, or rolled back. The connection is given back either way.

        Args:
            uncertain: an earlier try of the same work may have been committed after all.

        Raises:
            StorageDown: storage is locked, full, read-only or out of reach.
            StorageRejected: storage refuses a statement.
        """
        pool = self._pool
        committing = committed = False
        answered = True
        self._permits.take()
        try:
            files = pool.take()
            cursor = pool.begin()
            self._count_answer()
            yield Transaction(cursor, pool.dialect, uncertain, self._count_answer)
            committing = True
            pool.commit()
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
            pool.release(broken=True)
            if self.watch is not None and isinstance(told, DatabaseDamaged):
                self.watch.damage = str(told)
            if self._permits.closed and isinstance(told, StorageDown):
                told = DatabaseClosed(str(told))  # interrupted, most likely
            # A COMMIT that SQLite refuses is not committed; one whose answer is lost on its way may be.
            told.may_be_committed = committed or (committing and not self.is_sqlite)
            raise told from error
        finally:
            try:
                pool.release()
                if self._permits.closed:
                    pool.dispose()  # this connection was not there to be closed
            finally:
                self._permits.give_back(answered=answered)

    def _count_answer(self) -> None:
        self.last_answer = time.monotonic()

    def rows(self, sql: str, **parameters: Any) -> list[Mapping[str, Any]]:
        """Return all rows of one query, in a transaction of its own."""
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
            if self.is_sqlite and not self._writable:
                self._pool.interrupt()
        if unfinished:
            log.error("transactions have not ended; %d connections to the database are left open", unfinished)
        self._pool.dispose()
