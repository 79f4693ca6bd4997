"""Decides which runs are accepted, which starts next and how one ends.

Each decision depends only on the database, and on whether the service is stopping. It is taken in the writer's thread,
inside the transaction that stores it, so no two of them race. Its side effects are returned as an `AfterCommit`.
"""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ccm.core.approvals.transitions import ApprovalTransitions
from ccm.core.run_log import RunLog
from ccm.core.runs.request import Accepted, IfBusy, RunRequest
from ccm.core.storage.notifier import APPROVALS, EVENTS, end_of
from ccm.core.transcripts.copying import TranscriptEnd
from ccm.core.webhooks.outbox import Outbox
from ccm.db import messages, runs, sessions
from ccm.db.driver.transaction import Transaction
from ccm.errors import QueueFull, SessionBusy, SessionNotResumable, StorageDown
from ccm.models import RUN_ENDED, EventType, Run, RunErrorCode, RunMode, RunStatus, Session

log = logging.getLogger(__name__)

UNSTORABLE = "The outcome of this run could not be stored; the service's log has the reason."
UNSTARTABLE = "The run could not be started because of a fault; the service's log has the reason."
UNRECOVERABLE = "The service exited during this run, and the run could not be recovered; the log has the reason."


@dataclass(frozen=True)
class Start:
    """A run whose start is decided, as it is now stored, and the parent whose transcript it continues."""

    run: Run
    parent: Run | None
    images_json: str | None


@dataclass(frozen=True)
class AfterCommit:
    """The side effects of a transaction.

    Attributes:
        starts: the runs to begin.
        cancels: the ids of the started runs to stop.
        changed: the keys whose subscribers are notified.
        dispatched: the waiting runs that may start were decided.
        dispatch_failed: a fault prevented that decision.
    """

    starts: tuple[Start, ...] = ()
    cancels: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    dispatched: bool = False
    dispatch_failed: bool = False

    def __or__(self, other: AfterCommit) -> AfterCommit:
        return AfterCommit(
            self.starts + other.starts,
            self.cancels + other.cancels,
            self.changed + other.changed,
            self.dispatched or other.dispatched,
            self.dispatch_failed or other.dispatch_failed,
        )


class RunTransitions:
    """The decisions on runs, each a method that is called within a transaction of the writer.

    Args:
        workers: the number of runs that execute at once.
        queue_limit: the number of runs that may wait for a worker.
        outbox: receives the events of runs.
        approvals: expires the pending approvals of a run that ends.
    """

    def __init__(self, workers: int, queue_limit: int, outbox: Outbox, approvals: ApprovalTransitions) -> None:
        self._workers = workers
        self._queue_limit = queue_limit
        self._outbox = outbox
        self._approvals = approvals
        # Identifies this service in the rows of the runs that it started.
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        # No waiting run starts while this is False.
        self.open = True

    def accept(
        self,
        transaction: Transaction,
        row: Mapping[str, Any],
        images_json: str | None,
        request: RunRequest,
        new_session: Mapping[str, Any] | None,
    ) -> tuple[Accepted, AfterCommit]:
        """Store a run, waiting or already started.

        Args:
            row: the columns of the run that are known before it starts.
            new_session: `parentSessionId` and `forkedFromRunId` of the session that it opens; None to add to a session.

        Raises:
            SessionBusy, SessionNotResumable: the session takes no run.
            KeyReused: the request's key belongs to another request.
            QueueFull: too many runs are waiting.
        """
        if transaction.uncertain and (stored := runs.find(transaction, row["id"])):
            # The previous attempt was committed after all, but its side effects were not performed.
            after_commit = self.dispatch(transaction)
            if request.if_busy == IfBusy.INTERRUPT:
                others = [run for run in runs.not_ended(transaction, row["sessionId"]) if run.seq < stored.seq]
                after_commit |= AfterCommit(cancels=tuple(run.id for run in others if not run.waiting))
            return Accepted(stored, replayed=False), after_commit
        key = request.idempotency_key
        earlier = None if key is None else runs.find_by_idempotency_key(transaction, key)
        if earlier is not None:
            # A concurrent request with the same key was accepted first. Neither had found a run when it looked.
            return Accepted(earlier, replayed=True), AfterCommit()
        seq = runs.next_seq(transaction)
        session_id = row["sessionId"]
        after_commit = AfterCommit()
        if new_session is None:
            after_commit |= self._apply_if_busy(transaction, session_id, request.if_busy)
            sessions.run_added(transaction, session_id, seq, row["createdAt"])
        else:
            session = {
                "id": session_id,
                "cwd": row["cwd"],
                **Session.to_columns({"title": None, "metadata": None, **request.session_fields}),
                "firstRunAt": row["createdAt"],
                "lastRunAt": row["createdAt"],
                "lastRunSeq": seq,
                "createdBy": request.created_by,
            }
            sessions.insert(transaction, session | dict(new_session))
        runs.insert(transaction, dict(row) | {"seq": seq}, images_json)
        self._outbox.enqueue(transaction, EventType.RUN_CREATED, runs.get(transaction, row["id"]))
        after_commit |= AfterCommit(changed=(EVENTS,)) | self.dispatch(transaction)
        started = [start.run for start in after_commit.starts if start.run.id == row["id"]]
        run = started[0] if started else runs.get(transaction, row["id"])
        if run.waiting and runs.count_waiting(transaction) > self._queue_limit:
            waiting = "1 run is" if self._queue_limit == 1 else f"{self._queue_limit} runs are"
            raise QueueFull(f"{waiting} waiting already (CCM_MAX_QUEUED_RUNS). Try again when some have ended.")
        return Accepted(run, replayed=False), after_commit

    def _apply_if_busy(self, transaction: Transaction, session_id: str, if_busy: str) -> AfterCommit:
        """Refuse a run of a busy session, queue it, or cancel the session's other runs, as its request says.

        Runs of a session must not overlap: the CLI itself would run two at once and lose a prompt.

        Raises:
            Conflict: SESSION_BUSY, SESSION_NOT_RESUMABLE.
        """
        session = sessions.get(transaction, session_id)
        first = runs.find_first_not_ended(transaction, session_id)
        if first is None and session.head_run_id is None:
            raise not_resumable(session, "none of its runs left a transcript")
        if first is None or if_busy == IfBusy.ENQUEUE:
            return AfterCommit()
        if if_busy != IfBusy.INTERRUPT:
            raise SessionBusy(
                f"Session {session_id} is busy with run {first}. Wait for it, cancel it, or set ifBusy to "
                "'enqueue' or 'interrupt'."
            )
        after_commit = AfterCommit()
        for run in runs.not_ended(transaction, session_id):
            after_commit |= self.cancel(transaction, run)
        return after_commit

    def end_or_fail(self, transaction: Transaction, run: Run, values: Mapping[str, Any]) -> AfterCommit:
        """Store the final state of a run. If that fails, end the run in error, at worst only its row.

        A run that stayed `running` would occupy its session and its worker, and block waiting clients, for ever.
        """
        for state in (values, error_columns(RunErrorCode.EXECUTION_ERROR, UNSTORABLE)):
            try:
                with transaction.savepoint():
                    return self.end(transaction, run, state)
            except StorageDown:
                raise
            except Exception:
                RunLog(log, run.id).exception("cannot store its end as %s", state["status"], event="run_end_failed")
        return self.end_row_only(transaction, run.id, UNSTORABLE) | AfterCommit(changed=(run.session_id,))

    def end_row_only(
        self, transaction: Transaction, run_id: str, message: str, code: str = RunErrorCode.EXECUTION_ERROR
    ) -> AfterCommit:
        """End a run in error without reading its row or its session, because their content may be the fault."""
        runs.end_row_only(transaction, run_id, code, message)
        return AfterCommit(changed=(run_id, end_of(run_id), EVENTS))

    def end(self, transaction: Transaction, run: Run, values: Mapping[str, Any]) -> AfterCommit:
        """Store the final state of a run unless it has ended, and update its session, approvals and events."""
        count = messages.last_index(transaction, run.id) + 1
        if runs.end(transaction, run, {**values, "messageCount": count}):
            head = run.id if values.get("hasTranscript") else None
            sessions.run_ended(transaction, run.session_id, count, values.get("costUsd") or 0.0, head)
            self._approvals.expire_all(transaction, run)
            ended = runs.get(transaction, run.id)
            self._outbox.enqueue(transaction, RUN_ENDED[ended.status], ended)
        approvals = (APPROVALS,) if run.approvals else ()
        return AfterCommit(changed=(run.id, end_of(run.id), run.session_id, *self._outbox.keys(run), *approvals))

    def cancel(self, transaction: Transaction, run: Run) -> AfterCommit:
        """End a waiting run; stop a started one after the commit."""
        if run.waiting:
            return self.end(transaction, run, {"status": RunStatus.CANCELLED})
        return AfterCommit() if run.ended else AfterCommit(cancels=(run.id,))

    def dispatch(self, transaction: Transaction) -> AfterCommit:
        """Decide which waiting runs start now: while workers are free, the first in the queue whose session is free.

        A fault is reported in the result, so that it does not undo the rest of the transaction, such as the end of
        another run.
        """
        try:
            with transaction.savepoint():
                return self.dispatch_again(transaction, include_started=transaction.uncertain)
        except StorageDown:
            raise
        except Exception:
            log.exception("cannot decide which waiting runs start, retrying", extra={"event": "dispatch_failed"})
            return AfterCommit(dispatch_failed=True)

    def dispatch_again(self, transaction: Transaction, *, include_started: bool = True) -> AfterCommit:
        """Decide the same as `dispatch`, after a fault. Another fault is raised.

        Args:
            include_started: the result includes every started run, because some may never have begun.
        """
        after_commit = AfterCommit(dispatched=True)
        if include_started:
            # The previous attempt may have committed starts whose side effects were never performed.
            started_here = runs.started(transaction, self._owner)
            after_commit |= AfterCommit(starts=tuple(self._make_start(transaction, run) for run in started_here))
        while self.open:
            started, next_id = runs.count_started_and_find_next(transaction, self._owner)
            if next_id is None or started >= self._workers:
                break
            try:
                with transaction.savepoint():
                    after_commit |= self._start(transaction, next_id)
            except StorageDown:
                raise
            except Exception:
                # It would stay the first in the queue, and no run behind it would ever start.
                RunLog(log, next_id).exception("cannot be started, ending it", event="run_start_failed")
                after_commit |= self.end_row_only(transaction, next_id, UNSTARTABLE)
        return after_commit

    def fail_started(self, transaction: Transaction, run_ids: Collection[str], reason: str) -> AfterCommit:
        """End started runs that no thread executes."""
        after_commit = AfterCommit()
        values = error_columns(RunErrorCode.EXECUTION_ERROR, reason)
        for run in runs.started(transaction, self._owner):
            if run.id in run_ids:
                after_commit |= self.end_or_fail(transaction, run, values)
        return after_commit

    def _start(self, transaction: Transaction, run_id: str) -> AfterCommit:
        """Take a waiting run out of the queue. It ends at once if its parent has no transcript."""
        run = runs.get(transaction, run_id)
        parent = self._parent(transaction, run)
        run = runs.start(transaction, run, parent.id if parent else None, self._owner)
        self._outbox.enqueue(transaction, EventType.RUN_STARTED, run)
        if run.mode != RunMode.FRESH and parent is None:
            message = "The run that this one continues left no transcript."
            return self.end(transaction, run, error_columns(RunErrorCode.SESSION_NOT_RESUMABLE, message))
        changed = (run.id, run.session_id, *self._outbox.keys(run))
        return AfterCommit(starts=(self._make_start(transaction, run),), changed=changed)

    def _make_start(self, transaction: Transaction, run: Run) -> Start:
        parent = None if run.parent_run_id is None else runs.get(transaction, run.parent_run_id)
        return Start(run, parent, runs.find_images_json(transaction, run.id) if run.image_count else None)

    def _parent(self, transaction: Transaction, run: Run) -> Run | None:
        """Return the run whose transcript this one continues. A resumed session's head is read now, at the start."""
        parent_id = run.parent_run_id
        if run.mode == RunMode.RESUME:
            parent_id = sessions.get(transaction, run.session_id).head_run_id
        return None if parent_id is None else runs.get(transaction, parent_id)

    def unfinished(self, transaction: Transaction) -> list[str]:
        """Return the ids of the runs that an earlier service left unfinished, in the order of their acceptance."""
        return runs.started_elsewhere(transaction, self._owner)

    def recover(self, transaction: Transaction, run_id: str, transcript: TranscriptEnd) -> AfterCommit:
        """End a run that an earlier service left unfinished."""
        return self.end(transaction, runs.get(transaction, run_id), {**runs.INTERRUPTED, **transcript(transaction)})


def error_columns(code: str, message: str | None) -> dict[str, Any]:
    """Return the columns of a run that ended in error."""
    return {"status": RunStatus.ERROR, "errorCode": code, "errorMessage": message}


def not_resumable(session: Session, why: str) -> SessionNotResumable:
    """Return the error for a session that cannot be continued."""
    return SessionNotResumable(f"Session {session.id} cannot be continued: {why}. Start a fresh run.")
