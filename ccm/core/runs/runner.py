"""Executes runs whose start is decided. Each has one owner until its end is stored.

The owner is `Runner._execute_to_end`, in a thread of the pool. Whatever fails on the way (Claude Code, the file system,
our own code), it ends the run's processes and stores the run's end. That frees the worker and notifies waiting clients.

The database decides; memory follows it. A run is entered here (`OngoingRun`) after the commit of its start, and removed
after the commit of its end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from ccm.core.claude.input_queue import FollowUp
from ccm.core.claude.outcome import Outcome, fault
from ccm.core.claude.processes import end_marked
from ccm.core.claude.reaper import Reaper
from ccm.core.problems import Problems
from ccm.core.run_log import RunLog
from ccm.core.runs.end_store import FIRST_DELAY, MAX_DELAY, EndStore, columns, columns_of_fault, no_transcript
from ccm.core.runs.ongoing_run import OngoingRun
from ccm.core.runs.preparation import Preparation
from ccm.core.runs.prestarts import Prestarts
from ccm.core.runs.transitions import AfterCommit, RunTransitions, Start
from ccm.core.storage.notifier import Notifier
from ccm.core.storage.writer import Writer
from ccm.core.transcripts.copying import TranscriptEnd
from ccm.core.transcripts.files import TranscriptFiles
from ccm.core.worker_pool import WorkerPool
from ccm.db.driver.transaction import Transaction
from ccm.errors import ShuttingDown, Unavailable
from ccm.models import Run, RunErrorCode, RunStatus

if TYPE_CHECKING:
    from ccm.core.claude.execution import Execution

log = logging.getLogger(__name__)

SHUT_DOWN = Outcome(RunStatus.ERROR, RunErrorCode.INTERRUPTED, "The service was shut down during this run.")
# How often a stopping service checks whether all runs have ended, in case a notification was lost (seconds).
POLL_INTERVAL = 0.5
# The number of consecutive catch-ups after which runs that still cannot begin are ended.
MAX_CATCH_UPS = 3
# How long a stopping service waits for the decisions that were taken before (seconds).
BARRIER_TIMEOUT = 2.0
# The key under which it is reported that waiting runs cannot be started.
PROBLEM = "runner"
NOT_BEGUN = "The run was started but could not be executed because of a fault; the service's log has the reason."


class Runner:
    """Executes runs, each in a thread of the pool.

    Args:
        writer: stores every change.
        notifier: notifies subscribers when a run has started or ended.
        transcripts: the transcripts of runs, on this host and in the database.
        transitions: decides how runs end and which start next.
        preparation: prepares the execution of a run.
        prestarts: the Claude Codes that wait for a run.
        reaper: ends the processes of runs if the service is killed.
        problems: receives faults that cannot be handled.
        workers: the number of runs that execute at once.
    """

    def __init__(
        self,
        writer: Writer,
        notifier: Notifier,
        transcripts: TranscriptFiles,
        transitions: RunTransitions,
        *,
        preparation: Preparation,
        prestarts: Prestarts,
        reaper: Reaper,
        problems: Problems,
        workers: int,
    ) -> None:
        self._writer = writer
        self._notifier = notifier
        self._transcripts = transcripts
        self._transitions = transitions
        self._problems = problems
        self._preparation = preparation
        self._prestarts = prestarts
        self._ends = EndStore(writer, transitions, problems, self.perform)
        self._pool = WorkerPool(workers, problems)
        self._reaper = reaper
        self._lock = threading.Lock()
        self._all_ended = threading.Condition(self._lock)
        # The runs that have begun and whose end is not stored yet, by id.
        self._ongoing: dict[str, OngoingRun] = {}
        # The number of catch-ups since side effects were last performed without a fault.
        self._catch_ups = 0
        # The ids of the runs that the last catch-up tried to begin.
        self._redispatched: set[str] = set()

    @property
    def stopping(self) -> bool:
        return not self._transitions.open

    def stop(self, deadline: float) -> bool:
        """Interrupt every run and wait until their ends are stored. Waiting runs stay in the queue for the next start.

        Args:
            deadline: the `time.monotonic()` at which to give up.

        Returns:
            False if the ends of some runs were not stored by then.
        """
        with self._lock:
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
        self._ends.give_up()

    def _await_writer(self, deadline: float) -> None:
        with suppress(Unavailable):  # it has been stopped
            write = self._writer.submit(lambda _: None)
            try:
                write.future.result(max(0.0, min(BARRIER_TIMEOUT, deadline - time.monotonic())))
            except TimeoutError as late:
                write.give_up(late)  # storage is down, so nothing can have been decided

    def fail_unrecorded(self, run_id: str, error: BaseException) -> None:
        """Fail a run because one of its messages cannot be stored: its record would have a gap."""
        message = f"A message of this run cannot be stored: {error}."
        self._stop(run_id, Outcome(RunStatus.ERROR, RunErrorCode.EXECUTION_ERROR, message))

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
            if run_id is None:
                log.exception("%s", failure, extra={"event": "runner_step_failed"})
            else:
                RunLog(log, run_id).exception("%s", failure, event="runner_step_failed")
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
        self._writer.submit(self._redispatch, self.perform).future.add_done_callback(self._retry_catch_up)

    def _retry_catch_up(self, caught_up: Future[AfterCommit]) -> None:
        error = caught_up.exception()
        if error is not None and not isinstance(error, ShuttingDown):
            log.error("cannot start waiting runs, retrying", exc_info=error, extra={"event": "dispatch_failed"})
            self._attempt(self.catch_up, "cannot start waiting runs")

    def _redispatch(self, transaction: Transaction) -> AfterCommit:
        failed = AfterCommit()
        if self._catch_ups >= MAX_CATCH_UPS:
            # Only runs of an earlier catch-up: runs that this transaction starts have had no chance to begin yet.
            not_begun = self._redispatched.difference(self._ongoing)
            failed = self._transitions.fail_started(transaction, not_begun, NOT_BEGUN)
        redispatched = self._transitions.dispatch_again(transaction)
        self._redispatched = {start.run.id for start in redispatched.starts}
        return failed | redispatched

    def _begin(self, start: Start) -> None:
        """Hand a run to a thread of the pool. End the run if that fails."""
        run = start.run
        try:
            with self._lock:
                if run.id in self._ongoing:
                    return
                ongoing = self._ongoing[run.id] = OngoingRun()
                stopping = self.stopping
            if stopping:
                ongoing.stop(SHUT_DOWN)
            self._pool.submit(partial(self._execute_to_end, start, ongoing), partial(self._fail_to_begin, run))
        except Exception as error:
            self._fail_to_begin(run, error)

    def _fail_to_begin(self, run: Run, error: BaseException) -> None:
        """End a run that could not begin. Must not block, because the caller may be the writer's thread.

        The run stays in `_ongoing` until its end is stored, so that it does not begin after all.
        """
        RunLog(log, run.id).error("cannot begin, ending it", exc_info=error, event="run_begin_failed")
        self._ends.submit(run, columns_of_fault(error), self._forget)

    # ---- in the run's thread

    def _execute_to_end(self, start: Start, ongoing: OngoingRun) -> None:
        """Take a run from its start to its stored end, whatever fails on the way."""
        run = start.run
        ids = {"run_id": run.id, "session_id": run.session_id}
        log.info(
            "run %s started: %s in session %s", run.id, run.mode, run.session_id, extra={"event": "run_started", **ids}
        )
        transcript: TranscriptEnd = no_transcript
        try:
            outcome, transcript = self._execute(start, ongoing)
            values = columns(outcome)
        except BaseException as error:
            RunLog(log, run.id).exception("failed because of a fault", event="run_failed", extra=ids)
            values = columns_of_fault(error)
        if not self._ends.store(run, values, transcript):
            # The run stays in `_ongoing`, so that it does not begin again.
            RunLog(log, run.id).error(
                "its end is not stored; the next start reports it as INTERRUPTED", event="run_end_lost", extra=ids
            )
            return
        self._forget(run.id)
        self._attempt(partial(self._prestarts.ended, run), "cannot prepare its continuation", run.id)
        detail = f", {values['errorCode']}: {values['errorMessage']}" if values["errorCode"] else ""
        log.info(
            "run %s %s after %s ms%s",
            run.id,
            values["status"],
            values.get("durationMs"),
            detail,
            extra={"event": "run_ended", **ids},
        )

    def _execute(self, start: Start, ongoing: OngoingRun) -> tuple[Outcome, TranscriptEnd]:
        """Run Claude Code and end its processes.

        Returns:
            How the run ended, and what stores the rest of its transcript.
        """
        run = start.run
        transcript = self._transcripts.begin_copy(run)
        execution: Execution | None = None
        try:
            self._reaper.watch(run.id)
            outcome = self._preparation.check(start)
            if outcome is None:
                execution = self._preparation.make_execution(start, transcript)
                ongoing.attach(execution)
                outcome = execution.run()
        except BaseException as error:
            RunLog(log, run.id).exception("its execution failed", event="run_failed")
            outcome = fault(error)
        if execution is None or execution.processes_ended:
            self._attempt(lambda: self._reaper.release(run.id), "cannot write to the reaper", run.id)
        else:
            self._end_processes(run.id)
        return outcome, transcript.finish()

    def _end_processes(self, run_id: str) -> None:
        """End the remaining processes of a run. If this process cannot find them, the reaper ends them."""
        try:
            end_marked(run_id)
            self._reaper.release(run_id)
        except Exception:
            RunLog(log, run_id).exception(
                "cannot find its processes, leaving them to the reaper", event="process_search_failed"
            )
            self._attempt(lambda: self._reaper.end(run_id), "cannot write to the reaper", run_id)

    def _forget(self, run_id: str) -> None:
        with self._all_ended:
            self._ongoing.pop(run_id, None)
            self._all_ended.notify_all()
        self._attempt(partial(self._prestarts.release, run_id), "cannot end the Claude Code reserved for it", run_id)
