"""Runs that come in from outside: each with all that it says in one transaction, and once however often it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ccm.core.archive.records import (
    ArchivedApproval,
    ArchivedEntries,
    ArchivedMessage,
    ArchivedRun,
    DoesNotFit,
    Source,
    SourceError,
)
from ccm.db import approvals, archive, messages, runs, sessions, transcripts
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.db.transcripts import TranscriptKey
from ccm.models import ApprovalStatus, Message, Resolution, Run, RunMode, RunStatus

BATCH_ITEMS = 1_000
BATCH_BYTES = 8 * 2**20
ENTRIES_AT_ONCE = 500
INTERRUPTED = {
    **runs.INTERRUPTED,
    "errorMessage": "This run had not ended when its history was taken over. It was not run again; resume or fork its "
    "session to go on.",
}


@dataclass
class Report:
    """What has come in."""

    sessions: int = 0
    runs: int = 0
    messages: int = 0
    transcripts: int = 0
    already_there: int = 0
    interrupted: int = 0
    # Of the runs, those whose transcript is in the database or in Claude Code's own directory.
    resumable: int = 0


class Importer:
    """
    Args:
        database: the one writer.
        has_transcript: whether Claude Code has a run's transcript on this host, by the run's cwd and SDK session.
        tell: called with a sentence about whatever does not come in just as it was.
    """

    def __init__(
        self, database: Database, has_transcript: Callable[[str, str], bool], tell: Callable[[str], None]
    ) -> None:
        self._database = database
        self._has_transcript = has_transcript
        self._tell = tell
        # What is added to a place in the source to make it a place here.
        self._offset: int | None = None
        self.report = Report()

    def run(self, source: Source) -> None:
        """Take in all runs of a source. What came before an error stays, whole.

        Raises:
            CommandRefused: the source cannot be read on; says where. Or some of its runs do not fit, which was told.
            StorageError: the database takes no more.
        """
        left_out = 0
        for run in source.runs():
            try:
                self._take(run, source.last_seq)
            except DoesNotFit as error:
                left_out += 1
                self._tell(str(error))
        if left_out:
            raise SourceError(f"Not all has come in: of the runs, {left_out} did not fit, for the reasons above.")

    def _take(self, run: ArchivedRun, last_seq: int) -> None:
        with self._database.transaction() as transaction:
            there = runs.find(transaction, run.row["id"])
            if self._offset is None:
                self._offset = self._offset_of(transaction, run.row["seq"], there, last_seq)
            if there is None:
                incoming = _Incoming(transaction, run, self._offset, self._has_transcript)
                incoming.take()
        if there is not None:
            self.report.already_there += 1
        else:
            self._count(incoming)

    def _offset_of(self, transaction: Transaction, seq: int, there: Run | None, last_seq: int) -> int:
        """Where the history of a source stands among what is here: before it all, for it is older.

        The source may have come before, whole or in part: then the rest goes to where it would have gone then.
        """
        if there is not None:
            return there.seq - seq
        first = archive.find_first_seq(transaction)
        return 0 if first is None else first - 1 - last_seq

    def _count(self, incoming: _Incoming) -> None:
        report = self.report
        report.sessions += incoming.opened_session
        report.runs += 1
        report.messages += incoming.message_count
        report.transcripts += len(incoming.transcripts)
        report.interrupted += incoming.interrupted
        report.resumable += incoming.resumable
        for sentence in incoming.notes:
            self._tell(sentence)


class _Incoming:
    """One run on its way into the database."""

    def __init__(
        self, transaction: Transaction, run: ArchivedRun, offset: int, has_transcript: Callable[[str, str], bool]
    ) -> None:
        self._transaction = transaction
        self._run = run
        self._offset = offset
        self._has_transcript = has_transcript
        self._row = dict(run.row)
        self._session = dict(run.session)
        self._parent = None if run.row["parentRunId"] is None else runs.find(transaction, run.row["parentRunId"])
        self._batch: list[Message] = []
        self._batch_bytes = 0
        self._last_at: str | None = None
        self.interrupted = self._row["status"] == RunStatus.RUNNING
        self.opened_session = False
        self.message_count = 0
        self.transcripts: dict[tuple[str, str], tuple[int, int]] = {}
        self.resumable = False
        self.notes: list[str] = []

    def take(self) -> None:
        """
        Raises:
            DoesNotFit: what is here already, or what came before it.
        """
        row = self._row
        self._settle_ids()
        session = self._settle_session()
        if sessions.find(self._transaction, row["sessionId"]) is None:
            self._open(session)
        self._check_line()
        row["seq"] = self._place()
        if self.interrupted:
            row |= INTERRUPTED
        runs.insert(self._transaction, row | {"messageCount": 0}, None)
        for part in self._run.parts:
            if isinstance(part, ArchivedMessage):
                self._take_message(part)
            elif isinstance(part, ArchivedApproval):
                self._take_approval(part)
            else:
                self._take_entries(part)
        self._write_batch()
        self._complete()

    # ---- where it belongs

    def _settle_session(self) -> Mapping[str, Any]:
        """The session that it belongs to here: its parent's, or its own if that one has gone on otherwise since."""
        row, session = self._row, self._session
        parent = row["parentRunId"]
        if parent is None:
            return session
        if self._parent is None:
            raise self._error(f"its parent run {parent} is neither before it nor here already")
        session_of_parent = self._parent.session_id
        if row["mode"] != RunMode.RESUME:
            if session["parentSessionId"] is None:
                return session
            # Not always the one that it was forked from there: the parent may have become a fork here.
            row["parentSessionId"] = session_of_parent
            return {**session, "parentSessionId": session_of_parent}
        row["sessionId"] = session_of_parent
        if archive.has_gone_on(self._transaction, session_of_parent, parent):
            self.notes.append(
                f"Run {row['id']} continues run {parent}, which session {session_of_parent} has continued otherwise "
                "here: it becomes a fork."
            )
            row |= {"mode": RunMode.FORK, "sessionId": row["sdkSessionId"], "parentSessionId": session_of_parent}
            own = {"id": row["sessionId"], "parentSessionId": session_of_parent, "forkedFromRunId": parent}
            return {**session, **own}
        return session

    def _settle_ids(self) -> None:
        row, spare = self._row, self._run.spare_id
        other = runs.find_by_sdk_session(self._transaction, row["sdkSessionId"])
        if other is not None:
            if spare is None or runs.find_by_sdk_session(self._transaction, spare) is not None:
                raise self._error(
                    f"run {other.id}, which is here already, has the same sdkSessionId {row['sdkSessionId']}"
                )
            self.notes.append(
                f"Run {row['id']} has the SDK session {row['sdkSessionId']} of run {other.id}, which is here already: "
                f"it gets {spare} and no transcript."
            )
            row |= {"sdkSessionId": spare, "hasTranscript": 0}
            if row["mode"] != RunMode.RESUME:
                row["sessionId"] = self._session["id"] = spare
        key = row.get("idempotencyKey")
        if key is not None and archive.has_idempotency_key(self._transaction, key):
            self.notes.append(f"Run {row['id']} leaves its idempotency key behind: another run has it here.")
            row |= {"idempotencyKey": None, "requestDigest": None}

    def _open(self, session: Mapping[str, Any]) -> None:
        row = self._row
        if session["id"] != row["sessionId"]:
            raise self._error(f"its session {row['sessionId']} is neither before it nor here already")
        parent = session["parentSessionId"]
        if parent is not None and sessions.find(self._transaction, parent) is None:
            raise self._error(f"its session was forked from session {parent}, which is neither before it nor here")
        at = {"firstRunAt": row["createdAt"], "lastRunAt": row["createdAt"], "lastRunSeq": 0}
        sessions.insert(self._transaction, {**session, **at, "runCount": 0})
        self.opened_session = True

    def _check_line(self) -> None:
        """A run's parent is in its session or in one that this was forked from: a tree can be deleted whole."""
        if self._parent is None:
            return
        above: str | None = self._row["sessionId"]
        while above is not None and above != self._parent.session_id:
            session = sessions.find(self._transaction, above)
            above = None if session is None else session.parent_session_id
        if above is None:
            raise self._error(f"its parent run {self._parent.id} is in no session that its own was forked from")

    def _place(self) -> int:
        """Its place in the order of all runs: after its parent and what its session has; else at the very end."""
        row = self._row
        wanted = int(row["seq"]) + self._offset
        before = [archive.find_last_seq_of_session(self._transaction, row["sessionId"])]
        if self._parent is not None:
            before.append(self._parent.seq)
        if archive.find_run_at(self._transaction, wanted) is not None or any(
            seq is not None and seq >= wanted for seq in before
        ):
            return runs.next_seq(self._transaction)
        return wanted

    def _error(self, why: str) -> DoesNotFit:
        return DoesNotFit(f"Run {self._row['id']} cannot be taken: {why}.")

    # ---- what it says

    def _take_message(self, part: ArchivedMessage) -> None:
        row = self._row
        self._batch.append(
            Message(row["id"], row["sessionId"], self.message_count, part.type, part.json, part.created_at)
        )
        self.message_count += 1
        self._batch_bytes += len(part.json)
        self._last_at = part.created_at
        if len(self._batch) >= BATCH_ITEMS or self._batch_bytes >= BATCH_BYTES:
            self._write_batch()

    def _write_batch(self) -> None:
        if self._batch:
            messages.insert_many(self._transaction, self._batch)
        self._batch, self._batch_bytes = [], 0

    def _take_approval(self, part: ArchivedApproval) -> None:
        row = {**part.row, "runId": self._row["id"], "sessionId": self._row["sessionId"]}
        if approvals.find(self._transaction, row["id"]) is not None:
            raise self._error(f"its approval {row['id']} is here already, of another run")
        if row["status"] == ApprovalStatus.PENDING:
            # Its run is not going on here, and nobody waits for the answer.
            row |= {
                "status": ApprovalStatus.EXPIRED,
                "resolution": Resolution.WITHDRAWN,
                "resolvedAt": row["createdAt"],
            }
        approvals.insert(self._transaction, row)

    def _take_entries(self, part: ArchivedEntries) -> None:
        sdk_session_id = self._row["sdkSessionId"]
        key = (part.project_key, part.subpath)
        transcript, length = self.transcripts.get(key) or (
            transcripts.insert(self._transaction, TranscriptKey(sdk_session_id, *key), part.updated_at_ms),
            0,
        )
        if part.first_index != length:
            raise self._error(f"entry {length} of its transcript {part.subpath!r} is missing")
        for start in range(0, len(part.entries), ENTRIES_AT_ONCE):
            some = part.entries[start : start + ENTRIES_AT_ONCE]
            transcripts.insert_at(self._transaction, transcript, sdk_session_id, length + start, some)
        self.transcripts[key] = (transcript, length + len(part.entries))

    # ---- its end

    def _complete(self) -> None:
        row = self._row
        came = any(subpath == "" for _, subpath in self.transcripts)
        local = self._has_transcript(row["cwd"], row["sdkSessionId"])
        if self.interrupted:
            row["endedAt"] = self._last_at or row["startedAt"] or row["createdAt"]
            row["hasTranscript"] = int(came or local)
        # What the database is said to hold must have come.
        row["transcriptStored"] = int(came and bool(row["transcriptStored"] or self.interrupted))
        names = ("endedAt", "hasTranscript", "transcriptStored")
        values = {name: row[name] for name in names} | {"messageCount": self.message_count}
        archive.complete_run(self._transaction, row["id"], values)
        sessions.run_added(self._transaction, row["sessionId"], row["seq"], row["createdAt"])
        head = row["id"] if row["hasTranscript"] else None
        sessions.run_ended(self._transaction, row["sessionId"], self.message_count, row["costUsd"] or 0.0, head)
        self.resumable = bool(row["hasTranscript"] and (row["transcriptStored"] or local))
        if self.interrupted:
            self.notes.append(f"Run {row['id']} had not ended: it is {RunStatus.ERROR} / INTERRUPTED now.")
