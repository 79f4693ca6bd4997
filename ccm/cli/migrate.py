"""`flask migrate`."""

from __future__ import annotations

import os
from contextlib import closing

import click

from ccm.cli.database import LOCK_TIMEOUT
from ccm.cli.output import exit_on_refusal, print_line
from ccm.db.driver import sqlite_file
from ccm.db.driver.database import Database
from ccm.db.driver.lock import ServiceLock
from ccm.db.driver.migrate import migrate, pending, read_migrations
from ccm.settings.settings import Settings


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
        sqlite_file.prepare(settings.url)
        with closing(Database(settings.url)) as database:
            missing = pending(database)
        if missing:
            with (
                ServiceLock(settings.url, LOCK_TIMEOUT),
                closing(Database(settings.url, writable=True, pool_size=1)) as database,
            ):
                for migration in migrate(database):
                    print_line(f"applied  {migration}")
        print_line("The schema is up to date.")


def _print_status(settings: Settings) -> None:
    """Print each migration with its state. Change nothing, and create no database file."""
    dialect = "sqlite" if settings.database_url is None else "postgresql"
    missing = read_migrations(dialect)
    if settings.database_url is not None or settings.database_path.exists():
        sqlite_file.prepare(settings.url)
        with closing(Database(settings.url)) as database:
            missing = pending(database)
    for migration in read_migrations(dialect):
        print_line(f"{'missing' if migration in missing else 'applied'}  {migration}")
