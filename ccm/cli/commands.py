"""The commands beside `flask run`: `flask migrate` and `flask demo`; cli/archive.py has the others."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from pathlib import Path

import click
from flask import Flask

from ccm.cli import archive
from ccm.db.driver import sqlite_file
from ccm.db.driver.database import Database
from ccm.db.driver.lock import ServiceLock
from ccm.db.driver.migrate import migrate, pending, read_migrations
from ccm.demo.tour import Tour
from ccm.errors import BadSetting, CommandRefused, StartRefused
from ccm.settings.settings import Settings
from ccm.settings.token_file import NAME, add_token, new_token

# Seconds that a migration waits for another one to finish.
MIGRATION_LOCK_TIMEOUT = 10.0


def register(app: Flask) -> None:
    app.cli.add_command(migrate_command)
    app.cli.add_command(demo_command)
    app.cli.add_command(token_command)
    for command in archive.COMMANDS:
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
                ServiceLock(settings.url, MIGRATION_LOCK_TIMEOUT),
                closing(Database(settings.url, writable=True, pool_size=1)) as database,
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

    The real Claude Code runs against a stand-in of the Messages API, on a free port (with --serve on PORT, or else
    3000), with a temporary database. No other setting of the environment is heeded.
    """
    try:
        sys.exit(Tour(click.echo).run(serve))
    except CommandRefused as refusal:
        click.echo(str(refusal), err=True)
        sys.exit(refusal.exit_code)


@click.command("token")
@click.argument("name")
def token_command(name: str) -> None:
    """Make a token for a client, and add it to the file that CCM_API_TOKEN_FILE names if it is set."""
    if not NAME.fullmatch(name):
        raise click.BadParameter("must have 1 to 64 letters, digits, '.', '_' and '-'", param_hint="NAME")
    file = os.environ.get("CCM_API_TOKEN_FILE")
    token = new_token()
    try:
        if file:
            add_token(Path(file), name, token)
    except (BadSetting, OSError) as error:
        click.echo(str(error), err=True)
        sys.exit(BadSetting.exit_code)
    click.echo(f"{name}:{token}")
    where = (
        f"It is in {file} now." if file else "Put this line into a file of mode 0600 and name it in CCM_API_TOKEN_FILE."
    )
    click.echo(f"{where} Clients send 'Authorization: Bearer' and what stands after the colon.", err=True)
