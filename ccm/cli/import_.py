"""`flask import`."""

from __future__ import annotations

import os

import click

from ccm.cli.database import open_to_write
from ccm.cli.output import counted, exit_on_refusal, print_error, print_line
from ccm.core.archive.importing import Importer, Report
from ccm.core.archive.local_files import LocalFiles
from ccm.core.archive.sources import open_source
from ccm.settings.settings import Settings


@click.command("import")
@click.argument("path", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
def import_command(path: str) -> None:
    """Import the history in PATH: the output of `flask export` (- for standard input), or the SQLite file of the
    original service, which ran on Bun.

    Runs that are in the database already stay as they are, so an interrupted import can be repeated. The service must
    not be running.
    """
    with exit_on_refusal():
        settings = Settings.from_env(os.environ)
        files = LocalFiles(os.environ)
        with (
            open_source(path, files.has_transcript, print_error) as source,
            open_to_write(settings) as database,
        ):
            importer = Importer(database, files.has_transcript, print_error)
            try:
                importer.run(source)
            finally:
                _print_report(importer.report)


def _print_report(report: Report) -> None:
    print_line(
        f"Imported {counted(report.sessions, 'session')}, {counted(report.runs, 'run')}, "
        f"{counted(report.messages, 'message')} and {counted(report.transcripts, 'transcript')}; here already: "
        f"{counted(report.already_there, 'run')}."
    )
    if report.interrupted:
        print_line(f"Had not ended and became error / INTERRUPTED: {counted(report.interrupted, 'run')}.")
    if report.runs:
        print_line(f"Can be resumed or forked, because their transcript is here: {counted(report.resumable, 'run')}.")
