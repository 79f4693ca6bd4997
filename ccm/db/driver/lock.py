"""A lock that allows one service per database. The kernel or PostgreSQL releases it when its holder dies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

from ccm.db.driver.sqlite_file import make_private, sqlite_file_path
from ccm.errors import DatabaseRefused

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


@contextmanager
def service_lock(url: str, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock of one database, as a service or a command does while it writes.

    Args:
        patience: how long to wait for another holder to finish (seconds).

    Raises:
        DatabaseRefused: another service or command holds it, or it cannot be accessed.
    """
    path = sqlite_file_path(url)
    deadline = time.monotonic() + patience
    while (release := _take_advisory_lock(url) if path is None else _take_file_lock(path)) is None:
        if time.monotonic() >= deadline:
            raise DatabaseRefused(TAKEN)
        time.sleep(RETRY_INTERVAL)
    try:
        yield
    finally:
        release()


def _take_file_lock(database: Path) -> Callable[[], None] | None:
    """Lock a file beside the SQLite database. It is never removed, because a removed file can be locked twice.

    Returns: the function that releases the lock; None if another process holds it.
    """
    path = database.with_name(database.name + ".lock")
    try:
        make_private(path)
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise DatabaseRefused(f"The lock file {path} cannot be written: {error.strerror}.") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return partial(os.close, file)


def _take_advisory_lock(url: str) -> Callable[[], None] | None:
    """Take a lock that PostgreSQL holds as long as the connection that took it.

    It lets services and commands wait for one another. Even if this connection is lost, a second service cannot write,
    because each writing connection takes the right to write (db/driver/postgresql.py).

    Returns: the function that releases the lock; None if another connection holds it.
    """
    # Imported here, because a start on SQLite does not need psycopg.
    import psycopg  # noqa: PLC0415

    from ccm.db.driver.postgresql import NETWORK, SERVER_KEEPALIVES  # noqa: PLC0415

    try:
        with ExitStack() as undo:
            connection = undo.enter_context(closing(psycopg.connect(url, autocommit=True, **NETWORK)))
            for statement in SERVER_KEEPALIVES:
                connection.execute(statement)
            row = connection.execute("SELECT pg_try_advisory_lock(%s)", [ADVISORY_LOCK]).fetchone()
            return undo.pop_all().close if row is not None and row[0] else None
    except psycopg.ProgrammingError:
        # psycopg's own message would show the URL with its password.
        raise DatabaseRefused(BAD_URL) from None
    except psycopg.Error as error:
        raise DatabaseRefused(f"PostgreSQL cannot be reached: {str(error).strip().splitlines()[0]}") from None
