"""Claude Code's questions put to clients, and the clients' answers to Claude Code.

What this process remembers (who waits in which event loop) is only ever a copy of what is stored: a waiter is told
after the commit, and told what the row says.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from ccm.core.approvals.transitions import ApprovalTransitions
from ccm.core.storage.notifier import APPROVALS, EVENTS, Notifier
from ccm.core.storage.writer import Writer
from ccm.db import approvals
from ccm.db.driver.transaction import Transaction
from ccm.errors import ApprovalResolved, ApprovalsForbidden, Unavailable, ValidationError
from ccm.models import Answer, Approval, Question, Resolution, Run

log = logging.getLogger(__name__)

# How often a run that waits looks by itself whether the wait is over (seconds).
POLL_INTERVAL = 1.0
NOT_STORED = "This could not be asked, because the service could not store the question; so it is denied."
# What an answer that comes too late is told, by the resolution that it finds.
ALREADY = {
    Resolution.ANSWERED: "was answered at {at}: it is '{status}', and the first answer counts.",
    Resolution.TIMED_OUT: "was denied at {at}: nobody had answered in time.",
    Resolution.NO_WORKER: "was denied at {at} without being asked: its `message` says which setting allows more at "
    "once.",
    Resolution.WITHDRAWN: "expired at {at}: its run ended, or Claude Code took the question back.",
}


class Approvals:
    """
    Args:
        writer: takes every change.
        notifier: rung when something is asked or answered.
        lifecycle: takes the decisions.
        workers: runs at once.
        timeout: how long an answer is waited for where a run's request names no time (seconds).
    """

    def __init__(
        self, writer: Writer, notifier: Notifier, transitions: ApprovalTransitions, *, workers: int, timeout: float
    ) -> None:
        self._writer = writer
        self._notifier = notifier
        self._transitions = transitions
        self._workers = workers
        self._timeout = timeout
        self._lock = threading.Lock()
        # Told what became of an approval, in the writer's thread.
        self._waiters: dict[str, _Waiter] = {}

    def check_workers(self) -> None:
        """
        Raises:
            ApprovalsForbidden: there is no worker to spare, so each question would be denied.
        """
        if self._workers == 1:
            raise ApprovalsForbidden(
                "approvals: a run that waits for one holds its worker, and CCM_MAX_CONCURRENT_RUNS gives this service "
                "only one; it must be 2 or more.",
                field="approvals",
            )

    # ---- for runs, in their own loops

    async def ask(self, run: Run, question: Question) -> Answer:
        """Put a question of a run to whoever answers first, and wait for it, as long as the run's request says.

        While storage is down the question waits, as the run's messages do.
        """
        approval_id = str(uuid.uuid4())
        waiter = _Waiter()
        with self._lock:
            self._waiters[approval_id] = waiter
        try:
            return (await self._ask(approval_id, run, question, waiter)).answer
        except asyncio.CancelledError:
            # Claude Code takes its question back: the run is interrupted.
            self._withdraw(approval_id)
            raise
        except Exception:
            log.exception("run %s: a question could not be asked", run.id)
            self._withdraw(approval_id)
            return Answer(allow=False, message=NOT_STORED)
        finally:
            with self._lock:
                del self._waiters[approval_id]

    async def _ask(self, approval_id: str, run: Run, question: Question, waiter: _Waiter) -> Approval:
        """An approval once it is no longer pending."""
        seconds = self._timeout if run.approval_timeout_ms is None else run.approval_timeout_ms / 1000
        approval = await self._store(
            partial(
                self._transitions.ask,
                approval_id=approval_id,
                run_id=run.id,
                question=question,
                seconds=seconds,
            )
        )
        return await self._wait(approval_id, waiter, seconds) if approval.pending else approval

    async def _wait(self, approval_id: str, waiter: _Waiter, seconds: float) -> Approval:
        try:
            async with asyncio.timeout(seconds):
                return await waiter.wait()
        except TimeoutError:
            # An answer may have been first all the same; then it counts.
            return await self._store(partial(self._time_out, approval_id))

    def _time_out(self, approval_id: str, transaction: Transaction) -> Approval:
        self._transitions.time_out(transaction, approval_id)
        return approvals.get(transaction, approval_id)

    async def _store(self, work: Callable[[Transaction], Approval]) -> Approval:
        """Have a change stored, as long as it takes. The loop goes on meanwhile: it may have to take a cancel."""
        write = self._writer.submit(work, self._follow)
        stored = _Signal()
        write.future.add_done_callback(lambda _: stored.set())
        await stored.wait(write.future.done)
        return write.future.result()

    def _withdraw(self, approval_id: str) -> None:
        """Have an approval expire that nobody waits for any more. Behind the question in the queue, if that waits."""

        def work(transaction: Transaction) -> Approval | None:
            if not self._transitions.expire(transaction, approval_id):
                return None
            return approvals.get(transaction, approval_id)

        try:
            self._writer.submit(work, lambda expired: None if expired is None else self._follow(expired))
        except Unavailable:
            log.debug("approval %s: the service stops; the next start has it expire", approval_id)

    # ---- for clients

    def answer(self, approval_id: str, answer: Answer, decided_by: str | None) -> Approval:
        """Give an approval its answer; the first one counts.

        Args:
            decided_by: the name of the client's token.

        Raises:
            ApprovalNotFound: there is no such approval.
            ApprovalResolved: it had one already, or was too late.
            ValidationError: there is nothing to remember.
        """
        won = False

        def work(transaction: Transaction) -> Approval:
            nonlocal won
            approval = approvals.get(transaction, approval_id)
            if approval.pending and answer.remember and not approval.suggestions.value:
                raise ValidationError(
                    "remember: Claude Code has suggested nothing that could be remembered for this question; leave it "
                    "out.",
                    field="remember",
                )
            if approval.pending and answer.updated_input == {} and approval.input.text != "{}":
                raise ValidationError(
                    "updatedInput: must not be empty, for Claude Code would then use the input that it asked about. To "
                    "allow that, leave updatedInput out.",
                    field="updatedInput",
                )
            resolved = self._transitions.resolve(transaction, approval_id, answer, decided_by)
            # Where it is not known whether the try before was committed, what is found may be this very answer.
            won = resolved or (won and transaction.uncertain)
            approval = approvals.get(transaction, approval_id)
            if not won:
                raise ApprovalResolved(f"Approval {approval_id} {_already(approval)}", approval.to_json())
            return approval

        return self._writer.write(work, self._follow)

    # ---- after a commit, in the writer's thread

    def _follow(self, approval: Approval) -> None:
        try:
            if not approval.pending:
                self._tell(approval)
        finally:
            self._notifier.notify((approval.run_id, approval.session_id, EVENTS, APPROVALS))

    def _tell(self, approval: Approval) -> None:
        with self._lock:
            waiter = self._waiters.get(approval.id)
        if waiter is not None:
            waiter.tell(approval)

    def catch_up(self) -> None:
        """After a fault that has kept a commit from being followed: tell the runs that wait what is stored."""
        with self._lock:
            waiting = list(self._waiters)
        if waiting:
            read = self._writer.submit(lambda transaction: [approvals.find(transaction, key) for key in waiting])
            read.future.add_done_callback(self._caught_up)

    def _caught_up(self, read: Future[list[Approval | None]]) -> None:
        error = read.exception()
        if error is not None:
            log.error("the runs that wait for answers could not be told what is stored", exc_info=error)
            return
        for approval in read.result():
            if approval is not None and not approval.pending:  # None: it is still to be stored
                self._tell(approval)


def _already(approval: Approval) -> str:
    return ALREADY[Resolution(str(approval.resolution))].format(at=approval.resolved_at, status=approval.status)


class _Signal:
    """Wakes a run's loop from another thread. Made in that loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def set(self) -> None:
        """Wake the loop, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:
            log.debug("a run that waited has ended")

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition whose coming true is signalled. It is looked at now and then too: a signal that a fault
        has kept back must not leave the run waiting for ever.
        """
        while not condition():
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_INTERVAL):
                    await self._event.wait()


class _Waiter:
    """A question that waits in its run's loop for what becomes of it."""

    def __init__(self) -> None:
        self._signal = _Signal()
        self._approval: Approval | None = None

    def tell(self, approval: Approval) -> None:
        """End the wait, from any thread."""
        self._approval = approval
        self._signal.set()

    async def wait(self) -> Approval:
        await self._signal.wait(lambda: self._approval is not None)
        assert self._approval is not None  # noqa: S101  # for mypy: the condition that was waited for
        return self._approval
