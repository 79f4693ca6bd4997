"""`flask export`."""

from __future__ import annotations

import os

import click

from ccm.cli.database import open_to_read
from ccm.cli.output import exit_on_refusal, write
from ccm.core.archive.exporting import export
from ccm.db import archive
from ccm.settings.settings import Settings


@click.command("export")
@click.option("--session", "session_id", metavar="ID", help="Only this session and the sessions it was forked from.")
def export_command(session_id: str | None) -> None:
    """Write sessions, runs, messages and transcripts to standard output as JSON Lines.

    The export is a snapshot of the database, also while a service is running. `flask import` reads it into another
    database. ID may also be the sdkSessionId of a run.
    """
    with exit_on_refusal():
        settings = Settings.from_env(os.environ)
        with open_to_read(settings) as database, database.transaction() as transaction:
            archive.hold_snapshot(transaction)
            for line in export(transaction, session_id):
                write(line)
            write("", flush=True)
