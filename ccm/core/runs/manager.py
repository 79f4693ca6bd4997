"""What clients and the operator ask of runs: to be started, resumed, forked, cancelled, and recovered after a crash.

The decisions are taken by core/runs/transitions.py inside the transactions that store them, and carried out by
core/runs/runner.py.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from functools import partial
from typing import Any

from ccm import file_limits
from ccm.core.claude.processes import end_marked
from ccm.core.claude.run_directory import remove_directories
from ccm.core.lineage import ForkPoint
from ccm.core.problems import Problems
from ccm.core.runs.request import Accepted, RunRequest
from ccm.core.runs.runner import Runner
from ccm.core.runs.transitions import AfterCommit, RunTransitions, not_resumable
from ccm.core.storage.writer import Writer
from ccm.core.transcripts.files import TranscriptFiles
from ccm.db import runs, sessions
from ccm.db.driver.transaction import Transaction
from ccm.errors import RunAlreadyEnded, SessionBusy, ShuttingDown, Unavailable
from ccm.json_text import to_json_text
from ccm.models import Run, RunStatus, Session
from ccm.timestamps import timestamp

log = logging.getLogger(__name__)


class RunManager:
    """Starts, resumes, forks and cancels runs.

    Args:
        writer: takes every change.
        lifecycle: takes the decisions.
        runner: carries them out.
        transcripts: those of runs, here and in the database.
        problems: told of runs that cannot be recovered.
    """

    def __init__(
        self,
        writer: Writer,
        transitions: RunTransitions,
        runner: Runner,
        transcripts: TranscriptFiles,
        problems: Problems,
    ) -> None:
        self._problems = problems
        self._writer = writer
        self._transitions = transitions
        self._runner = runner
        self._transcripts = transcripts

    # ---- for clients

    def start(self, request: RunRequest, cwd: str) -> Accepted:
        """Accept a fresh run.

        Raises:
            CCMError: it is refused; then nothing is stored.
        """
        session_id = str(uuid.uuid4())
        row = self._row(request, session_id, session_id, cwd)
        return self._submit(row, request, new_session={"parentSessionId": None, "forkedFromRunId": None})

    def resume(self, request: RunRequest, session: Session, head: Run | None) -> Accepted:
        """Accept a run that continues a session.

        Args:
            head: the run that it would continue if it began now.

        Raises:
            CCMError: it is refused; then nothing is stored.
        """
        if head is not None:
            self._check_transcript(head, session, session.cwd, request.options)
        row = self._row(request, session.id, str(uuid.uuid4()), session.cwd)
        return self._submit(row, request, new_session=None)

    def fork(self, request: RunRequest, session: Session, point: ForkPoint, cwd: str | None) -> Accepted:
        """Accept a run that branches off a session into a new one.

        Args:
            cwd: where it runs; the session's own directory if left out.

        Raises:
            CCMError: it is refused; then nothing is stored.
        """
        parent = point.run
        if not parent.ended:
            raise SessionBusy(
                f"Run {parent.id} is still going on; only an ended run can be forked. Wait for it, or leave atRunId "
                "and atMessage out to fork the last ended one."
            )
        cwd = cwd or session.cwd
        self._check_transcript(parent, session, cwd, request.options)
        new_id = str(uuid.uuid4())
        row = self._row(request, new_id, new_id, cwd) | {
            "parentSessionId": session.id,
            "parentRunId": parent.id,
            "forkAtMessage": point.message,
            "forkAtIndex": point.index,
        }
        return self._submit(row, request, new_session={"parentSessionId": session.id, "forkedFromRunId": parent.id})

    def cancel(self, run_id: str) -> Run:
        """Have a run cancelled: at once if it waits; else it is told to stop, and `ended` says when it has.

        Raises:
            RunNotFound: there is no such run.
            RunAlreadyEnded: otherwise than by being cancelled.
        """

        def work(transaction: Transaction) -> tuple[Run, AfterCommit]:
            run = runs.get(transaction, run_id)
            if run.ended and run.status != RunStatus.CANCELLED:
                raise RunAlreadyEnded(f"Run {run.id} has already ended: it is '{run.status}'.")
            after_commit = self._transitions.cancel(transaction, run)
            return runs.get(transaction, run_id), after_commit

        # At once: an agent is to stop also while storage takes nothing.
        self._runner.cancel(run_id)
        return self._writer.write(work, lambda done: self._runner.follow(done[1]))[0]

    def describe_session(self, session_id: str, values: Mapping[str, Any]) -> Session:
        """Change a session's `title` and `metadata`, whichever is given.

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

    # ---- the life of the service

    def recover(self) -> None:
        """After a start: report what the last service left in mid-run, and begin what had not begun.

        Each run is recovered by itself: one that cannot be is reported, and keeps neither the others nor the service.

        Raises:
            Unavailable: the database takes no writes.
        """
        for run_id in self._writer.write(self._transitions.left):
            log.warning("run %s was cut off by the end of the last service: INTERRUPTED", run_id)
            try:
                self._recover(run_id)
            except Unavailable:
                raise
            except Exception:
                log.exception("run %s cannot be recovered as it is", run_id)
                self._recover_alone(run_id)
        try:
            self._writer.write(self._transitions.dispatch, self._runner.follow)
        except Unavailable:
            raise
        except Exception:
            log.exception("waiting runs could not be started")
            self._runner.catch_up()

    def _recover(self, run_id: str) -> None:
        try:
            end_marked(run_id)
            remove_directories(run_id)
        except Exception:
            # What is left of it must not keep its end from being told.
            log.exception("run %s: what it has left cannot be removed", run_id)
        run = self._writer.write(lambda transaction: runs.get(transaction, run_id))
        transcript = self._transcripts.keep(run)
        self._writer.write(
            partial(self._transitions.recover, run_id=run_id, transcript=transcript), self._runner.follow
        )

    def _recover_alone(self, run_id: str) -> None:
        try:
            self._writer.write(partial(self._transitions.recover_alone, run_id=run_id), self._runner.follow)
        except Unavailable:
            raise
        except Exception as error:
            told = "a run that the last service left in the middle cannot be recovered"
            self._problems.report(f"run {run_id}", told, error)

    # ---- accepting

    def _row(self, request: RunRequest, session_id: str, sdk_session_id: str, cwd: str) -> dict[str, Any]:
        return {
            "id": str(uuid.uuid4()),
            "sessionId": session_id,
            "sdkSessionId": sdk_session_id,
            "parentSessionId": None,
            "parentRunId": None,
            "forkAtMessage": None,
            "forkAtIndex": None,
            "mode": request.mode,
            "status": RunStatus.RUNNING,
            "cwd": cwd,
            "imageCount": len(request.images),
            **Run.to_columns({**request.stored, "prompt": request.prompt, "options": request.options}),
            "idempotencyKey": None if request.idempotency_key is None else request.idempotency_key.text,
            "requestDigest": None if request.idempotency_key is None else request.idempotency_key.digest,
            "createdBy": request.created_by,
            "createdAt": timestamp(),
        }

    def _submit(self, row: Mapping[str, Any], request: RunRequest, new_session: Mapping[str, Any] | None) -> Accepted:
        if self._runner.stopping:
            raise ShuttingDown
        file_limits.check_spare()
        images = [{"mediaType": image.media_type, "data": image.data} for image in request.images]
        images_json = to_json_text(images) if images else None

        def work(transaction: Transaction) -> tuple[Accepted, AfterCommit]:
            return self._transitions.accept(transaction, row, images_json, request, new_session)

        return self._writer.write(work, lambda accepted: self._runner.follow(accepted[1]))[0]

    def _check_transcript(self, parent: Run, session: Session, cwd: str, options: Mapping[str, Any]) -> None:
        """
        Raises:
            SessionNotResumable: the transcript or its directory is missing.
        """
        if not os.path.isdir(cwd):
            raise not_resumable(session, f"its directory {cwd} is not there any more")
        if not self._transcripts.can_provide(parent, cwd, options):
            lost = "is neither on this host nor whole in the database" if parent.has_transcript else "was never written"
            raise not_resumable(session, f"the transcript of run {parent.id} {lost}")
