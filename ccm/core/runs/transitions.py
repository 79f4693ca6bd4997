"""The decisions in the life of runs: which is accepted, which starts next, how one ends.

Each is taken inside the transaction that stores it, in the writer's thread, and read off the database alone, so no
two of them race. What is to happen then outside of the database is given back as `Effects`, for after the commit.
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
from ccm.core.runs.request import Accepted, IfBusy, RunRequest
from ccm.core.storage.notifier import APPROVALS, EVENTS
from ccm.core.webhooks.outbox import Outbox
from ccm.db import messages, runs, sessions
from ccm.db.driver.transaction import Transaction
from ccm.errors import QueueFull, SessionBusy, SessionNotResumable, StorageDown
from ccm.models import RUN_ENDED, EventType, Run, RunMode, RunStatus, Session

log = logging.getLogger(__name__)

UNSTORABLE = "The end of this run could not be stored as it was; the service's log says more."
UNSTARTABLE = "The run could not be started, because of a fault; the service's log says more."
UNRECOVERABLE = "The service ended while this run was going on, and it could not be recovered; the log says more."


@dataclass(frozen=True)
class Start:
    """A run whose start is decided: the run as it is now stored, and the parent whose transcript it continues."""

    run: Run
    parent: Run | None
    images_json: str | None


@dataclass(frozen=True)
class AfterCommit:
    """What is to follow a commit."""

    starts: tuple[Start, ...] = ()
    cancels: tuple[str, ...] = ()
    news: tuple[str, ...] = ()
    # Whether it was decided which waiting runs start; and whether a fault has kept that from being decided.
    dispatched: bool = False
    again: bool = False

    def __or__(self, other: AfterCommit) -> AfterCommit:
        return AfterCommit(
            self.starts + other.starts,
            self.cancels + other.cancels,
            self.news + other.news,
            self.dispatched or other.dispatched,
            self.again or other.again,
        )


class RunTransitions:
    """
    Args:
        workers: runs at once.
        queue_limit: runs that may wait for a worker.
        outbox: told of what happens to runs.
        approvals: has what a run waits for expire when it ends.
    """

    def __init__(self, workers: int, queue_limit: int, outbox: Outbox, approvals: ApprovalTransitions) -> None:
        self._workers = workers
        self._queue_limit = queue_limit
        self._outbox = outbox
        self._approvals = approvals
        # The name of this service in the rows of its runs.
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        # While it is False no waiting run starts.
        self.open = True

    def accept(
        self,
        transaction: Transaction,
        row: Mapping[str, Any],
        images_json: str | None,
        request: RunRequest,
        new_session: Mapping[str, Any] | None,
    ) -> tuple[Accepted, AfterCommit]:
        """Store a run, in the queue or at once started.

        Args:
            row: the run as far as it is known before it starts.
            new_session: what is particular to the session that it opens; None if it adds to one.

        Raises:
            SessionBusy, SessionNotResumable: the session takes no run.
            KeyReused: the request's key belongs to another request.
            QueueFull: too many runs are waiting.
        """
        if transaction.uncertain and (stored := runs.find(transaction, row["id"])):
            # The commit before this try had gone through after all; what was to follow it still is.
            after_commit = self.dispatch(transaction)
            if request.if_busy == IfBusy.INTERRUPT:
                others = [run for run in runs.running(transaction, row["sessionId"]) if run.seq < stored.seq]
                after_commit |= AfterCommit(cancels=tuple(run.id for run in others if not run.waiting))
            return Accepted(stored, replayed=False), after_commit
        key = request.idempotency_key
        earlier = None if key is None else runs.find_by_idempotency_key(transaction, key)
        if earlier is not None:
            # Its twin was quicker: both had found nothing when they looked.
            return Accepted(earlier, replayed=True), AfterCommit()
        seq = runs.next_seq(transaction)
        session_id = row["sessionId"]
        after_commit = AfterCommit()
        if new_session is None:
            after_commit |= self._make_way(transaction, session_id, request.if_busy)
            sessions.run_added(transaction, session_id, seq, row["createdAt"])
        else:
            session = {
                "id": session_id,
                "cwd": row["cwd"],
                **Session.to_columns({"title": None, "metadata": None, **request.described}),
                "firstRunAt": row["createdAt"],
                "lastRunAt": row["createdAt"],
                "lastRunSeq": seq,
            }
            sessions.insert(transaction, session | dict(new_session))
        runs.insert(transaction, dict(row) | {"seq": seq}, images_json)
        self._outbox.enqueue(transaction, EventType.RUN_CREATED, runs.get(transaction, row["id"]))
        after_commit |= AfterCommit(news=(EVENTS,)) | self.dispatch(transaction)
        begun = [start.run for start in after_commit.starts if start.run.id == row["id"]]
        run = begun[0] if begun else runs.get(transaction, row["id"])
        if run.waiting and runs.count_waiting(transaction) > self._queue_limit:
            raise QueueFull(
                f"{self._queue_limit} runs are waiting already (CCM_MAX_QUEUED_RUNS). Try again when some have ended."
            )
        return Accepted(run, replayed=False), after_commit

    def _make_way(self, transaction: Transaction, session_id: str, if_busy: str) -> AfterCommit:
        """Within a session runs follow one another: the CLI itself would let two go on and lose a prompt."""
        session = sessions.get(transaction, session_id)
        first = runs.find_first_running(transaction, session_id)
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
        for run in runs.running(transaction, session_id):
            after_commit |= self.cancel(transaction, run)
        return after_commit

    def end_surely(self, transaction: Transaction, run: Run, values: Mapping[str, Any]) -> AfterCommit:
        """Store the final state of a run; without what it means for others, where that fails.

        A run that stayed `running` would hold its session, its worker and whoever waits for it, for ever.
        """
        plain = {"status": RunStatus.ERROR, "errorCode": "EXECUTION_ERROR", "errorMessage": UNSTORABLE}
        for told in (values, plain):
            try:
                with transaction.savepoint():
                    return self.end(transaction, run, told)
            except StorageDown:
                raise
            except Exception:
                log.exception("run %s: its end cannot be stored as it is", run.id)
        return self.end_alone(transaction, run)

    def end_alone(self, transaction: Transaction, run: Run) -> AfterCommit:
        """End a run in error, whatever keeps its end from being stored as it is."""
        return self._end_alone(transaction, run.id, "EXECUTION_ERROR", UNSTORABLE) | AfterCommit(news=(run.session_id,))

    def _end_alone(self, transaction: Transaction, run_id: str, code: str, message: str) -> AfterCommit:
        """End a run in error, and touch nothing else: what its row or its session holds may be the fault."""
        runs.end_alone(transaction, run_id, code, message)
        return AfterCommit(news=(run_id, EVENTS))

    def end(self, transaction: Transaction, run: Run, values: Mapping[str, Any]) -> AfterCommit:
        """Store the final state of a run, once, and what it means for its session."""
        count = messages.last_index(transaction, run.id) + 1
        if runs.end(transaction, run, {**values, "messageCount": count}):
            head = run.id if values.get("hasTranscript") else None
            sessions.run_ended(transaction, run.session_id, count, values.get("costUsd") or 0.0, head)
            self._approvals.expire_all(transaction, run)
            ended = runs.get(transaction, run.id)
            self._outbox.enqueue(transaction, RUN_ENDED[ended.status], ended)
        return AfterCommit(news=(run.id, run.session_id, EVENTS, *((APPROVALS,) if run.approvals else ())))

    def cancel(self, transaction: Transaction, run: Run) -> AfterCommit:
        """A waiting run ends at once; a started one is to be told."""
        if run.waiting:
            return self.end(transaction, run, {"status": RunStatus.CANCELLED})
        return AfterCommit() if run.ended else AfterCommit(cancels=(run.id,))

    def dispatch(self, transaction: Transaction) -> AfterCommit:
        """Decide which waiting runs start now: the first in the queue whose session is free, while workers are.

        What shares the transaction, the end of another run say, does not fail with it.
        """
        try:
            with transaction.savepoint():
                return self._dispatch(transaction, unfollowed=transaction.uncertain)
        except StorageDown:
            raise
        except Exception:
            log.exception("it cannot be decided which waiting runs start")
            return AfterCommit(again=True)

    def dispatch_again(self, transaction: Transaction) -> AfterCommit:
        """The same after a fault: with the starts that were decided before and that nobody may have followed."""
        return self._dispatch(transaction, unfollowed=True)

    def fail_started(self, transaction: Transaction, run_ids: Collection[str], reason: str) -> AfterCommit:
        """End runs that were started and that nobody carries out."""
        after_commit = AfterCommit()
        values = {"status": RunStatus.ERROR, "errorCode": "EXECUTION_ERROR", "errorMessage": reason}
        for run in runs.started(transaction, self._owner):
            if run.id in run_ids:
                after_commit |= self.end_surely(transaction, run, values)
        return after_commit

    def _dispatch(self, transaction: Transaction, *, unfollowed: bool) -> AfterCommit:
        after_commit = AfterCommit(dispatched=True)
        if unfollowed:
            # A start that was decided in the try before may have been committed, and nobody has followed it.
            started_here = runs.started(transaction, self._owner)
            after_commit |= AfterCommit(starts=tuple(self._start_of(transaction, run) for run in started_here))
        while self.open:
            started, next_id = runs.queue(transaction, self._owner)
            if next_id is None or started >= self._workers:
                break
            try:
                with transaction.savepoint():
                    after_commit |= self._start(transaction, next_id)
            except StorageDown:
                raise
            except Exception:
                # It would be the next in the queue again and again, and nothing behind it would ever start.
                log.exception("run %s cannot be started", next_id)
                after_commit |= self._end_alone(transaction, next_id, "EXECUTION_ERROR", UNSTARTABLE)
        return after_commit

    def _start(self, transaction: Transaction, run_id: str) -> AfterCommit:
        """A waiting run leaves the queue."""
        run = runs.get(transaction, run_id)
        parent = self._parent(transaction, run)
        run = runs.start(transaction, run, parent.id if parent else None, self._owner)
        self._outbox.enqueue(transaction, EventType.RUN_STARTED, run)
        if run.mode != RunMode.FRESH and parent is None:
            lost = "The run that this one was to continue left no transcript."
            values = {"status": RunStatus.ERROR, "errorCode": "SESSION_NOT_RESUMABLE", "errorMessage": lost}
            return self.end(transaction, run, values)
        return AfterCommit(starts=(self._start_of(transaction, run),), news=(run.id, run.session_id, EVENTS))

    def _start_of(self, transaction: Transaction, run: Run) -> Start:
        parent = None if run.parent_run_id is None else runs.get(transaction, run.parent_run_id)
        return Start(run, parent, runs.find_images_json(transaction, run.id) if run.image_count else None)

    def _parent(self, transaction: Transaction, run: Run) -> Run | None:
        """The run whose transcript this one continues: chosen when it starts, not when it was accepted."""
        if run.mode == RunMode.FORK and run.parent_run_id is not None:
            return runs.get(transaction, run.parent_run_id)
        if run.mode == RunMode.RESUME:
            head = sessions.get(transaction, run.session_id).head_run_id
            return None if head is None else runs.get(transaction, head)
        return None

    def left(self, transaction: Transaction) -> list[str]:
        """The ids of the runs that an earlier service left in the middle, in the order of their acceptance."""
        return runs.started_elsewhere(transaction, self._owner)

    def recover(self, transaction: Transaction, run_id: str, transcript: Mapping[str, Any]) -> AfterCommit:
        """End a run that an earlier service left in the middle.

        Args:
            transcript: what is to be said of its transcript.
        """
        return self.end(transaction, runs.get(transaction, run_id), {**runs.INTERRUPTED, **transcript})

    def recover_alone(self, transaction: Transaction, run_id: str) -> AfterCommit:
        """End such a run though its row, or what belongs to it, cannot be read."""
        return self._end_alone(transaction, run_id, "INTERRUPTED", UNRECOVERABLE)


def not_resumable(session: Session, why: str) -> SessionNotResumable:
    return SessionNotResumable(f"Session {session.id} cannot be continued: {why}. Start a fresh run.")
