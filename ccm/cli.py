"""The commands beside `flask run`: `flask migrate` and `flask demo`; cli_archive.py has the others."""

from __future__ import annotations

import os
import sys
from contextlib import closing

import click
from flask import Flask

from ccm import cli_archive
from ccm.db import sqlite_file
from ccm.db.database import Database
from ccm.db.lock import ServiceLock
from ccm.db.migrate import migrate, pending, read_migrations
from ccm.demo.tour import Tour
from ccm.errors import StartRefused
from ccm.settings import Settings

# Seconds that a migration waits for another one to finish.
MIGRATION_PATIENCE = 10.0


def register(app: Flask) -> None:
    app.cli.add_command(migrate_command)
    app.cli.add_command(demo_command)
    for command in cli_archive.COMMANDS:
        app.cli.add_command(command)


@click.command("migrate")
@click.option("--status", is_flag=True, help="Only say what is applied and what is missing.")
def migrate_command(status: bool) -> None:
    """Bring the database's schema up to date.

    Safe to run twice, and by two at once. The service does the same when it starts.
    """
    try:
        settings = Settings.from_env(os.environ)
        if status:
            _show_status(settings)
            return
        sqlite_file.prepare(settings.url)
        with closing(Database(settings.url)) as database:
            missing = pending(database)
        if missing:
            with (
                ServiceLock(settings.url, MIGRATION_PATIENCE),
                closing(Database(settings.url, writer=True, pool_size=1)) as database,
            ):
                for migration in migrate(database):
                    click.echo(f"applied  {migration}")
        click.echo("The schema is up to date.")
    except StartRefused as refusal:
        click.echo(str(refusal), err=True)
        sys.exit(refusal.exit_code)


def _show_status(settings: Settings) -> None:
    """Changes nothing, and makes no file."""
    dialect = "sqlite" if settings.database_url is None else "postgresql"
    missing = read_migrations(dialect)
    if settings.database_url is not None or settings.database_path.exists():
        sqlite_file.prepare(settings.url)
        with closing(Database(settings.url)) as database:
            missing = pending(database)
    for migration in read_migrations(dialect):
        click.echo(f"{'missing' if migration in missing else 'applied'}  {migration}")


@click.command("demo")
@click.option("--serve", is_flag=True, help="Leave it running afterwards, for curl.")
def demo_command(serve: bool) -> None:
    """See the whole story without a login: start, resume and fork real runs.

    The real Claude Code runs against a stand-in of the Messages API, on free ports, with a temporary database.
    """
    sys.exit(Tour(click.echo).run(serve))
