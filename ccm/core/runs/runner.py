"""Carries out runs whose start is decided: each has one owner, from the decision to its stored end.

The owner is `Runner._own`, in a thread of the pool. Whatever raises on the way (Claude Code, the file system, a fault
of ours), the run's processes are ended, its end is stored, and with that the worker is free and whoever waits is told.

What this process remembers of runs is only ever a copy of what is stored, updated after the commit.
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

SHUT_DOWN = Outcome(RunStatus.ERROR, "INTERRUPTED", "The service was shut down while this run was going on.")
# How often the end of the last run is looked for by a service that stops, should it not be told (seconds).
POLL_INTERVAL = 0.5
# Pauses between tries to store an end that was not stored because of a fault (seconds).
FIRST_DELAY = 0.1
MAX_DELAY = 10.0
# How often that is tried with all that the end says.
TRIES_AS_IT_IS = 3
# How often in a row what was committed is tried to be followed before starts that cannot be are ended.
MOST_UNFOLLOWED = 3
# How long a service that stops waits for what was decided before (seconds).
BARRIER_TIMEOUT = 2.0
# The key of the fault that it cannot be.
PROBLEM = "runner"
UNSTORED = "the end of a run cannot be stored"
UNFOLLOWED = "The run was started and could not be carried out, because of a fault; the service's log says more."


class Runner:
    """Carries out runs, each in a thread of the pool.

    Args:
        writer: takes every change.
        notifier: rung when a run has started or ended.
        claude: what runs are made with.
        transcripts: those of runs, here and in the database.
        lifecycle: decides what their ends mean.
        approvals: puts their questions to clients.
        problems: told of what cannot be handled.
        workers: runs at once.
        allow: raises `Forbidden` where a run that is about to begin is not allowed any more.
        environ: what agents inherit.
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
        # From the decision to start a run until its end is stored.
        self._ongoing: dict[str, OngoingRun] = {}
        self._stopping = False
        # How often in a row what was committed could not be followed.
        self._unfollowed = 0
        # The runs whose start was looked at again then.
        self._decided: set[str] = set()
        # Set when the service gives up: what is not stored by then is left to the next start.
        self._given_up = threading.Event()

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
            self._transitions.open = False
            ongoing = dict(self._ongoing)
        try:
            for run_id, run in ongoing.items():
                if not self._guarded(partial(run.stop, SHUT_DOWN), f"run {run_id} could not be interrupted"):
                    self._end_processes(run_id)
            # A start that was decided before is followed first; it is begun as one that is to stop.
            self._guarded(lambda: self._await_writer(deadline), "the writer could not be waited for")
            with self._all_ended:
                while self._ongoing and (remaining := deadline - time.monotonic()) > 0:
                    self._all_ended.wait(min(POLL_INTERVAL, remaining))
        finally:
            left = list(self._ongoing)
            self.give_up()
        return not left

    def give_up(self) -> None:
        """End the processes of all runs that are left, and leave their ends to the next start. Idempotent."""
        for run_id in list(self._ongoing):
            self._end_processes(run_id)
        self._guarded(self._reaper.stop, "the reaper could not be let go")
        self._given_up.set()

    def _await_writer(self, deadline: float) -> None:
        with suppress(Unavailable):  # it has been stopped
            write = self._writer.submit(lambda _: None)
            try:
                write.future.result(max(0.0, min(BARRIER_TIMEOUT, deadline - time.monotonic())))
            except TimeoutError as late:
                write.give_up(late)  # storage is down, and nothing can have been decided

    def refused(self, run_id: str, error: BaseException) -> None:
        """Fail a run of which a message cannot be stored: its record would have a gap."""
        self._stop(
            run_id, Outcome(RunStatus.ERROR, "EXECUTION_ERROR", f"A message of this run cannot be stored: {error}.")
        )

    def cancel(self, run_id: str) -> None:
        """Have a run stop, if it goes on here."""
        self._stop(run_id, Outcome(RunStatus.CANCELLED))

    def _stop(self, run_id: str, reason: Outcome) -> None:
        ongoing = self._ongoing.get(run_id)
        if ongoing is not None:
            ongoing.stop(reason)

    def send(self, run_id: str, follow_up: FollowUp) -> bool:
        """Put a user's message into a run. False if it does not go on here."""
        ongoing = self._ongoing.get(run_id)
        if ongoing is not None:
            ongoing.send(follow_up)
        return ongoing is not None

    # ---- after a commit, in the writer's thread

    def follow(self, after_commit: AfterCommit) -> None:
        """Do what follows a commit. Never raises: whoever waits for the commit waits for this too."""
        for start in after_commit.starts:
            self._begin(start)
        for run_id in after_commit.cancels:
            self._guarded(partial(self.cancel, run_id), f"run {run_id} could not be told to stop")
        self._guarded(lambda: self._notifier.notify(after_commit.news), "whoever waits could not be told of a change")
        if after_commit.again:
            self._guarded(self.catch_up, "waiting runs could not be started")
        elif after_commit.dispatched:
            self._unfollowed = 0
            self._guarded(lambda: self._problems.clear(PROBLEM), "a fault that is over is still shown")

    def _guarded(self, step: Callable[[], object], told: str) -> bool:
        """Take one step of several; a fault in it must not keep the others from being taken. False if it failed."""
        try:
            step()
        except Exception:
            log.exception("%s", told)
            return False
        return True

    def catch_up(self) -> None:
        """After a fault: carry out what was decided and not followed, and decide what could not be decided.

        It is tried until it succeeds. A start that cannot be followed after all is ended: a run that nobody carries out
        must not stay `running`.
        """
        self._unfollowed += 1
        if self._unfollowed > MOST_UNFOLLOWED:
            self._problems.report(PROBLEM, "waiting runs cannot be started")
        pause = 0.0 if self._unfollowed == 1 else min(FIRST_DELAY * 2 ** min(self._unfollowed, 10), MAX_DELAY)
        self._writer.call_later(pause, self._decide)

    def _decide(self) -> None:
        work = self._fail_unfollowed if self._unfollowed >= MOST_UNFOLLOWED else self._decide_again
        self._writer.submit(work, self.follow).future.add_done_callback(self._decided_again)

    def _decided_again(self, decided: Future[AfterCommit]) -> None:
        error = decided.exception()
        if error is not None and not isinstance(error, ShuttingDown):
            log.error("waiting runs could not be started", exc_info=error)
            self._guarded(self.catch_up, "waiting runs could not be started")

    def _decide_again(self, transaction: Transaction) -> AfterCommit:
        after_commit = self._transitions.dispatch_again(transaction)
        self._decided = {start.run.id for start in after_commit.starts}
        return after_commit

    def _fail_unfollowed(self, transaction: Transaction) -> AfterCommit:
        # Not those that the same transaction may have started a moment ago: these are yet to be followed.
        lost = self._decided.difference(self._ongoing)
        failed = self._transitions.fail_started(transaction, lost, UNFOLLOWED)
        return failed | self._decide_again(transaction)

    def _begin(self, start: Start) -> None:
        """Hand a run to a thread of its own; end it if there is none."""
        run = start.run
        try:
            with self._lock:
                if run.id in self._ongoing:
                    return
                ongoing = self._ongoing[run.id] = OngoingRun()
                stopping = self._stopping
            if stopping:
                ongoing.stop(SHUT_DOWN)
            self._pool.submit(partial(self._own, start, ongoing), partial(self._not_owned, run))
        except Exception as error:
            self._not_owned(run, error)

    def _not_owned(self, run: Run, error: BaseException) -> None:
        """End a run that could not be begun. Nothing may wait here: it may be the writer's thread.

        Until that is stored it counts as one that goes on: it must not be begun after all.
        """
        log.error("run %s could not be begun", run.id, exc_info=error)
        self._end_without_thread(run, _failed(error), 0)

    def _end_without_thread(self, run: Run, values: Mapping[str, Any], refused: int) -> None:
        """
        Args:
            refused: how often it was not stored.
        """

        def settled(stored: Future[AfterCommit]) -> None:
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
        end = self._end if refused < TRIES_AS_IT_IS else self._end_alone
        try:
            self._writer.submit(partial(end, run, values), self.follow).future.add_done_callback(settled)
        except Unavailable:
            self._forget(run.id)

    # ---- in the run's thread

    def _own(self, start: Start, ongoing: OngoingRun) -> None:
        """Take a run from its start to its stored end, whatever is raised by anything."""
        run = start.run
        log.info("run %s started: %s in session %s", run.id, run.mode, run.session_id)
        transcript: dict[str, Any] = {}
        try:
            outcome, transcript = self._carry_out(start, ongoing)
            values = _columns(outcome) | transcript
        except BaseException as error:
            log.exception("run %s failed because of a fault", run.id)
            values = _failed(error) | transcript
        if not self._store_end(run, values):
            # It still counts as one that goes on: it must not be begun again.
            log.error("run %s: its end is not stored; the next start reports it as INTERRUPTED", run.id)
            return
        self._forget(run.id)
        detail = f", {values['errorCode']}: {values['errorMessage']}" if values["errorCode"] else ""
        log.info("run %s %s after %s ms%s", run.id, values["status"], values.get("durationMs"), detail)

    def _carry_out(self, start: Start, ongoing: OngoingRun) -> tuple[Outcome, dict[str, Any]]:
        """Run Claude Code, and see that nothing of it is left. Gives what its row is to say of its transcript too."""
        run = start.run
        mirror = self._transcripts.mirror(run)
        execution: Execution | None = None
        try:
            self._reaper.watch(run.id)
            lost = self._forbid(run) or (None if start.parent is None else self._provide(start.parent, run))
            if lost is None:
                execution = self._execution(start, mirror)
                ongoing.attach(execution)
                outcome = execution.run()
            else:
                outcome = lost
        except BaseException as error:
            log.exception("run %s: the executor failed", run.id)
            outcome = Outcome(RunStatus.ERROR, "EXECUTION_ERROR", f"{type(error).__name__}: {error}")
        if execution is None or execution.left_nothing:
            self._guarded(lambda: self._reaper.release(run.id), f"run {run.id}: the reaper could not be told")
        else:
            self._end_processes(run.id)
        complete = execution is not None and execution.closed_by_itself
        return outcome, self._transcripts.keep(run, mirror, complete=complete)

    def _execution(self, start: Start, mirror: Mirror) -> Execution:
        # Not at the top: the SDK beneath it takes longer to import than the rest of a start.
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
        """A function that numbers the messages of a run and hands them to the writer."""
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

    def _forbid(self, run: Run) -> Outcome | None:
        """How a run ends that the settings forbid by now: it may have waited through a restart that changed them."""
        try:
            self._allow(run)
        except Forbidden as error:
            return Outcome(RunStatus.ERROR, error.code, error.message)
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
        return Outcome(RunStatus.ERROR, "SESSION_NOT_RESUMABLE", message)

    def _end_processes(self, run_id: str) -> None:
        """End what is left of a run. The reaper is asked where this process cannot look for it."""
        try:
            end_marked(run_id)
            self._reaper.release(run_id)
        except Exception:
            log.exception("run %s: its processes could not be looked for; the reaper is to end them", run_id)
            self._guarded(lambda: self._reaper.end(run_id), f"run {run_id}: the reaper could not be told")

    # ---- the end

    def _store_end(self, run: Run, values: Mapping[str, Any]) -> bool:
        """Wait until the end of a run is committed, as long as it takes. False if the service gives up before."""
        stored = False

        def follow(after_commit: AfterCommit) -> None:
            # Noted first: the end is stored, whatever keeps it from being told.
            nonlocal stored
            stored = True
            self.follow(after_commit)

        pause = FIRST_DELAY
        key = f"run {run.id}"
        refused = 0
        while True:
            end = self._end if refused < TRIES_AS_IT_IS else self._end_alone
            try:
                self._writer.submit(partial(end, run, values), follow).future.result()
            except Exception as error:
                self._problems.report(key, UNSTORED, error)
                # What storage or its writer does not take at the moment says nothing of this end.
                refused += not isinstance(error, Unavailable)
            if stored:
                self._problems.clear(key)
                return True
            if self._given_up.wait(pause):
                return False
            pause = min(pause * 2, MAX_DELAY)

    def _end(self, run: Run, values: Mapping[str, Any], transaction: Transaction) -> AfterCommit:
        refusal = self._writer.broken.get(run.id)
        if refusal is not None:
            message = f"A message of this run cannot be stored: {refusal}."
            values = {
                **values,
                "status": RunStatus.ERROR,
                "errorCode": "EXECUTION_ERROR",
                "errorMessage": storable(message),
            }
        return self._transitions.end_surely(transaction, run, values) | self._transitions.dispatch(transaction)

    def _end_alone(self, run: Run, _values: Mapping[str, Any], transaction: Transaction) -> AfterCommit:
        """What is tried after `_end` has failed."""
        return self._transitions.end_alone(transaction, run) | AfterCommit(again=True)

    def _forget(self, run_id: str) -> None:
        with self._all_ended:
            self._ongoing.pop(run_id, None)
            self._all_ended.notify_all()


def _columns(outcome: Outcome) -> dict[str, Any]:
    """The columns of the end of a run."""
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
    """The columns of the end of a run that a fault has ended."""
    message = storable(f"{type(error).__name__}: {error}")
    return {"status": RunStatus.ERROR, "errorCode": "EXECUTION_ERROR", "errorMessage": message}
