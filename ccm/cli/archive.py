"""The commands for what was recorded: `flask export`, `flask import` and `flask prune`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from ccm.core.archive import pruning
from ccm.core.archive.exporting import export
from ccm.core.archive.importing import Importer, Report
from ccm.core.archive.local_files import LocalFiles
from ccm.core.archive.sources import open_source
from ccm.db import archive
from ccm.db.driver import sqlite_file
from ccm.db.driver.database import Database
from ccm.db.driver.lock import ServiceLock
from ccm.db.driver.migrate import migrate, pending
from ccm.errors import CommandRefused, DatabaseRefused, NotFound, StartRefused, StorageError
from ccm.settings.parsers import UNITS, seconds_in
from ccm.settings.settings import Settings

# Seconds to wait for another command to finish.
LOCK_TIMEOUT = 10.0
# Of --older-than, in seconds: 99,999 weeks, for dates have no year before 1.
HIGHEST_AGE = 99_999 * UNITS["w"]


@click.command("export")
@click.option("--session", "session_id", metavar="ID", help="Only this session, with all that it was forked from.")
def export_command(session_id: str | None) -> None:
    """Write sessions, runs, messages and transcripts to standard output as JSON Lines.

    It reads one moment of the database, also beside a running service. `flask import` takes it in elsewhere. ID may
    also be the sdkSessionId of a run.
    """
    with _refusals_told():
        settings = Settings.from_env(os.environ)
        with _reading(settings) as database, database.transaction() as transaction:
            archive.hold_snapshot(transaction)
            for line in export(transaction, session_id):
                _write(line)
            _write("", flush=True)


@click.command("import")
@click.argument("path", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
def import_command(path: str) -> None:
    """Take in the history in PATH: what `flask export` wrote (- for standard input), or the SQLite file of the original
    service, which ran on Bun.

    What is here already stays as it is, so an import that was interrupted can be run again. The service must not be
    running.
    """
    with _refusals_told():
        settings = Settings.from_env(os.environ)
        files = LocalFiles(os.environ)
        with (
            open_source(path, files.has_transcript, _warn) as source,
            _writing(settings) as database,
        ):
            importer = Importer(database, files.has_transcript, _warn)
            try:
                importer.take(source)
            finally:
                _tell_report(importer.report)


@click.command("prune")
@click.option("--older-than", metavar="AGE", help="Trees without activity for so long: 12h, 90d, 8w.")
@click.option("--session", "session_id", metavar="ID", help="The whole tree that this session is in.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
def prune_command(older_than: str | None, session_id: str | None, dry_run: bool) -> None:
    """Delete what was recorded, for good: whole trees of sessions.

    A tree is a session that was not forked, with all sessions that were forked from it, and theirs. Any of them names
    the tree. Its runs, messages and transcripts go, and Claude Code's own transcript files of these runs; the files
    that the agents worked on stay. The service must not be running, except for --dry-run.
    """
    if (older_than is None) == (session_id is None):
        raise click.UsageError("Give one of --older-than and --session.")
    age = None if older_than is None else _age(older_than)
    with _refusals_told():
        settings = Settings.from_env(os.environ)
        _check_there(settings)
        with _reading(settings) if dry_run else _writing(settings) as database:
            deleted = False
            for candidate in _candidates(database, session_id, age):
                if candidate.tree.unfinished:
                    _say(f"Left alone: {pruning.unfinished(candidate.tree)}")
                    continue
                if not dry_run:
                    pruning.delete(database, candidate)
                deleted = True
                _tell_tree(candidate, "Would delete" if dry_run else "Deleted")
            if not deleted:
                _say("Nothing to delete.")
            if not dry_run:
                _clear(database, deleted)


def _candidates(database: Database, session_id: str | None, age: int | None) -> Iterator[pruning.Candidate]:
    files = LocalFiles(os.environ)
    if age is not None:
        yield from pruning.trees_older_than(database, age, files)
    elif session_id is not None:
        with database.transaction() as transaction:
            candidate = pruning.tree_of(transaction, session_id, files)
        yield candidate


def _clear(database: Database, deleted: bool) -> None:
    try:
        pruning.clear(database, deleted)
    except StorageError as error:
        raise CommandRefused(
            f"What was deleted still has its bytes in the database's files: {error}. When that is over, run "
            "flask prune --older-than with any age: it clears them, though it may delete nothing more."
        ) from None


def _age(text: str) -> int:
    """An age in seconds."""
    # Neither minutes, which may be taken for months, nor a number alone: what is deleted is gone.
    seconds = seconds_in(text, ("h", "d", "w"))
    if seconds is None or not 0 < seconds <= HIGHEST_AGE:
        raise click.BadParameter(
            "must be a number of hours, days or weeks, such as 12h, 90d or 8w.", param_hint="--older-than"
        )
    return seconds


# ---- the database


def _check_there(settings: Settings) -> None:
    if settings.database_url is None and not settings.database_path.exists():
        raise DatabaseRefused(f"There is no database {settings.database_path}; set DATABASE_PATH or DATABASE_URL.")


@contextmanager
def _reading(settings: Settings) -> Iterator[Database]:
    """The database as it is, also beside a running service."""
    _check_there(settings)
    sqlite_file.prepare(settings.url)
    database = Database(settings.url)
    try:
        if pending(database):
            raise DatabaseRefused("The database's schema is not up to date; run flask migrate first.")
        yield database
    finally:
        database.close()


@contextmanager
def _writing(settings: Settings) -> Iterator[Database]:
    """The database for this command alone, brought up to date."""
    sqlite_file.prepare(settings.url)
    with ServiceLock(settings.url, LOCK_TIMEOUT):
        database = Database(settings.url, writable=True, pool_size=1)
        try:
            migrate(database)
            yield database
        finally:
            database.close()


# ---- what is said


@contextmanager
def _refusals_told() -> Iterator[None]:
    """What goes wrong as one sentence, and the exit code that it has."""
    try:
        yield
    except (StartRefused, CommandRefused) as refusal:
        _warn(str(refusal))
        sys.exit(refusal.exit_code)
    except NotFound as error:
        _warn(error.message.partition(". ")[0] + " in this database.")
        sys.exit(CommandRefused.exit_code)
    except StorageError as error:
        _warn(
            f"The database cannot be used: {error}. Run the command again when it can: what is done is not done twice."
        )
        sys.exit(DatabaseRefused.exit_code)


def _warn(sentence: str) -> None:
    click.echo(sentence, err=True)


def _say(sentence: str) -> None:
    _write(f"{sentence}\n", flush=True)


def _write(text: str, flush: bool = False) -> None:
    """
    Raises:
        CommandRefused: standard output takes no more.
        BrokenPipeError: nobody reads it any more. Click ends the command then.
    """
    try:
        sys.stdout.write(text)
        if flush:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # Python flushes it once more at exit, and would end with a stack trace.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise CommandRefused(f"The output cannot be written: {error.strerror}.") from None


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _tell_report(report: Report) -> None:
    _say(
        f"Imported {_number(report.sessions, 'session')}, {_number(report.runs, 'run')}, "
        f"{_number(report.messages, 'message')} and {_number(report.transcripts, 'transcript')}; here already: "
        f"{_number(report.already_there, 'run')}."
    )
    if report.interrupted:
        _say(f"Had not ended and became error / INTERRUPTED: {_number(report.interrupted, 'run')}.")
    if report.runs:
        _say(f"Can be resumed or forked, for the transcript is here: {_number(report.resumable, 'run')}.")


def _tell_tree(candidate: pruning.Candidate, did: str) -> None:
    tree = candidate.tree
    _say(
        f"{did} the tree of session {tree.root}: {_number(len(tree.sessions), 'session')}, "
        f"{_number(tree.runs, 'run')}, {_number(tree.messages, 'message')} ({_number(tree.message_bytes, 'byte')}), "
        f"{_number(tree.transcripts, 'transcript')} and {_number(candidate.file_count, 'file')} of Claude Code; "
        f"latest activity {tree.last_run_at}."
    )
    for session_id in tree.sessions[1:]:
        _say(f"  with session {session_id}")


COMMANDS = (export_command, import_command, prune_command)
