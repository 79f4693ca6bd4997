"""What follows the decisions on runs: threads, executions, and whoever waits.

What this process remembers (the executions that are going on) is only ever a copy of what is stored, updated after the
commit.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ccm.core.approvals import Approvals
from ccm.core.assignment import Assignment, Claude
from ccm.core.doorbell import Doorbell
from ccm.core.executor import Execution
from ccm.core.follow_ups import FollowUp
from ccm.core.lifecycle import Effects, Lifecycle, Start
from ccm.core.pool import WorkerPool
from ccm.core.processes import end_marked
from ccm.core.reaper import Reaper
from ccm.core.recorder import Recorder
from ccm.core.transcript_files import TranscriptFiles
from ccm.core.transcript_store import Mirror
from ccm.db.database import Transaction
from ccm.errors import Forbidden, StorageError
from ccm.models import ERROR, Image, Message, Outcome, Run, storable, timestamp, to_json_text

log = logging.getLogger(__name__)


class Runner:
    """Carries out runs whose start is decided, each in a thread of the pool.

    Args:
        recorder: takes every change.
        doorbell: rung when a run has started or ended.
        claude: what runs are made with.
        transcripts: those of runs, here and in the database.
        lifecycle: decides what their ends mean.
        approvals: puts their questions to clients.
        workers: runs at once.
        allow: raises `Forbidden` where a run that is about to begin is not allowed any more.
        environ: what agents inherit.
    """

    def __init__(
        self,
        recorder: Recorder,
        doorbell: Doorbell,
        claude: Claude,
        transcripts: TranscriptFiles,
        lifecycle: Lifecycle,
        *,
        approvals: Approvals,
        workers: int,
        allow: Callable[[Run], None],
        environ: Mapping[str, str],
    ) -> None:
        self._recorder = recorder
        self._doorbell = doorbell
        self._claude = claude
        self._transcripts = transcripts
        self._lifecycle = lifecycle
        self._approvals = approvals
        self._allow = allow
        self._environ = environ
        self._pool = WorkerPool(workers)
        self._reaper = Reaper()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._executions: dict[str, Execution] = {}
        self._stopping = False

    @property
    def stopping(self) -> bool:
        return self._stopping

    def stop(self, deadline: float) -> bool:
        """Interrupt every run and see their ends recorded; runs that wait stay in the queue for the next start.

        Args:
            deadline: the `time.monotonic()` at which to give up. False if runs were still going on then.
        """
        with self._lock:
            self._stopping = True
            self._lifecycle.open = False
            executions = list(self._executions.values())
        for execution in executions:
            execution.fail("INTERRUPTED", "The service was shut down while this run was going on.")
        with self._idle:
            ended = self._idle.wait_for(lambda: not self._executions, max(0.0, deadline - time.monotonic()))
            left = list(self._executions)
        for run_id in left:
            end_marked(run_id)
        self._reaper.stop()
        return ended

    def refused(self, run_id: str, error: Exception) -> None:
        """A message of a run cannot be stored: the run ends, for its record would have a hole."""
        execution = self._executions.get(run_id)
        if execution is not None:
            execution.fail("EXECUTION_ERROR", f"A message of this run cannot be stored: {error}.")

    def cancel(self, run_id: str) -> None:
        """Have a run stop, if it goes on here."""
        execution = self._executions.get(run_id)
        if execution is not None:
            execution.cancel()

    def send(self, run_id: str, follow_up: FollowUp) -> bool:
        """Put a user's message into a run. False if it does not go on here."""
        execution = self._executions.get(run_id)
        if execution is not None:
            execution.send(follow_up)
        return execution is not None

    # ---- starting

    def follow(self, effects: Effects) -> None:
        """Do what follows a commit; in the recorder's thread."""
        for start in effects.starts:
            try:
                self._begin(start)
            except Exception:
                log.exception("run %s could not be begun", start.run.id)
                values = {"status": ERROR, "errorCode": "EXECUTION_ERROR", "errorMessage": "It could not be begun."}
                self._recorder.submit(partial(self._lifecycle.end, run=start.run, values=values))
        for run_id in effects.cancels:
            self.cancel(run_id)
        self._doorbell.ring(effects.news)

    def _begin(self, start: Start) -> None:
        run, parent = start.run, start.parent
        if run.id in self._executions:
            return
        images = tuple(Image(image["mediaType"], image["data"]) for image in json.loads(start.images_json or "[]"))
        assignment = Assignment(
            run_id=run.id,
            sdk_session_id=run.sdk_session_id,
            cwd=run.cwd,
            prompt=run.prompt,
            images=images,
            options=run.options,
            timeout_ms=run.timeout_ms,
            resume=parent.sdk_session_id if parent else None,
            resume_at=run.fork_at_message,
        )
        mirror = self._transcripts.mirror(run)
        ask = partial(self._approvals.ask, run) if run.approvals else None
        execution = Execution(assignment, self._claude, self._environ, self._record(run), mirror, ask=ask)
        with self._lock:
            self._executions[run.id] = execution
            stopping = self._stopping
        if stopping:
            execution.fail("INTERRUPTED", "The service was shut down while this run was going on.")
        self._pool.submit(lambda: self._perform(run, parent, execution, mirror))

    def _record(self, run: Run) -> Callable[[dict[str, Any]], Any]:
        """A function that numbers the messages of a run and hands them to the recorder."""
        index = 0

        async def record(raw: dict[str, Any]) -> int:
            nonlocal index
            message = Message(
                run_id=run.id,
                session_id=run.session_id,
                index=index,
                type=storable(raw.get("type")) or "unknown",
                json=to_json_text(raw),
                created_at=timestamp(),
            )
            index += 1
            await self._recorder.append(message)
            return message.index

        return record

    # ---- ending

    def _perform(self, run: Run, parent: Run | None, execution: Execution, mirror: Mirror) -> None:
        """The whole of a run, in a thread of the pool that lives as long as the run's processes."""
        log.info("run %s started: %s in session %s", run.id, run.mode, run.session_id)
        try:
            self._reaper.watch(run.id)
            lost = self._forbid(run) or (None if parent is None else self._provide(parent, run))
            outcome = lost or execution.perform()
        except Exception as error:
            log.exception("run %s: the executor failed", run.id)
            outcome = Outcome(ERROR, "EXECUTION_ERROR", f"{type(error).__name__}: {error}")
        self._reaper.release(run.id)
        values = {
            "status": outcome.status,
            "errorCode": outcome.error_code,
            "errorMessage": storable(outcome.error_message),
            "resultType": None if outcome.result is None else storable(outcome.result.get("subtype")),
            "resultJson": None if outcome.result is None else to_json_text(outcome.result),
            "costUsd": outcome.cost_usd,
            "durationMs": outcome.duration_ms,
            **self._transcripts.keep(run, mirror, complete=execution.closed_by_itself),
        }

        if not self._store_end(run, values):
            unsaid = "The end of this run could not be stored as it was; the service's log says more."
            self._store_end(run, {"status": ERROR, "errorCode": "EXECUTION_ERROR", "errorMessage": unsaid})
        self._ended(run)
        detail = f", {outcome.error_code}: {outcome.error_message}" if outcome.error_code else ""
        log.info("run %s %s after %s ms%s", run.id, outcome.status, outcome.duration_ms, detail)

    def _forbid(self, run: Run) -> Outcome | None:
        """How a run ends that the settings forbid by now: it may have waited through a restart that changed them."""
        try:
            self._allow(run)
        except Forbidden as error:
            return Outcome(ERROR, error.code, error.message)
        return None

    def _provide(self, parent: Run, run: Run) -> Outcome | None:
        """Have the transcript of a parent at hand; how the run ends if there is none."""
        try:
            if self._transcripts.provide(parent, run):
                return None
            reason = "it is neither on this host nor whole in the database"
        except (OSError, StorageError) as error:
            log.exception("run %s: the transcript of run %s could not be written back", run.id, parent.id)
            reason = f"it could not be written back: {error}"
        message = f"The transcript of run {parent.id}, which this one was to continue, is not there: {reason}."
        return Outcome(ERROR, "SESSION_NOT_RESUMABLE", message)

    def _store_end(self, run: Run, values: Mapping[str, Any]) -> bool:
        """Wait until the end of a run is committed, as long as it takes; False if it is refused."""

        def work(transaction: Transaction) -> Effects:
            refusal = self._recorder.broken(run.id)
            told = values
            if refusal is not None:
                message = f"A message of this run cannot be stored: {refusal}."
                told = {**values, "status": ERROR, "errorCode": "EXECUTION_ERROR", "errorMessage": storable(message)}
            return self._lifecycle.end(transaction, run, told) | self._lifecycle.dispatch(transaction)

        try:
            self._recorder.submit(work, self.follow).future.result()
        except Exception:
            log.exception("run %s: its end was not stored", run.id)
            return False
        return True

    def _ended(self, run: Run) -> None:
        with self._idle:
            self._executions.pop(run.id, None)
            self._idle.notify_all()
