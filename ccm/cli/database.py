"""Opens the database for the commands: to read beside a service, or to write while none runs; `flask migrate`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager

import click

from ccm.cli.output import exit_on_refusal, print_line
from ccm.db.driver import sqlite_file
from ccm.db.driver.database import Database
from ccm.db.driver.lock import service_lock
from ccm.db.driver.migrate import Migration, migrate, pending, read_migrations
from ccm.errors import DatabaseRefused
from ccm.settings.settings import Settings

# How long a command waits for another command to release the service lock (seconds).
LOCK_TIMEOUT = 10.0


def check_exists(settings: Settings) -> None:
    """Refuse to create an empty database where the operator expects one with history.

    Raises:
        DatabaseRefused: the SQLite file does not exist.
    """
    if not _exists(settings):
        raise DatabaseRefused(f"There is no database {settings.database_path}; set DATABASE_PATH or DATABASE_URL.")


def _exists(settings: Settings) -> bool:
    return settings.database_url is not None or settings.database_path.exists()


@contextmanager
def open_to_read(settings: Settings) -> Iterator[Database]:
    """Open the existing database without a lock, because a service may be running on it.

    Raises:
        DatabaseRefused: it does not exist, or its schema is not up to date.
    """
    check_exists(settings)
    sqlite_file.prepare(settings.url)
    with closing(Database(settings.url)) as database:
        if pending(database):
            raise DatabaseRefused("The database's schema is not up to date; run flask migrate first.")
        yield database


@contextmanager
def open_to_write(settings: Settings) -> Iterator[Database]:
    """Open the database under the service lock, and bring its schema up to date.

    Raises:
        DatabaseRefused: a service or another command holds the lock.
    """
    sqlite_file.prepare(settings.url)
    with _open_locked(settings) as database:
        migrate(database)
        yield database


@contextmanager
def _open_locked(settings: Settings) -> Iterator[Database]:
    with (
        service_lock(settings.url, LOCK_TIMEOUT),
        closing(Database(settings.url, writable=True, pool_size=1)) as database,
    ):
        yield database


@click.command("migrate")
@click.option("--status", is_flag=True, help="Only print which migrations are applied and which are missing.")
def migrate_command(status: bool) -> None:
    """Bring the database's schema up to date.

    Safe to run twice, and by two processes at once. The service does the same when it starts.
    """
    with exit_on_refusal():
        settings = Settings.from_env(os.environ)
        if status:
            _print_status(settings)
            return
        if _missing(settings):
            with _open_locked(settings) as database:
                for migration in migrate(database):
                    print_line(f"applied  {migration}")
        print_line("The schema is up to date.")


def _missing(settings: Settings) -> list[Migration]:
    sqlite_file.prepare(settings.url)
    with closing(Database(settings.url)) as database:
        return pending(database)


def _print_status(settings: Settings) -> None:
    """Print each migration with its state. Change nothing, and create no database file."""
    known = read_migrations("sqlite" if settings.database_url is None else "postgresql")
    missing = _missing(settings) if _exists(settings) else known
    for migration in known:
        print_line(f"{'missing' if migration in missing else 'applied'}  {migration}")
