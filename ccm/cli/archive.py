"""`flask export`, `flask import` and `flask prune`: recorded history is written out, read in or deleted."""

from __future__ import annotations

import os
from collections.abc import Iterator

import click

from ccm.cli.database import check_exists, open_to_read, open_to_write
from ccm.cli.output import counted, exit_on_refusal, print_error, print_line, write
from ccm.core.archive import pruning
from ccm.core.archive.exporting import export
from ccm.core.archive.importing import Importer, Report
from ccm.core.archive.local_files import LocalFiles
from ccm.core.archive.sources import open_source
from ccm.db import trees
from ccm.db.driver.database import Database
from ccm.errors import CommandRefused, StorageError
from ccm.settings.parsers import UNITS, seconds_in
from ccm.settings.settings import Settings

# The largest --older-than (seconds): 99,999 weeks, because no date is before year 1.
HIGHEST_AGE = 99_999 * UNITS["w"]


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
            for line in export(transaction, session_id):
                write(line)
            write("", flush=True)


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
        with open_source(path, print_error) as source, open_to_write(settings) as database:
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


@click.command("prune")
@click.option("--older-than", metavar="AGE", help="Trees without activity for this long: 12h, 90d, 8w.")
@click.option("--session", "session_id", metavar="ID", help="The whole tree of this session.")
@click.option("--dry-run", is_flag=True, help="Only print what would be deleted.")
def prune_command(older_than: str | None, session_id: str | None, dry_run: bool) -> None:
    """Delete recorded history for good, in whole trees of sessions.

    A tree is a session that was not forked, with all sessions that descend from it by forks. Any of them names the
    tree. Its runs, messages and transcripts are deleted, and Claude Code's own transcript files of these runs; the
    files that the agents worked on stay. The service must not be running, except for --dry-run.
    """
    if (older_than is None) == (session_id is None):
        raise click.UsageError("Give one of --older-than and --session.")
    age = None if older_than is None else _age(older_than)
    with exit_on_refusal():
        settings = Settings.from_env(os.environ)
        check_exists(settings)
        with open_to_read(settings) if dry_run else open_to_write(settings) as database:
            deleted = False
            for candidate in _candidates(database, session_id, age):
                if candidate.tree.not_ended:
                    print_line(f"Left alone: {pruning.why_kept(candidate.tree)}")
                    continue
                if not dry_run:
                    pruning.delete(database, candidate)
                deleted = True
                _print_tree(candidate, "Would delete" if dry_run else "Deleted")
            if not deleted:
                print_line("Nothing to delete.")
            if not dry_run:
                _release_space(database, deleted)


def _candidates(database: Database, session_id: str | None, age: int | None) -> Iterator[pruning.Candidate]:
    files = LocalFiles(os.environ)
    if age is not None:
        yield from pruning.trees_older_than(database, age, files)
    elif session_id is not None:
        yield pruning.tree_of(database, session_id, files)


def _release_space(database: Database, deleted: bool) -> None:
    """Remove the bytes of deleted rows from the database's files."""
    try:
        trees.delete_unused_texts(database)
        trees.clear(database.url, deleted)
    except StorageError as error:
        raise CommandRefused(
            f"The deleted rows still have their bytes in the database's files: {error}. Once that is resolved, run "
            "flask prune --older-than with any age: it clears them, even if it finds nothing more to delete."
        ) from None


def _age(text: str) -> int:
    """Return an age in seconds."""
    # No minutes, which may be read as months, and no bare numbers, because a deletion cannot be undone.
    seconds = seconds_in(text, ("h", "d", "w"))
    if seconds is None or not 0 < seconds <= HIGHEST_AGE:
        raise click.BadParameter(
            "must be a number of hours, days or weeks, such as 12h, 90d or 8w.", param_hint="--older-than"
        )
    return seconds


def _print_tree(candidate: pruning.Candidate, verb: str) -> None:
    tree = candidate.tree
    print_line(
        f"{verb} the tree of session {tree.root}: {counted(len(tree.sessions), 'session')}, "
        f"{counted(tree.runs, 'run')}, {counted(tree.messages, 'message')} ({counted(tree.message_bytes, 'byte')}), "
        f"{counted(tree.transcripts, 'transcript')} and {counted(candidate.file_count, 'file')} of Claude Code; "
        f"latest activity {tree.last_run_at}."
    )
    for session_id in tree.sessions[1:]:
        print_line(f"  with session {session_id}")
    if tree.transcripts and not candidate.file_count:
        # Run by another user or without the service's environment, the command looks in the wrong place.
        searched = ", ".join(map(str, candidate.directories))
        print_line(f"  no file of Claude Code was found in {searched} (CLAUDE_CONFIG_DIR, or .claude in HOME)")
