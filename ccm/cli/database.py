"""How the commands open the database: to read it beside a running service, or to write it alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ccm.db.driver import sqlite_file
from ccm.db.driver.database import Database
from ccm.db.driver.lock import ServiceLock
from ccm.db.driver.migrate import migrate, pending
from ccm.errors import DatabaseRefused
from ccm.settings.settings import Settings

# How long a command waits for another command to release the service lock (seconds).
LOCK_TIMEOUT = 10.0


def check_exists(settings: Settings) -> None:
    """Refuse to create an empty database where the operator expects one with history.

    Raises:
        DatabaseRefused: the SQLite file does not exist.
    """
    if settings.database_url is None and not settings.database_path.exists():
        raise DatabaseRefused(f"There is no database {settings.database_path}; set DATABASE_PATH or DATABASE_URL.")


@contextmanager
def open_to_read(settings: Settings) -> Iterator[Database]:
    """Open the existing database without a lock, because a service may be running on it.

    Raises:
        DatabaseRefused: it does not exist, or its schema is not up to date.
    """
    check_exists(settings)
    sqlite_file.prepare(settings.url)
    database = Database(settings.url)
    try:
        if pending(database):
            raise DatabaseRefused("The database's schema is not up to date; run flask migrate first.")
        yield database
    finally:
        database.close()


@contextmanager
def open_to_write(settings: Settings) -> Iterator[Database]:
    """Open the database under the service lock, and bring its schema up to date.

    Raises:
        DatabaseRefused: a service or another command holds the lock.
    """
    sqlite_file.prepare(settings.url)
    with ServiceLock(settings.url, LOCK_TIMEOUT):
        database = Database(settings.url, writable=True, pool_size=1)
        try:
            migrate(database)
            yield database
        finally:
            database.close()
