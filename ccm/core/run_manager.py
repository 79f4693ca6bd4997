"""The life of runs: accepted, waiting, started, ended; started fresh, resumed, forked, cancelled.

Every decision is taken in the recorder's thread, inside the transaction that stores it (`_accept`, `_dispatch`,
`_end`, `_cancel`), and read off the database alone. So no two decisions race, and what this process remembers (the
executions that are going on) is only ever a copy, updated after the commit.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ccm.core.doorbell import Doorbell
from ccm.core.executor import Assignment, Claude, Execution
from ccm.core.history import ForkPoint, find_run, find_session
from ccm.core.pool import WorkerPool
from ccm.core.processes import end_marked
from ccm.core.recorder import Recorder
from ccm.core.sdk import transcript_path
from ccm.db import messages, runs, sessions
from ccm.db.database import Transaction
from ccm.errors import Conflict, QueueFull, Unavailable
from ccm.models import (
    CANCELLED,
    ENQUEUE,
    ERROR,
    FORK,
    FRESH,
    INTERRUPT,
    RESUME,
    RUNNING,
    Image,
    Message,
    Outcome,
    Run,
    RunRequest,
    Session,
    timestamp,
    to_json_text,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Start:
    """A run whose start is decided: the run as it is now stored, and the parent whose transcript it continues."""

    run: Run
    parent: Run | None
    images_json: str | None


@dataclass(frozen=True)
class _Effects:
    """What is to follow a commit."""

    starts: tuple[_Start, ...] = ()
    cancels: tuple[str, ...] = ()
    news: tuple[str, ...] = ()

    def __or__(self, other: _Effects) -> _Effects:
        return _Effects(self.starts + other.starts, self.cancels + other.cancels, self.news + other.news)


class RunManager:
    """Starts, resumes, forks and cancels runs.

    Args:
        recorder: takes every change.
        doorbell: rung when a run has started or ended.
        claude: what runs are made with.
        workers: runs at once.
        queue_limit: runs that may wait for a worker.
        environ: what agents inherit.
    """

    def __init__(
        self,
        recorder: Recorder,
        doorbell: Doorbell,
        claude: Claude,
        *,
        workers: int,
        queue_limit: int,
        environ: Mapping[str, str],
    ) -> None:
        self._recorder = recorder
        self._doorbell = doorbell
        self._claude = claude
        self._workers = workers
        self._queue_limit = queue_limit
        self._environ = environ
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._pool = WorkerPool(workers)
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._executions: dict[str, Execution] = {}
        self._stopping = False

    # ---- for clients

    def start(self, request: RunRequest, cwd: str) -> Run:
        """Accept a fresh run.

        Raises:
            CCMError: it is refused; then nothing is stored.
        """
        session_id = str(uuid.uuid4())
        row = self._row(request, session_id, session_id, cwd)
        return self._submit(row, request, new_session={"parentSessionId": None, "forkedFromRunId": None})

    def resume(self, request: RunRequest, session: Session, head: Run | None) -> Run:
        """Accept a run that continues a session.

        Args:
            head: the run that it would continue if it began now.

        Raises:
            CCMError: it is refused; then nothing is stored.
        """
        if head is not None:
            self._check_transcript(head, session, request.options)
        row = self._row(request, session.id, str(uuid.uuid4()), session.cwd)
        return self._submit(row, request, new_session=None)

    def fork(self, request: RunRequest, session: Session, point: ForkPoint, cwd: str | None) -> Run:
        """Accept a run that branches off a session into a new one.

        Args:
            cwd: where it runs; the session's own directory if left out.

        Raises:
            CCMError: it is refused; then nothing is stored.
        """
        parent = point.run
        if not parent.ended:
            raise Conflict(
                f"Run {parent.id} is still going on; only an ended run can be forked. Wait for it, or leave atRunId "
                "and atMessage out to fork the last ended one.",
                code="SESSION_BUSY",
            )
        self._check_transcript(parent, session, request.options)
        new_id = str(uuid.uuid4())
        row = self._row(request, new_id, new_id, cwd or session.cwd) | {
            "parentSessionId": session.id,
            "parentRunId": parent.id,
            "forkAtMessage": point.message,
            "forkAtIndex": point.index,
        }
        return self._submit(row, request, new_session={"parentSessionId": session.id, "forkedFromRunId": parent.id})

    def cancel(self, run_id: str) -> Run:
        """Have a run cancelled: at once if it waits; else it is told to stop, and `ended` says when it has.

        Raises:
            NotFound: RUN_NOT_FOUND.
            Conflict: RUN_ALREADY_ENDED, otherwise than by being cancelled.
        """

        def work(transaction: Transaction) -> tuple[Run, _Effects]:
            run = find_run(transaction, run_id)
            if run.ended and run.status != CANCELLED:
                raise Conflict(f"Run {run.id} has already ended: it is {run.status!r}.", code="RUN_ALREADY_ENDED")
            effects = self._cancel(transaction, run)
            return find_run(transaction, run_id), effects

        return self._recorder.write(work, lambda done: self._follow(done[1]))[0]

    def describe_session(self, session_id: str, values: Mapping[str, Any]) -> Session:
        """Change a session's `title` and `metadata`, whichever is given.

        Raises:
            NotFound: SESSION_NOT_FOUND.
        """
        columns = {name: values[name] for name in ("title",) if name in values}
        if "metadata" in values:
            columns["metadataJson"] = to_json_text(values["metadata"] or {})

        def work(transaction: Transaction) -> Session:
            session = find_session(transaction, session_id)
            if columns:
                sessions.update(transaction, session.id, columns)
            return find_session(transaction, session.id)

        return self._recorder.write(work)

    # ---- the life of the service

    def recover(self) -> None:
        """After a start: what the last service left in mid-run is reported, what had not begun begins."""

        def work(transaction: Transaction) -> _Effects:
            effects = _Effects()
            for run in runs.started(transaction):
                log.warning("run %s was cut off by the end of the last service: INTERRUPTED", run.id)
                end_marked(run.id)
                head = self._has_transcript(run, run.options)
                effects |= self._end(transaction, run, {**runs.interrupted(), "hasTranscript": int(head)})
            return effects | self._dispatch(transaction)

        self._recorder.write(work, self._follow)

    def stop(self, deadline: float) -> bool:
        """Interrupt every run and see their ends recorded; runs that wait stay in the queue for the next start.

        Args:
            deadline: the `time.monotonic()` at which to give up. False if runs were still going on then.
        """
        with self._lock:
            self._stopping = True
            executions = list(self._executions.values())
        for execution in executions:
            execution.fail("INTERRUPTED", "The service was shut down while this run was going on.")
        with self._idle:
            return self._idle.wait_for(lambda: not self._executions, max(0.0, deadline - time.monotonic()))

    def refused(self, run_id: str, error: Exception) -> None:
        """A message of a run cannot be stored: the run ends, for its record would have a hole."""
        execution = self._executions.get(run_id)
        if execution is not None:
            execution.fail("EXECUTION_ERROR", f"A message of this run cannot be stored: {error}.")

    @property
    def stopping(self) -> bool:
        return self._stopping

    def missing(self) -> str | None:
        """Why no run can be started, or None."""
        return self._claude.missing()

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
            "status": RUNNING,
            "cwd": cwd,
            "prompt": request.prompt,
            "optionsJson": to_json_text(dict(request.options)),
            "imageCount": len(request.images),
            "createdBy": request.created_by,
            "createdAt": timestamp(),
        }

    def _submit(self, row: Mapping[str, Any], request: RunRequest, new_session: Mapping[str, Any] | None) -> Run:
        if self._stopping:
            raise Unavailable("The service is shutting down; try again when it is back.", code="SHUTTING_DOWN")
        images = [{"mediaType": image.media_type, "data": image.data} for image in request.images]
        images_json = to_json_text(images) if images else None

        def work(transaction: Transaction) -> tuple[Run, _Effects]:
            return self._accept(transaction, row, images_json, request, new_session)

        return self._recorder.write(work, lambda accepted: self._follow(accepted[1]))[0]

    def _accept(
        self,
        transaction: Transaction,
        row: Mapping[str, Any],
        images_json: str | None,
        request: RunRequest,
        new_session: Mapping[str, Any] | None,
    ) -> tuple[Run, _Effects]:
        if transaction.uncertain and (stored := runs.find(transaction, row["id"])):
            return stored, self._dispatch(transaction)  # the commit before this try had gone through after all
        seq = runs.next_seq(transaction)
        session_id = row["sessionId"]
        effects = _Effects()
        if new_session is None:
            effects |= self._make_way(transaction, session_id, request.if_busy)
            sessions.run_added(transaction, session_id, seq, row["createdAt"])
        else:
            session = {
                "id": session_id,
                "cwd": row["cwd"],
                "title": request.title,
                "metadataJson": to_json_text(dict(request.metadata or {})),
                "firstRunAt": row["createdAt"],
                "lastRunAt": row["createdAt"],
                "lastRunSeq": seq,
            }
            sessions.insert(transaction, session | dict(new_session))
        runs.insert(transaction, dict(row) | {"seq": seq}, images_json)
        effects |= self._dispatch(transaction)
        begun = [start.run for start in effects.starts if start.run.id == row["id"]]
        run = begun[0] if begun else find_run(transaction, row["id"])
        if run.waiting and runs.count_waiting(transaction) > self._queue_limit:
            raise QueueFull(
                f"{self._queue_limit} runs are waiting already (CCM_MAX_QUEUED_RUNS). Try again when some have ended."
            )
        return run, effects

    def _make_way(self, transaction: Transaction, session_id: str, if_busy: str) -> _Effects:
        """Within a session runs follow one another: the CLI itself would let two go on and lose a prompt."""
        session = find_session(transaction, session_id)
        busy = runs.running(transaction, session_id)
        if not busy and session.head_run_id is None:
            raise _not_resumable(session, "none of its runs left a transcript")
        if not busy or if_busy == ENQUEUE:
            return _Effects()
        if if_busy != INTERRUPT:
            raise Conflict(
                f"Session {session_id} is busy with run {busy[0].id}. Wait for it, cancel it, or set ifBusy to "
                "'enqueue' or 'interrupt'.",
                code="SESSION_BUSY",
            )
        effects = _Effects()
        for run in busy:
            effects |= self._cancel(transaction, run)
        return effects

    def _check_transcript(self, parent: Run, session: Session, options: Mapping[str, Any]) -> None:
        """
        Raises:
            Conflict: SESSION_NOT_RESUMABLE.
        """
        if not os.path.isdir(session.cwd):
            raise _not_resumable(session, f"its directory {session.cwd} is not there any more")
        if not parent.has_transcript or not self._has_transcript(parent, options):
            raise _not_resumable(session, f"run {parent.id} has no transcript")

    def _has_transcript(self, run: Run, options: Mapping[str, Any]) -> bool:
        environ = {**self._environ, **options.get("env", {})}
        return transcript_path(run.cwd, run.sdk_session_id, environ).is_file()

    # ---- starting

    def _dispatch(self, transaction: Transaction) -> _Effects:
        """Decide which waiting runs start now: the first in the queue whose session is free, while workers are."""
        effects = _Effects()
        while not self._stopping:
            started, next_id = runs.queue(transaction)
            if next_id is None or started >= self._workers:
                break
            run = find_run(transaction, next_id)
            parent = self._parent(transaction, run)
            run = runs.start(transaction, run, parent.id if parent else None, self._owner)
            if run.mode != FRESH and parent is None:
                lost = "The run that this one was to continue left no transcript."
                effects |= self._end(
                    transaction,
                    run,
                    {"status": ERROR, "errorCode": "SESSION_NOT_RESUMABLE", "errorMessage": lost},
                )
                continue
            start = _Start(run, parent, runs.images_json(transaction, run.id) if run.image_count else None)
            effects |= _Effects(starts=(start,), news=(run.id, run.session_id))
        return effects

    def _parent(self, transaction: Transaction, run: Run) -> Run | None:
        """The run whose transcript this one continues: chosen when it starts, not when it was accepted."""
        if run.mode == FORK and run.parent_run_id is not None:
            return find_run(transaction, run.parent_run_id)
        if run.mode == RESUME:
            head = find_session(transaction, run.session_id).head_run_id
            return None if head is None else find_run(transaction, head)
        return None

    def _follow(self, effects: _Effects) -> None:
        """Do what follows a commit; in the recorder's thread."""
        for start in effects.starts:
            self._begin(start)
        for run_id in effects.cancels:
            execution = self._executions.get(run_id)
            if execution is not None:
                execution.cancel()
        self._doorbell.ring(effects.news)

    def _begin(self, start: _Start) -> None:
        run, parent = start.run, start.parent
        images = tuple(Image(image["mediaType"], image["data"]) for image in json.loads(start.images_json or "[]"))
        assignment = Assignment(
            run_id=run.id,
            sdk_session_id=run.sdk_session_id,
            cwd=run.cwd,
            prompt=run.prompt,
            images=images,
            options=run.options,
            resume=parent.sdk_session_id if parent else None,
            resume_at=run.fork_at_message,
        )
        execution = Execution(assignment, self._claude, self._environ, self._record(run))
        with self._lock:
            self._executions[run.id] = execution
            stopping = self._stopping
        if stopping:
            execution.fail("INTERRUPTED", "The service was shut down while this run was going on.")
        self._pool.submit(lambda: self._perform(run, execution))

    def _record(self, run: Run) -> Callable[[dict[str, Any]], Any]:
        """A function that numbers the messages of a run and hands them to the recorder."""
        index = 0

        async def record(raw: dict[str, Any]) -> None:
            nonlocal index
            message = Message(
                run_id=run.id,
                session_id=run.session_id,
                index=index,
                type=str(raw.get("type", "unknown")),
                json=to_json_text(raw),
                created_at=timestamp(),
            )
            index += 1
            await self._recorder.append(message)

        return record

    # ---- ending

    def _perform(self, run: Run, execution: Execution) -> None:
        """The whole of a run, in a thread of the pool that lives as long as the run's processes."""
        log.info("run %s started: %s in session %s", run.id, run.mode, run.session_id)
        try:
            outcome = execution.perform()
        except Exception as error:
            log.exception("run %s: the executor failed", run.id)
            outcome = Outcome(ERROR, "EXECUTION_ERROR", f"{type(error).__name__}: {error}")
        values = {
            "status": outcome.status,
            "errorCode": outcome.error_code,
            "errorMessage": outcome.error_message,
            "resultType": None if outcome.result is None else outcome.result.get("subtype"),
            "resultJson": None if outcome.result is None else to_json_text(outcome.result),
            "costUsd": outcome.cost_usd,
            "durationMs": outcome.duration_ms,
            "hasTranscript": int(outcome.has_transcript),
        }

        def work(transaction: Transaction) -> _Effects:
            ended = self._end(transaction, run, values)
            return ended | self._dispatch(transaction)

        try:
            self._recorder.submit(work, lambda effects: self._ended(run, effects)).future.result()
        except Exception:
            log.exception("run %s: its end (%s) was not stored; the next start will report it", run.id, outcome.status)
            self._ended(run, _Effects())
        else:
            detail = f" {outcome.error_code}: {outcome.error_message}" if outcome.error_code else ""
            log.info("run %s %s after %s ms%s", run.id, outcome.status, outcome.duration_ms, detail)

    def _ended(self, run: Run, effects: _Effects) -> None:
        with self._idle:
            self._executions.pop(run.id, None)
            self._idle.notify_all()
        self._follow(effects)

    def _end(self, transaction: Transaction, run: Run, values: Mapping[str, Any]) -> _Effects:
        """The final state of a run, once, and what it means for its session."""
        count = messages.last_index(transaction, run.id) + 1
        if runs.end(transaction, run, {**values, "messageCount": count}):
            head = run.id if values.get("hasTranscript") else None
            sessions.run_ended(transaction, run.session_id, count, values.get("costUsd") or 0.0, head)
        return _Effects(news=(run.id, run.session_id))

    def _cancel(self, transaction: Transaction, run: Run) -> _Effects:
        if run.waiting:
            return self._end(transaction, run, {"status": CANCELLED})
        return _Effects() if run.ended else _Effects(cancels=(run.id,))


def _not_resumable(session: Session, why: str) -> Conflict:
    return Conflict(
        f"Session {session.id} cannot be continued: {why}. Start a fresh run.", code="SESSION_NOT_RESUMABLE"
    )
