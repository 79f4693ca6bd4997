"""Imports the runs of a source, each in one transaction, and counts them. A repeated import adds nothing twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ccm.core.archive.records import ArchivedRun, DoesNotFit, SourceError
from ccm.core.archive.run_import import RunImport
from ccm.core.archive.sources import Source
from ccm.db import archive, runs
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.models import Run


@dataclass
class Report:
    """The counts of what was imported."""

    sessions: int = 0
    runs: int = 0
    messages: int = 0
    transcripts: int = 0
    already_there: int = 0
    interrupted: int = 0
    # Imported runs whose transcript is in the database or in Claude Code's own directory.
    resumable: int = 0


class Importer:
    """Imports a source into a database.

    Args:
        database: opened for writing, by this process only.
        has_transcript: returns whether Claude Code has a transcript on this host, given a run's cwd and SDK session id.
        warn: called with a sentence for each thing that is not imported unchanged.
    """

    def __init__(
        self, database: Database, has_transcript: Callable[[str, str], bool], warn: Callable[[str], None]
    ) -> None:
        self._database = database
        self._has_transcript = has_transcript
        self._warn = warn
        # Added to a `seq` of the source to get one of the database.
        self._offset: int | None = None
        self.report = Report()

    def run(self, source: Source) -> None:
        """Import all runs of a source. After an error the runs before it stay, complete.

        Raises:
            CommandRefused: the source is invalid; the message says where. Or some runs did not fit, after a warning
                for each.
            StorageError: the database failed.
        """
        left_out = 0
        for run in source.runs():
            try:
                self._import(run, source.last_seq)
            except DoesNotFit as error:
                left_out += 1
                self._warn(str(error))
        if left_out:
            raise SourceError(f"The import is incomplete. Runs that do not fit, for the reasons above: {left_out}.")

    def _import(self, run: ArchivedRun, last_seq: int) -> None:
        with self._database.transaction() as transaction:
            existing = runs.find(transaction, run.row["id"])
            if self._offset is None:
                self._offset = self._find_offset(transaction, run.row["seq"], existing, last_seq)
            if existing is not None:
                self.report.already_there += 1
                return
            run_import = RunImport(transaction, run, self._offset, self._has_transcript)
            run_import.store()
        self._count(run_import)

    def _find_offset(self, transaction: Transaction, seq: int, existing: Run | None, last_seq: int) -> int:
        """Return the offset that puts the source's history before all runs of the database, because it is older.

        If the source was imported before, whole or in part, return the offset of that import, so that the rest gets
        the positions that it would have had then.
        """
        if existing is not None:
            return existing.seq - seq
        first = archive.find_first_seq(transaction)
        return 0 if first is None else first - 1 - last_seq

    def _count(self, run_import: RunImport) -> None:
        report = self.report
        report.sessions += run_import.created_session
        report.runs += 1
        report.messages += run_import.message_count
        report.transcripts += len(run_import.transcripts)
        report.interrupted += run_import.interrupted
        report.resumable += run_import.resumable
        for sentence in run_import.warnings:
            self._warn(sentence)
