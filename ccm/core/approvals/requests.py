"""Passes Claude Code's permission requests on to clients, and their answers back.

The database decides: a waiting run gets the stored approval, after the commit. The waiters in memory only say which
event loop to wake.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from ccm.core.approvals.transitions import ApprovalTransitions
from ccm.core.run_log import RunLog
from ccm.core.storage.notifier import APPROVALS, DELIVERIES, EVENTS, Notifier
from ccm.core.storage.run_loop import result_of
from ccm.core.storage.writer import Writer
from ccm.db import approvals
from ccm.db.driver.transaction import Transaction
from ccm.errors import ApprovalResolved, ApprovalsForbidden, Unavailable, ValidationError
from ccm.models import Answer, Approval, Question, Resolution, Run

log = logging.getLogger(__name__)

NOT_STORED = "Denied without being asked, because the service could not store the request."
# The error for an answer that comes too late, by the resolution of the approval.
RESOLUTIONS = {
    Resolution.ANSWERED: "was answered at {at}: it is '{status}', and the first answer counts.",
    Resolution.TIMED_OUT: "was denied at {at}: nobody had answered in time.",
    Resolution.NO_WORKER: "was denied at {at} without being asked: its `message` says which setting allows more at "
    "once.",
    Resolution.WITHDRAWN: "expired at {at}: its run ended, or Claude Code withdrew the request.",
}


class Approvals:
    """The permission requests of runs, and clients' answers to them.

    Args:
        writer: stores every change.
        notifier: notifies subscribers when an approval is requested or resolved.
        transitions: takes the decisions.
        timeout: how long to wait for an answer if the run's request sets no time (seconds).
    """

    def __init__(self, writer: Writer, notifier: Notifier, transitions: ApprovalTransitions, *, timeout: float) -> None:
        self._writer = writer
        self._notifier = notifier
        self._transitions = transitions
        self._timeout = timeout
        # The approvals that runs are waiting for, by id. Resolved in the writer's thread. No lock is needed: each use
        # is a single operation of the dictionary.
        self._waiters: dict[str, Future[Approval]] = {}

    def check_workers(self) -> None:
        """Check that a run with approvals can be accepted.

        Raises:
            Forbidden: APPROVALS_FORBIDDEN: the only worker would be waiting, so each request would be denied.
        """
        if self._transitions.workers == 1:
            raise ApprovalsForbidden(
                "approvals: a run that waits for an approval occupies its worker, and CCM_MAX_CONCURRENT_RUNS gives "
                "this service only one. Set it to 2 or more.",
                field="approvals",
            )

    # ---- for runs, in their own loops

    async def ask(self, run: Run, question: Question) -> Answer:
        """Store a permission request of a run and wait for the first answer, until the run's approval timeout.

        While storage is down the request waits, like the run's messages.
        """
        seconds = self._timeout if run.approval_timeout_ms is None else run.approval_timeout_ms / 1000
        approval_id = str(uuid.uuid4())
        ask = partial(self._transitions.ask, approval_id=approval_id, run_id=run.id, question=question, seconds=seconds)
        waiter: Future[Approval] = Future()
        self._waiters[approval_id] = waiter
        try:
            approval = await self._store(ask)
            if approval.pending:
                try:
                    async with asyncio.timeout(seconds):
                        approval = await result_of(waiter)
                except TimeoutError:
                    # An answer may have been stored meanwhile; then it counts.
                    approval = await self._store(partial(self._transitions.time_out, approval_id=approval_id))
        except asyncio.CancelledError:
            # Claude Code withdraws its request, because the run is interrupted.
            self._withdraw(approval_id)
            raise
        except Exception:
            RunLog(log, run.id).exception(
                "cannot store a permission request, denying it",
                event="approval_failed",
                extra={"approval_id": approval_id},
            )
            self._withdraw(approval_id)
            return Answer(allow=False, message=NOT_STORED)
        finally:
            del self._waiters[approval_id]
        return approval.answer

    async def _store(self, work: Callable[[Transaction], Approval]) -> Approval:
        """Store a change, however long that takes. The loop keeps running, so that the run can be cancelled."""
        return await result_of(self._writer.submit(work, self._publish).future)

    def _withdraw(self, approval_id: str) -> None:
        """Expire an approval whose run no longer waits for it.

        If the request itself is not stored yet, this write is queued behind it.
        """

        try:
            self._writer.submit(partial(self._transitions.expire, approval_id=approval_id), self._publish)
        except Unavailable:
            log.debug(
                "approval %s: the service is stopping; the next start expires it",
                approval_id,
                extra={"event": "approval_left_pending", "approval_id": approval_id},
            )

    # ---- for clients

    def answer(self, approval_id: str, answer: Answer, decided_by: str | None) -> Approval:
        """Answer an approval. The first answer counts.

        Args:
            decided_by: the name of the client's token.

        Raises:
            NotFound: APPROVAL_NOT_FOUND.
            ApprovalResolved: the approval is no longer pending.
            ValidationError: `remember` without a suggestion to remember, or an empty `updatedInput`.
        """
        won = False

        def work(transaction: Transaction) -> Approval:
            nonlocal won
            approval = approvals.get(transaction, approval_id)
            if approval.pending and answer.remember and not approval.suggestions.value:
                raise ValidationError(
                    "remember: Claude Code has suggested nothing to remember for this request. Leave remember out.",
                    field="remember",
                )
            if approval.pending and answer.updated_input == {} and approval.input.text != "{}":
                raise ValidationError(
                    "updatedInput: must not be empty, because Claude Code would then use the original input. To allow "
                    "the original input, leave updatedInput out.",
                    field="updatedInput",
                )
            resolved = self._transitions.resolve(transaction, approval_id, answer, decided_by)
            # If the previous attempt may have been committed, the stored answer may be this one.
            won = resolved is not None or (won and transaction.uncertain)
            approval = approvals.get(transaction, approval_id)
            if not won:
                resolution = RESOLUTIONS[Resolution(str(approval.resolution))]
                how = resolution.format(at=approval.resolved_at, status=approval.status)
                raise ApprovalResolved(f"Approval {approval_id} {how}", approval.to_json())
            return approval

        return self._writer.write(work, self._publish)

    # ---- after a commit, in the writer's thread

    def _publish(self, approval: Approval | None) -> None:
        """Pass a stored approval to the run that waits for it, and notify subscribers. None: nothing has changed."""
        if approval is None:
            return
        try:
            self._resolve_waiter(approval)
        finally:
            self._notifier.notify((approval.run_id, approval.session_id, EVENTS, DELIVERIES, APPROVALS))

    def _resolve_waiter(self, approval: Approval) -> None:
        waiter = self._waiters.get(approval.id)
        if waiter is not None and not approval.pending and not waiter.done():
            waiter.set_result(approval)

    def catch_up(self) -> None:
        """Pass the stored approvals to the waiting runs, after a fault that prevented it."""
        waiting = list(self._waiters)
        if waiting:
            read = self._writer.submit(lambda transaction: [approvals.find(transaction, key) for key in waiting])
            read.future.add_done_callback(self._resolve_waiters)

    def _resolve_waiters(self, read: Future[list[Approval | None]]) -> None:
        error = read.exception()
        if error is not None:
            log.error(
                "cannot read the approvals that runs are waiting for",
                exc_info=error,
                extra={"event": "approvals_read_failed"},
            )
            return
        for approval in read.result():
            if approval is not None:  # None: it is not stored yet
                self._resolve_waiter(approval)
