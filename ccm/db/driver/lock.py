"""A lock that allows one service per database. The kernel or PostgreSQL releases it when its holder dies."""

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

# An arbitrary number that no other program should use in this PostgreSQL database: "ccmanage" in ASCII.
ADVISORY_LOCK = int.from_bytes(b"ccmanage")
# How often the lock is retried (seconds).
RETRY_INTERVAL = 0.05
TAKEN = (
    "Another CC Manager is at work on this database; stop it first, or give this one a database of its own "
    "(DATABASE_PATH or DATABASE_URL)."
)

BAD_URL = (
    "DATABASE_URL cannot be read. Write it as postgresql://user:password@host/name, with special characters of the "
    "password percent-encoded (%40 for @)."
)


class _Lock(Protocol):
    """`take` makes one attempt and returns whether it succeeded; `drop` may be called in any state."""

    def take(self) -> bool: ...
    def drop(self) -> None: ...


class _FileLock:
    """A lock file beside the SQLite database. It is never removed, because a removed file can be locked twice."""

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
    """A lock that PostgreSQL holds as long as the connection that took it.

    It lets services and commands wait for one another. Even if this connection is lost, a second service cannot write,
    because each writing connection takes the right to write (db/driver/postgresql.py).
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: psycopg.Connection[tuple[bool]] | None = None

    def take(self) -> bool:
        # Imported here, because a start on SQLite does not need psycopg.
        import psycopg  # noqa: PLC0415

        from ccm.db.driver.postgresql import NETWORK, SERVER_KEEPALIVES  # noqa: PLC0415

        try:
            self._connection = psycopg.connect(self._url, autocommit=True, **NETWORK)
            for statement in SERVER_KEEPALIVES:
                self._connection.execute(statement)
            row = self._connection.execute("SELECT pg_try_advisory_lock(%s)", [ADVISORY_LOCK]).fetchone()
        except psycopg.ProgrammingError:
            # psycopg's own message would show the URL with its password.
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
    """The lock of one database, which a service or a command holds while it writes.

    Args:
        patience: how long to wait for another holder to finish (seconds).
    """

    def __init__(self, url: str, patience: float = 0.0) -> None:
        self._patience = patience
        self._lock: _Lock
        if url.startswith("sqlite"):
            self._lock = _FileLock(Path(url.removeprefix("sqlite:///")))
        else:
            self._lock = _AdvisoryLock(url)

    def acquire(self) -> Self:
        """Take the lock.

        Raises:
            DatabaseRefused: another service or command holds it, or it cannot be accessed.
        """
        deadline = time.monotonic() + self._patience
        while not self._lock.take():
            if time.monotonic() >= deadline:
                raise DatabaseRefused(TAKEN)
            time.sleep(RETRY_INTERVAL)
        return self

    def release(self) -> None:
        """Release the lock if it is held."""
        self._lock.drop()

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
