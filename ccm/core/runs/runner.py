"""Executes runs whose start is decided. Each has one owner until its end is stored.

The owner is `Runner._own`, in a thread of the pool. Whatever fails on the way (Claude Code, the file system, our own
code), it ends the run's processes and stores the run's end. That frees the worker and notifies waiting clients.

The runs that this process holds in memory only copy what is stored. They are updated after the commit.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from ccm.core.approvals.requests import Approvals
from ccm.core.claude.input_queue import FollowUp
from ccm.core.claude.outcome import Outcome
from ccm.core.claude.processes import end_marked
from ccm.core.claude.reaper import Reaper
from ccm.core.claude.run_context import CLIConfig, RunContext
from ccm.core.problems import Problems
from ccm.core.runs.ongoing_run import OngoingRun
from ccm.core.runs.transitions import AfterCommit, RunTransitions, Start
from ccm.core.storage.notifier import Notifier
from ccm.core.storage.writer import Writer
from ccm.core.transcripts.files import TranscriptFiles
from ccm.core.transcripts.store import Mirror
from ccm.core.worker_pool import WorkerPool
from ccm.db.driver.transaction import Transaction
from ccm.errors import Forbidden, ShuttingDown, StorageError, Unavailable
from ccm.json_text import storable, to_json_text
from ccm.models import Image, Message, Run, RunStatus
from ccm.timestamps import timestamp

if TYPE_CHECKING:
    from ccm.core.claude.execution import Execution

log = logging.getLogger(__name__)

SHUT_DOWN = Outcome(RunStatus.ERROR, "INTERRUPTED", "The service was shut down during this run.")
# How often a stopping service checks whether all runs have ended, in case a notification was lost (seconds).
POLL_INTERVAL = 0.5
# Delays between attempts to store an end after a fault (seconds).
FIRST_DELAY = 0.1
MAX_DELAY = 10.0
# The number of attempts to store a run's full end. After that only its row is ended.
FULL_END_ATTEMPTS = 3
# The number of consecutive catch-ups after which runs that still cannot begin are ended.
MAX_CATCH_UPS = 3
# How long a stopping service waits for the decisions that were taken before (seconds).
BARRIER_TIMEOUT = 2.0
# The key under which it is reported that waiting runs cannot be started.
PROBLEM = "runner"
UNSTORED = "the end of a run cannot be stored"
NOT_BEGUN = "The run was started but could not be executed because of a fault; the service's log has the reason."


class Runner:
    """Executes runs, each in a thread of the pool.

    Args:
        writer: stores every change.
        notifier: notifies subscribers when a run has started or ended.
        cli_config: the Claude Code to run.
        transcripts: the transcripts of runs, on this host and in the database.
        transitions: decides how runs end and which start next.
        approvals: passes permission requests on to clients.
        problems: receives faults that cannot be handled.
        workers: the number of runs that execute at once.
        allow: raises `Forbidden` if the settings no longer allow a run that is about to begin.
        environ: the environment that agents inherit.
    """

    def __init__(
        self,
        writer: Writer,
        notifier: Notifier,
        cli_config: CLIConfig,
        transcripts: TranscriptFiles,
        transitions: RunTransitions,
        *,
        approvals: Approvals,
        problems: Problems,
        workers: int,
        allow: Callable[[Run], None],
        environ: Mapping[str, str],
    ) -> None:
        self._writer = writer
        self._notifier = notifier
        self._cli_config = cli_config
        self._transcripts = transcripts
        self._transitions = transitions
        self._approvals = approvals
        self._problems = problems
        self._allow = allow
        self._environ = environ
        self._pool = WorkerPool(workers, problems)
        self._reaper = Reaper()
        self._lock = threading.Lock()
        self._all_ended = threading.Condition(self._lock)
        # The runs that have begun and whose end is not stored yet, by id.
        self._ongoing: dict[str, OngoingRun] = {}
        self._stopping = False
        # The number of catch-ups since side effects were last performed without a fault.
        self._catch_ups = 0
        # The ids of the runs that the last catch-up tried to begin.
        self._redispatched: set[str] = set()
        # Set when the service gives up. Ends that are not stored by then are left to the next start.
        self._given_up = threading.Event()

    @property
    def stopping(self) -> bool:
        return self._stopping

    def stop(self, deadline: float) -> bool:
        """Interrupt every run and wait until their ends are stored. Waiting runs stay in the queue for the next start.

        Args:
            deadline: the `time.monotonic()` at which to give up.

        Returns:
            False if the ends of some runs were not stored by then.
        """
        with self._lock:
            self._stopping = True
            self._transitions.open = False
            ongoing = dict(self._ongoing)
        try:
            for run_id, run in ongoing.items():
                if not self._attempt(partial(run.stop, SHUT_DOWN), "cannot interrupt the run", run_id):
                    self._end_processes(run_id)
            # Starts that were decided before must begin first. They begin stopped, and so their ends are stored too.
            self._attempt(lambda: self._await_writer(deadline), "cannot wait for the writer")
            with self._all_ended:
                while self._ongoing and (remaining := deadline - time.monotonic()) > 0:
                    self._all_ended.wait(min(POLL_INTERVAL, remaining))
        finally:
            remaining_runs = list(self._ongoing)
            self.give_up()
        return not remaining_runs

    def give_up(self) -> None:
        """End the processes of all remaining runs, and leave their ends to the next start. Idempotent."""
        for run_id in list(self._ongoing):
            self._end_processes(run_id)
        self._attempt(self._reaper.stop, "cannot stop the reaper")
        self._given_up.set()

    def _await_writer(self, deadline: float) -> None:
        with suppress(Unavailable):  # it has been stopped
            write = self._writer.submit(lambda _: None)
            try:
                write.future.result(max(0.0, min(BARRIER_TIMEOUT, deadline - time.monotonic())))
            except TimeoutError as late:
                write.give_up(late)  # storage is down, so nothing can have been decided

    def refused(self, run_id: str, error: BaseException) -> None:
        """Fail a run because one of its messages cannot be stored: its record would have a gap."""
        self._stop(
            run_id, Outcome(RunStatus.ERROR, "EXECUTION_ERROR", f"A message of this run cannot be stored: {error}.")
        )

    def cancel(self, run_id: str) -> None:
        """Stop a run if this process executes it."""
        self._stop(run_id, Outcome(RunStatus.CANCELLED))

    def _stop(self, run_id: str, reason: Outcome) -> None:
        ongoing = self._ongoing.get(run_id)
        if ongoing is not None:
            ongoing.stop(reason)

    def send(self, run_id: str, follow_up: FollowUp) -> bool:
        """Send a user's message to a run. Returns False if this process does not execute it."""
        ongoing = self._ongoing.get(run_id)
        if ongoing is not None:
            ongoing.send(follow_up)
        return ongoing is not None

    # ---- after a commit, in the writer's thread

    def perform(self, after_commit: AfterCommit) -> None:
        """Perform the side effects of a commit. Never raises, because callers that wait for the commit wait for this.

        Runs in the writer's thread, so it must not block.
        """
        for start in after_commit.starts:
            self._begin(start)
        for run_id in after_commit.cancels:
            self._attempt(partial(self.cancel, run_id), "cannot stop the run", run_id)
        self._attempt(lambda: self._notifier.notify(after_commit.changed), "cannot notify waiting clients of a change")
        if after_commit.dispatch_failed:
            self._attempt(self.catch_up, "cannot start waiting runs")
        elif after_commit.dispatched:
            self._catch_ups = 0
            self._attempt(lambda: self._problems.clear(PROBLEM), "cannot clear a fault that is over")

    def _attempt(self, step: Callable[[], object], failure: str, run_id: str | None = None) -> bool:
        """Run one step of several. A fault is logged as `failure`, so that it does not prevent the other steps.

        Returns:
            False if the step failed.
        """
        try:
            step()
        except Exception:
            extra = {"event": "runner_step_failed"}
            if run_id is None:
                log.exception("%s", failure, extra=extra)
            else:
                log.exception("run %s: %s", run_id, failure, extra={**extra, "run_id": run_id})
            return False
        return True

    def catch_up(self) -> None:
        """Begin runs and take decisions that a fault prevented. Retried until it succeeds.

        From MAX_CATCH_UPS attempts on, a started run that still has not begun is ended: a run without an owner must
        not stay `running`.
        """
        self._catch_ups += 1
        if self._catch_ups > MAX_CATCH_UPS:
            self._problems.report(PROBLEM, "waiting runs cannot be started")
        pause = 0.0 if self._catch_ups == 1 else min(FIRST_DELAY * 2 ** min(self._catch_ups, 10), MAX_DELAY)
        self._writer.call_later(pause, self._submit_catch_up)

    def _submit_catch_up(self) -> None:
        work = self._fail_and_redispatch if self._catch_ups >= MAX_CATCH_UPS else self._redispatch
        self._writer.submit(work, self.perform).future.add_done_callback(self._retry_catch_up)

    def _retry_catch_up(self, caught_up: Future[AfterCommit]) -> None:
        error = caught_up.exception()
        if error is not None and not isinstance(error, ShuttingDown):
            log.error("cannot start waiting runs, retrying", exc_info=error, extra={"event": "dispatch_failed"})
            self._attempt(self.catch_up, "cannot start waiting runs")

    def _redispatch(self, transaction: Transaction) -> AfterCommit:
        after_commit = self._transitions.dispatch_again(transaction)
        self._redispatched = {start.run.id for start in after_commit.starts}
        return after_commit

    def _fail_and_redispatch(self, transaction: Transaction) -> AfterCommit:
        # Only runs of an earlier catch-up: runs that this transaction starts have had no chance to begin yet.
        not_begun = self._redispatched.difference(self._ongoing)
        failed = self._transitions.fail_started(transaction, not_begun, NOT_BEGUN)
        return failed | self._redispatch(transaction)

    def _begin(self, start: Start) -> None:
        """Hand a run to a thread of the pool. End the run if that fails."""
        run = start.run
        try:
            with self._lock:
                if run.id in self._ongoing:
                    return
                ongoing = self._ongoing[run.id] = OngoingRun()
                stopping = self._stopping
            if stopping:
                ongoing.stop(SHUT_DOWN)
            self._pool.submit(partial(self._own, start, ongoing), partial(self._fail_to_begin, run))
        except Exception as error:
            self._fail_to_begin(run, error)

    def _fail_to_begin(self, run: Run, error: BaseException) -> None:
        """End a run that could not begin. Must not block, because the caller may be the writer's thread.

        The run stays in `_ongoing` until its end is stored, so that it does not begin after all.
        """
        log.error(
            "run %s cannot begin, ending it",
            run.id,
            exc_info=error,
            extra={"event": "run_begin_failed", "run_id": run.id},
        )
        self._end_without_thread(run, _failed(error), 0)

    def _end_without_thread(self, run: Run, values: Mapping[str, Any], refused: int) -> None:
        """Store the end of a run without waiting for it. Retried until it is stored.

        Args:
            refused: the number of failed attempts.
        """

        def check(stored: Future[AfterCommit]) -> None:
            error = stored.exception()
            if error is None:
                self._problems.clear(key)
                self._forget(run.id)
            elif isinstance(error, ShuttingDown):
                self._forget(run.id)  # the next start reports it
            else:
                self._problems.report(key, UNSTORED, error)
                pause = min(FIRST_DELAY * 2 ** min(refused, 10), MAX_DELAY)
                self._writer.call_later(pause, lambda: self._end_without_thread(run, values, refused + 1))

        key = f"run {run.id}"
        end = self._end if refused < FULL_END_ATTEMPTS else self._end_row_only
        try:
            self._writer.submit(partial(end, run, values), self.perform).future.add_done_callback(check)
        except Unavailable:
            self._forget(run.id)

    # ---- in the run's thread

    def _own(self, start: Start, ongoing: OngoingRun) -> None:
        """Take a run from its start to its stored end, whatever fails on the way."""
        run = start.run
        ids = {"run_id": run.id, "session_id": run.session_id}
        log.info(
            "run %s started: %s in session %s", run.id, run.mode, run.session_id, extra={"event": "run_started", **ids}
        )
        transcript: dict[str, Any] = {}
        try:
            outcome, transcript = self._execute(start, ongoing)
            values = _columns(outcome) | transcript
        except BaseException as error:
            log.exception("run %s failed because of a fault", run.id, extra={"event": "run_failed", **ids})
            values = _failed(error) | transcript
        if not self._store_end(run, values):
            # The run stays in `_ongoing`, so that it does not begin again.
            log.error(
                "run %s: its end is not stored; the next start reports it as INTERRUPTED",
                run.id,
                extra={"event": "run_end_lost", **ids},
            )
            return
        self._forget(run.id)
        detail = f", {values['errorCode']}: {values['errorMessage']}" if values["errorCode"] else ""
        log.info(
            "run %s %s after %s ms%s",
            run.id,
            values["status"],
            values.get("durationMs"),
            detail,
            extra={"event": "run_ended", **ids},
        )

    def _execute(self, start: Start, ongoing: OngoingRun) -> tuple[Outcome, dict[str, Any]]:
        """Run Claude Code and end its processes.

        Returns:
            How the run ended, and the values of `hasTranscript` and `transcriptStored`.
        """
        run = start.run
        mirror = self._transcripts.mirror(run)
        execution: Execution | None = None
        try:
            self._reaper.watch(run.id)
            refusal = self._check_allowed(run)
            if refusal is None and start.parent is not None:
                refusal = self._provide_transcript(start.parent, run)
            if refusal is None:
                execution = self._make_execution(start, mirror)
                ongoing.attach(execution)
                outcome = execution.run()
            else:
                outcome = refusal
        except BaseException as error:
            log.exception("run %s: its execution failed", run.id, extra={"event": "run_failed", "run_id": run.id})
            outcome = Outcome(RunStatus.ERROR, "EXECUTION_ERROR", f"{type(error).__name__}: {error}")
        if execution is None or execution.processes_ended:
            self._attempt(lambda: self._reaper.release(run.id), "cannot write to the reaper", run.id)
        else:
            self._end_processes(run.id)
        complete = execution is not None and execution.closed_by_itself
        return outcome, self._transcripts.keep(run, mirror, complete=complete)

    def _make_execution(self, start: Start, mirror: Mirror) -> Execution:
        # Imported here because the SDK takes longer to import than the rest of a start.
        from ccm.core.claude.execution import Execution  # noqa: PLC0415

        run, parent = start.run, start.parent
        context = RunContext(
            run_id=run.id,
            sdk_session_id=run.sdk_session_id,
            cwd=run.cwd,
            prompt=run.prompt,
            images=tuple(Image(image["mediaType"], image["data"]) for image in json.loads(start.images_json or "[]")),
            options=run.options.value,
            timeout_ms=run.timeout_ms,
            resume=parent.sdk_session_id if parent else None,
            resume_at=run.fork_at_message,
        )
        ask = partial(self._approvals.ask, run) if run.approvals else None
        return Execution(context, self._cli_config, self._environ, self._record(run), mirror, ask=ask)

    def _record(self, run: Run) -> Callable[[dict[str, Any]], Any]:
        """Return a function that numbers the messages of a run and hands them to the writer."""
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
            await self._writer.append(message)
            return message.index

        return record

    def _check_allowed(self, run: Run) -> Outcome | None:
        """Return how the run ends if the settings forbid it: a restart while it was waiting may have changed them."""
        try:
            self._allow(run)
        except Forbidden as error:
            return Outcome(RunStatus.ERROR, error.code, error.message)
        return None

    def _provide_transcript(self, parent: Run, run: Run) -> Outcome | None:
        """Put the parent's transcript where Claude Code finds it. Return how the run ends if that is impossible."""
        try:
            if self._transcripts.provide(parent, run):
                return None
            reason = "it is neither on this host nor complete in the database"
        except (OSError, StorageError) as error:
            log.exception(
                "run %s: cannot write the transcript of run %s to a file",
                run.id,
                parent.id,
                extra={"event": "transcript_restore_failed", "run_id": run.id},
            )
            reason = f"it could not be written to a file: {error}"
        message = f"The transcript of run {parent.id}, which this run continues, is missing: {reason}."
        return Outcome(RunStatus.ERROR, "SESSION_NOT_RESUMABLE", message)

    def _end_processes(self, run_id: str) -> None:
        """End the remaining processes of a run. If this process cannot find them, the reaper ends them."""
        try:
            end_marked(run_id)
            self._reaper.release(run_id)
        except Exception:
            log.exception(
                "run %s: cannot find its processes, leaving them to the reaper",
                run_id,
                extra={"event": "process_search_failed", "run_id": run_id},
            )
            self._attempt(lambda: self._reaper.end(run_id), "cannot write to the reaper", run_id)

    # ---- the end

    def _store_end(self, run: Run, values: Mapping[str, Any]) -> bool:
        """Store the end of a run and wait until it is committed, however long that takes.

        Returns:
            False if the service gives up before.
        """
        stored = False

        def perform(after_commit: AfterCommit) -> None:
            # Set first, because the end is stored even if a side effect fails.
            nonlocal stored
            stored = True
            self.perform(after_commit)

        pause = FIRST_DELAY
        key = f"run {run.id}"
        refused = 0
        while True:
            end = self._end if refused < FULL_END_ATTEMPTS else self._end_row_only
            try:
                self._writer.submit(partial(end, run, values), perform).future.result()
            except Exception as error:
                self._problems.report(key, UNSTORED, error)
                # Unavailable storage is no reason to give up the full end: nothing is wrong with the end itself.
                refused += not isinstance(error, Unavailable)
            if stored:
                self._problems.clear(key)
                return True
            if self._given_up.wait(pause):
                return False
            pause = min(pause * 2, MAX_DELAY)

    def _end(self, run: Run, values: Mapping[str, Any], transaction: Transaction) -> AfterCommit:
        """End a run and decide which starts next. A run of which a message was refused ends in error."""
        refusal = self._writer.broken.get(run.id)
        if refusal is not None:
            message = f"A message of this run cannot be stored: {refusal}."
            values = {
                **values,
                "status": RunStatus.ERROR,
                "errorCode": "EXECUTION_ERROR",
                "errorMessage": storable(message),
            }
        return self._transitions.end_or_fail(transaction, run, values) | self._transitions.dispatch(transaction)

    def _end_row_only(self, run: Run, _values: Mapping[str, Any], transaction: Transaction) -> AfterCommit:
        """End a run by its row alone, because `_end` has failed. Which run starts next is decided separately."""
        return self._transitions.end_row_only(transaction, run) | AfterCommit(dispatch_failed=True)

    def _forget(self, run_id: str) -> None:
        with self._all_ended:
            self._ongoing.pop(run_id, None)
            self._all_ended.notify_all()


def _columns(outcome: Outcome) -> dict[str, Any]:
    """Return the columns of a run that ended with `outcome`."""
    return {
        "status": outcome.status,
        "errorCode": outcome.error_code,
        "errorMessage": storable(outcome.error_message),
        "resultType": None if outcome.result is None else storable(outcome.result.get("subtype")),
        "resultJson": None if outcome.result is None else to_json_text(outcome.result),
        "costUsd": outcome.cost_usd,
        "durationMs": outcome.duration_ms,
    }


def _failed(error: BaseException) -> dict[str, Any]:
    """Return the columns of a run that ended because of a fault."""
    message = storable(f"{type(error).__name__}: {error}")
    return {"status": RunStatus.ERROR, "errorCode": "EXECUTION_ERROR", "errorMessage": message}
