"""One service for each database: a lock that the operating system or PostgreSQL drops when its holder dies."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from ccm.db.driver.sqlite_file import make_private
from ccm.errors import DatabaseRefused

if TYPE_CHECKING:
    import psycopg

# Any number that nobody else of this PostgreSQL database uses: "ccmanage" in ASCII.
ADVISORY_LOCK = int.from_bytes(b"ccmanage")
RETRY_INTERVAL = 0.05
TAKEN = (
    "Another CC Manager is at work on this database; stop it first, or give this one a database of its own "
    "(DATABASE_PATH or DATABASE_URL)."
)

BAD_URL = (
    "DATABASE_URL cannot be read: it is to be postgresql://user:password@host/name, with what is special in the "
    "password written as in %40."
)


class _Lock(Protocol):
    """One try takes it or does not; `drop` may be called in any state."""

    def take(self) -> bool: ...
    def drop(self) -> None: ...


class _FileLock:
    """A lock file beside the SQLite database. It is never removed: a removed one can be locked twice."""

    def __init__(self, database: Path) -> None:
        self._path = database.with_name(database.name + ".lock")
        self._file: int | None = None

    def take(self) -> bool:
        try:
            make_private(self._path)
            file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise DatabaseRefused(f"The lock file {self._path} cannot be written: {error.strerror}.") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        self._file = file
        return True

    def drop(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class _AdvisoryLock:
    """A lock that lives as long as its connection to PostgreSQL.

    It has services and commands take turns, and wait for one another. What keeps a second one from writing, also when
    this connection is lost, is the right to write that each writing connection takes (db/driver/postgresql.py).
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: psycopg.Connection[tuple[bool]] | None = None

    def take(self) -> bool:
        # Not at the top: a start on SQLite has no use for psycopg.
        import psycopg  # noqa: PLC0415

        from ccm.db.driver.postgresql import NETWORK, SERVER_KEEPALIVES  # noqa: PLC0415

        try:
            self._connection = psycopg.connect(self._url, autocommit=True, **NETWORK)
            for statement in SERVER_KEEPALIVES:
                self._connection.execute(statement)
            row = self._connection.execute("SELECT pg_try_advisory_lock(%s)", [ADVISORY_LOCK]).fetchone()
        except psycopg.ProgrammingError:
            # Its words show the URL, and the password in it.
            raise DatabaseRefused(BAD_URL) from None
        except psycopg.Error as error:
            self.drop()
            raise DatabaseRefused(f"PostgreSQL cannot be reached: {str(error).strip().splitlines()[0]}") from None
        if row is None or not row[0]:
            self.drop()
            return False
        return True

    def drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class ServiceLock:
    """The right to write to a database.

    Args:
        url: the database.
        patience: seconds to wait for another holder to finish.
    """

    def __init__(self, url: str, patience: float = 0.0) -> None:
        self._patience = patience
        self._lock: _Lock
        if url.startswith("sqlite"):
            self._lock = _FileLock(Path(url.removeprefix("sqlite:///")))
        else:
            self._lock = _AdvisoryLock(url)

    def acquire(self) -> Self:
        """
        Raises:
            DatabaseRefused: another service has the database, or the lock cannot be asked for.
        """
        deadline = time.monotonic() + self._patience
        while not self._lock.take():
            if time.monotonic() >= deadline:
                raise DatabaseRefused(TAKEN)
            time.sleep(RETRY_INTERVAL)
        return self

    def release(self) -> None:
        self._lock.drop()

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
