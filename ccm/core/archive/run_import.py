"""Stores one run of a source in the database, fitted to the history that is there."""

from __future__ import annotations

from collections.abc import Callable

from ccm.core.archive.records import ArchivedApproval, ArchivedEntries, ArchivedMessage, ArchivedRun, DoesNotFit
from ccm.db import approvals, archive, messages, runs, sessions, transcripts
from ccm.db.driver.transaction import Transaction
from ccm.db.transcripts import TranscriptKey
from ccm.models import ApprovalStatus, Message, Resolution, RunMode, RunStatus

BATCH_ITEMS = 1_000
BATCH_BYTES = 8 * 2**20
INTERRUPTED = {
    **runs.INTERRUPTED,
    "errorMessage": "This run had not ended when its history was imported. It was not run again; resume or fork its "
    "session to continue.",
}


class RunImport:
    """The import of one run. The public attributes hold its results once it is stored."""

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
        self.created_session = False
        self.message_count = 0
        # By (project key, subpath): the id of the transcript, and the number of its entries so far.
        self.transcripts: dict[tuple[str, str], tuple[int, int]] = {}
        self.resumable = False
        self.warnings: list[str] = []

    def store(self) -> None:
        """Store the run with all its parts.

        Raises:
            DoesNotFit: it conflicts with the database, or its parent or session is missing.
        """
        row = self._row
        self._resolve_id_conflicts()
        self._choose_session()
        row["seq"] = self._choose_seq()
        if sessions.find(self._transaction, row["sessionId"]) is None:
            self._create_session()
        self._check_ancestry()
        if self.interrupted:
            row |= INTERRUPTED
        runs.insert(self._transaction, row | {"messageCount": 0}, None)
        for part in self._run.parts:
            if isinstance(part, ArchivedMessage):
                self._store_message(part)
            elif isinstance(part, ArchivedApproval):
                self._store_approval(part)
            else:
                self._store_entries(part)
        self._write_batch()
        self._complete()

    # ---- its session and its place in the order of runs

    def _choose_session(self) -> None:
        """Put it into its parent's session, or into a new one if that was continued another way here."""
        row, parent = self._row, self._row["parentRunId"]
        if parent is None:
            return
        if self._parent is None:
            raise self._error(f"its parent run {parent} is neither before it nor here already")
        session_of_parent = self._parent.session_id
        if row["mode"] != RunMode.RESUME:
            if self._session["parentSessionId"] is not None:
                # It may differ from the source, because the parent may have become a fork here.
                row["parentSessionId"] = self._session["parentSessionId"] = session_of_parent
            return
        row["sessionId"] = session_of_parent
        if archive.was_continued(self._transaction, session_of_parent, parent):
            self.warnings.append(
                f"Run {row['id']} continues run {parent}, which session {session_of_parent} has continued another way "
                "here: it becomes a fork."
            )
            row |= {"mode": RunMode.FORK, "sessionId": row["sdkSessionId"], "parentSessionId": session_of_parent}
            self._session["id"] = row["sessionId"]
            self._session |= {"parentSessionId": session_of_parent, "forkedFromRunId": parent}

    def _resolve_id_conflicts(self) -> None:
        """Use the spare id if another run has the SDK session id, and drop an idempotency key that another run has."""
        row, spare = self._row, self._run.spare_id
        other = runs.find_by_sdk_session(self._transaction, row["sdkSessionId"])
        if other is not None:
            if spare is None or runs.find_by_sdk_session(self._transaction, spare) is not None:
                raise self._error(
                    f"run {other.id}, which is here already, has the same sdkSessionId {row['sdkSessionId']}"
                )
            self.warnings.append(
                f"Run {row['id']} has the SDK session {row['sdkSessionId']} of run {other.id}, which is here already: "
                f"it gets {spare} and no transcript."
            )
            row |= {"sdkSessionId": spare, "hasTranscript": 0}
            if row["mode"] != RunMode.RESUME:
                row["sessionId"] = self._session["id"] = spare
        key = row.get("idempotencyKey")
        if key is not None and archive.has_idempotency_key(self._transaction, key):
            self.warnings.append(f"Run {row['id']} loses its idempotency key, because another run has it here.")
            row |= {"idempotencyKey": None, "requestDigest": None}

    def _create_session(self) -> None:
        row, session = self._row, self._session
        if session["id"] != row["sessionId"]:
            raise self._error(f"its session {row['sessionId']} is neither before it nor here already")
        parent = session["parentSessionId"]
        if parent is not None and sessions.find(self._transaction, parent) is None:
            raise self._error(f"its session was forked from session {parent}, which is neither before it nor here")
        at = {"firstRunAt": row["createdAt"], "lastRunAt": row["createdAt"], "lastRunSeq": row["seq"]}
        sessions.insert(self._transaction, {**session, **at, "createdBy": row.get("createdBy"), "runCount": 0})
        self.created_session = True

    def _check_ancestry(self) -> None:
        """Refuse a run whose parent is in another tree of sessions, because trees are deleted whole."""
        if self._parent is None:
            return
        above: str | None = self._row["sessionId"]
        while above is not None and above != self._parent.session_id:
            session = sessions.find(self._transaction, above)
            above = None if session is None else session.parent_session_id
        if above is None:
            raise self._error(f"its parent run {self._parent.id} is in no session that its own was forked from")

    def _choose_seq(self) -> int:
        """Return its `seq`: that of the source plus the offset if it is free and in order, else the next."""
        wanted = int(self._row["seq"]) + self._offset
        if archive.is_seq_usable(self._transaction, wanted, self._row["sessionId"], self._row["parentRunId"]):
            return wanted
        return runs.next_seq(self._transaction)

    def _error(self, reason: str) -> DoesNotFit:
        return DoesNotFit(f"Run {self._row['id']} cannot be imported: {reason}.")

    # ---- its parts

    def _store_message(self, part: ArchivedMessage) -> None:
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
        messages.insert_many(self._transaction, self._batch)
        self._batch, self._batch_bytes = [], 0

    def _store_approval(self, part: ArchivedApproval) -> None:
        row = {**part.row, "runId": self._row["id"], "sessionId": self._row["sessionId"]}
        if approvals.find(self._transaction, row["id"]) is not None:
            raise self._error(f"its approval {row['id']} is here already, of another run")
        if row["status"] == ApprovalStatus.PENDING:
            # Its run is not running here, so nothing waits for the answer.
            row |= {
                "status": ApprovalStatus.EXPIRED,
                "resolution": Resolution.WITHDRAWN,
                "resolvedAt": row["createdAt"],
            }
        approvals.insert(self._transaction, row)

    def _store_entries(self, part: ArchivedEntries) -> None:
        sdk_session_id = self._row["sdkSessionId"]
        key = (part.project_key, part.subpath)
        transcript, length = self.transcripts.get(key) or (
            transcripts.insert(self._transaction, TranscriptKey(sdk_session_id, *key), part.updated_at_ms),
            0,
        )
        if part.first_index != length:
            raise self._error(f"entry {length} of its transcript {part.subpath!r} is missing")
        transcripts.insert_at(self._transaction, transcript, sdk_session_id, length, part.entries)
        self.transcripts[key] = (transcript, length + len(part.entries))

    # ---- its end

    def _complete(self) -> None:
        row = self._row
        has_stored = any(subpath == "" for _, subpath in self.transcripts)
        local = self._has_transcript(row["cwd"], row["sdkSessionId"])
        if self.interrupted:
            row["endedAt"] = self._last_at or row["startedAt"] or row["createdAt"]
        if self.interrupted or "hasTranscript" not in row:
            row["hasTranscript"] = int(has_stored or local)
        # The source may say that the transcript is stored without containing it.
        row["transcriptStored"] = int(has_stored and bool(row["transcriptStored"] or self.interrupted))
        names = ("endedAt", "hasTranscript", "transcriptStored")
        values = {name: row[name] for name in names} | {"messageCount": self.message_count}
        archive.complete_run(self._transaction, row["id"], values)
        sessions.run_added(self._transaction, row["sessionId"], row["seq"], row["createdAt"])
        head = row["id"] if row["hasTranscript"] else None
        sessions.run_ended(self._transaction, row["sessionId"], self.message_count, row["costUsd"] or 0.0, head)
        self.resumable = bool(row["hasTranscript"] and (row["transcriptStored"] or local))
        if self.interrupted:
            self.warnings.append(f"Run {row['id']} had not ended. It is now {RunStatus.ERROR} / INTERRUPTED.")
