"""Starts, resumes, forks and cancels runs for clients, and recovers runs after a restart.

core/runs/transitions.py takes the decisions inside the transactions that store them; core/runs/runner.py carries them
out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from ccm import file_limits
from ccm.core.claude.prestart_key import Ids, new_ids
from ccm.core.claude.processes import end_marked
from ccm.core.claude.run_directory import remove_directories
from ccm.core.lineage import ForkPoint
from ccm.core.problems import Problems
from ccm.core.run_log import RunLog
from ccm.core.runs.prestarts import Prestarts
from ccm.core.runs.request import Accepted, RunRequest
from ccm.core.runs.runner import Runner
from ccm.core.runs.transitions import UNRECOVERABLE, AfterCommit, RunTransitions, not_resumable
from ccm.core.storage.writer import Writer
from ccm.core.transcripts.files import TranscriptFiles
from ccm.db import runs, sessions
from ccm.db.driver.transaction import Transaction
from ccm.errors import RunAlreadyEnded, SessionBusy, ShuttingDown, Unavailable
from ccm.json_text import to_json_text
from ccm.models import Run, RunErrorCode, RunStatus, Session
from ccm.timestamps import timestamp

log = logging.getLogger(__name__)


class RunManager:
    """Starts, resumes, forks, cancels and recovers runs.

    Args:
        writer: stores every change.
        transitions: takes the decisions.
        runner: carries them out.
        transcripts: the transcripts of runs, on this host and in the database.
        prestarts: the Claude Codes that wait for a run.
        problems: receives runs that cannot be recovered.
    """

    def __init__(
        self,
        writer: Writer,
        transitions: RunTransitions,
        runner: Runner,
        transcripts: TranscriptFiles,
        *,
        prestarts: Prestarts,
        problems: Problems,
    ) -> None:
        self._prestarts = prestarts
        self._problems = problems
        self._writer = writer
        self._transitions = transitions
        self._runner = runner
        self._transcripts = transcripts

    # ---- for clients

    def start(self, request: RunRequest, cwd: str) -> Accepted:
        """Accept a fresh run.

        Raises:
            CCMError: the run is refused; nothing is stored.
        """
        approvals = request.run_fields.get("approvals", False)
        ids = self._prestarts.reserve_spare(request.options, cwd, approvals=approvals) or new_ids()
        row = self._row(request, ids, cwd)
        return self._submit(row, request, new_session={})

    def resume(self, request: RunRequest, session: Session, head: Run | None) -> Accepted:
        """Accept a run that continues a session.

        Args:
            head: the run that it would continue if it started now.

        Raises:
            CCMError: the run is refused; nothing is stored.
        """
        if head is not None:
            self._check_transcript(head, session, session.cwd, request.options)
        ids = None if head is None else self._reserve_warm(request, head, session.cwd)
        row = self._row(request, ids or new_ids(), session.cwd) | {"sessionId": session.id}
        return self._submit(row, request, new_session=None)

    def fork(self, request: RunRequest, session: Session, point: ForkPoint, cwd: str | None) -> Accepted:
        """Accept a run that branches off a session into a new one.

        Args:
            cwd: the run's directory; None for the session's.

        Raises:
            CCMError: the run is refused; nothing is stored.
        """
        parent = point.run
        if not parent.ended:
            raise SessionBusy(
                f"Run {parent.id} has not ended, and only ended runs can be forked. Wait for it, or leave out atRunId "
                "and atMessage to fork the last ended run."
            )
        cwd = cwd or session.cwd
        self._check_transcript(parent, session, cwd, request.options)
        ids = None if point.message is not None else self._reserve_warm(request, parent, cwd)
        row = self._row(request, ids or new_ids(), cwd) | {
            "parentSessionId": session.id,
            "parentRunId": parent.id,
            "forkAtMessage": point.message,
            "forkAtIndex": point.index,
        }
        return self._submit(row, request, new_session={"parentSessionId": session.id, "forkedFromRunId": parent.id})

    def cancel(self, run_id: str) -> Run:
        """Cancel a run. A waiting run ends at once; a started one is asked to stop and ends later.

        Raises:
            NotFound: RUN_NOT_FOUND.
            Conflict: RUN_ALREADY_ENDED: the run has ended, but was not cancelled.
        """

        def work(transaction: Transaction) -> tuple[Run, AfterCommit]:
            run = runs.get(transaction, run_id)
            if run.ended and run.status != RunStatus.CANCELLED:
                raise RunAlreadyEnded(f"Run {run.id} has already ended: it is '{run.status}'.")
            after_commit = self._transitions.cancel(transaction, run)
            return runs.get(transaction, run_id), after_commit

        # Before the write, so that an agent stops even while storage is down.
        self._runner.cancel(run_id)
        return self._writer.write(work, lambda done: self._runner.perform(done[1]))[0]

    def update_session(self, session_id: str, values: Mapping[str, Any]) -> Session:
        """Change a session's `title` or `metadata`, or both.

        Raises:
            SessionNotFound: there is no such session.
        """
        columns = Session.to_columns(values)

        def work(transaction: Transaction) -> Session:
            session = sessions.get(transaction, session_id)
            if columns:
                sessions.update(transaction, session.id, columns)
            return sessions.get(transaction, session.id)

        return self._writer.write(work)

    # ---- the start of the service

    def recover(self) -> None:
        """End the runs that the previous service left unfinished, then start waiting runs.

        A run that cannot be recovered is reported. It stops neither the recovery of the others nor the service.

        Raises:
            Unavailable: the database is not writable.
        """
        for run_id in self._writer.write(self._transitions.unfinished):
            run_log = RunLog(log, run_id)
            run_log.warning("interrupted when the previous service exited", event="run_interrupted")
            try:
                self._recover(run_id)
            except Unavailable:
                raise
            except Exception:
                run_log.exception(
                    "cannot store its full end, writing only its status and the error", event="run_recovery_failed"
                )
                self._recover_row_only(run_id)
        try:
            self._writer.write(self._transitions.dispatch, self._runner.perform)
        except Unavailable:
            raise
        except Exception:
            log.exception("cannot start waiting runs, retrying", extra={"event": "dispatch_failed"})
            self._runner.catch_up()

    def _recover(self, run_id: str) -> None:
        try:
            end_marked(run_id)
            remove_directories(run_id)
        except Exception:
            # Remaining processes or files must not prevent the run's end from being stored.
            RunLog(log, run_id).exception("cannot remove its remaining processes and files", event="run_cleanup_failed")
        run = self._writer.write(lambda transaction: runs.get(transaction, run_id))
        transcript = self._transcripts.complete_copy(run)
        self._writer.write(
            partial(self._transitions.recover, run_id=run_id, transcript=transcript), self._runner.perform
        )

    def _recover_row_only(self, run_id: str) -> None:
        code = RunErrorCode.INTERRUPTED
        end = partial(self._transitions.end_row_only, run_id=run_id, message=UNRECOVERABLE, code=code)
        try:
            self._writer.write(end, self._runner.perform)
        except Unavailable:
            raise
        except Exception as error:
            self._problems.report(f"run {run_id}", "a run of the previous service cannot be recovered", error)

    # ---- accepting

    def _reserve_warm(self, request: RunRequest, parent: Run, cwd: str) -> Ids | None:
        approvals = request.run_fields.get("approvals", False)
        return self._prestarts.reserve_warm(parent, request.mode, request.options, cwd, approvals=approvals)

    def _row(self, request: RunRequest, ids: Ids, cwd: str) -> dict[str, Any]:
        """Return the columns of a run that opens a session."""
        return {
            "id": ids.run_id,
            "sessionId": ids.sdk_session_id,
            "sdkSessionId": ids.sdk_session_id,
            "mode": request.mode,
            "status": RunStatus.RUNNING,
            "cwd": cwd,
            "imageCount": len(request.images),
            **Run.to_columns({**request.run_fields, "prompt": request.prompt, "options": request.options}),
            "idempotencyKey": None if request.idempotency_key is None else request.idempotency_key.text,
            "requestDigest": None if request.idempotency_key is None else request.idempotency_key.digest,
            "createdBy": request.created_by,
            "createdAt": timestamp(),
        }

    def _submit(self, row: Mapping[str, Any], request: RunRequest, new_session: Mapping[str, Any] | None) -> Accepted:
        started = False
        try:
            accepted = self._accept(row, request, new_session)
            started = accepted.run.id == row["id"] and not (accepted.run.waiting or accepted.run.ended)
        finally:
            if not started:
                self._prestarts.release(row["id"])
        return accepted

    def _accept(self, row: Mapping[str, Any], request: RunRequest, new_session: Mapping[str, Any] | None) -> Accepted:
        if self._runner.stopping:
            raise ShuttingDown
        file_limits.check_spare()
        images = [{"mediaType": image.media_type, "data": image.data} for image in request.images]
        images_json = to_json_text(images) if images else None

        def work(transaction: Transaction) -> tuple[Accepted, AfterCommit]:
            return self._transitions.accept(transaction, row, images_json, request, new_session)

        return self._writer.write(work, lambda accepted: self._runner.perform(accepted[1]))[0]

    def _check_transcript(self, parent: Run, session: Session, cwd: str, options: Mapping[str, Any]) -> None:
        """Check that the run's directory and its parent's transcript exist.

        Raises:
            SessionNotResumable: the transcript or its directory is missing.
        """
        if not os.path.isdir(cwd):
            raise not_resumable(session, f"its directory {cwd} no longer exists")
        if not self._transcripts.is_available(parent, cwd, options):
            missing = "is neither on this host nor complete in the database"
            why = missing if parent.has_transcript else "was never written"
            raise not_resumable(session, f"the transcript of run {parent.id} {why}")
