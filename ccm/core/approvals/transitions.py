"""Decides whether a permission request is passed on to clients, and how it is resolved.

Like the decisions on runs (core/runs/transitions.py), each is taken in the writer's thread, inside the transaction that
stores it. No two of them race, so the first answer counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ccm.core.webhooks.outbox import Outbox
from ccm.db import approvals, runs
from ccm.db.driver.transaction import Transaction
from ccm.errors import RunAlreadyEnded
from ccm.json_text import storable, to_json_text
from ccm.models import Answer, Approval, ApprovalStatus, EventType, Question, Resolution, Run
from ccm.timestamps import timestamp

# The text that the model reads if the client gives no reason.
UNEXPLAINED = "The user does not allow this."
TOO_LATE = "Nobody has answered in time, so this is denied."
NO_WORKER = (
    "Denied without being asked: at least one of this service's {workers} workers (CCM_MAX_CONCURRENT_RUNS) must stay "
    "free, and all others are waiting for approvals already."
)


class ApprovalTransitions:
    """The decisions on approvals, each a method that is called within a transaction of the writer.

    Args:
        outbox: receives the events of approvals.
        workers: the number of runs that execute at once.
    """

    def __init__(self, outbox: Outbox, workers: int) -> None:
        self._outbox = outbox
        self.workers = workers

    def ask(
        self, transaction: Transaction, approval_id: str, run_id: str, question: Question, *, seconds: float
    ) -> Approval:
        """Store a permission request of a run: pending, or denied at once if too many runs are waiting for answers.

        Args:
            seconds: how long to wait for an answer.

        Raises:
            RunAlreadyEnded: the run has ended.
        """
        if transaction.uncertain and (stored := approvals.find(transaction, approval_id)):
            return stored  # the previous attempt was committed after all
        run = runs.get(transaction, run_id)
        if run.ended:
            raise RunAlreadyEnded(f"Run {run.id} has ended.")
        now = timestamp()
        row = {
            "id": approval_id,
            "runId": run.id,
            "sessionId": run.session_id,
            "toolName": storable(question.tool_name) or "",
            "toolUseId": storable(question.tool_use_id),
            "inputJson": to_json_text(dict(question.input)),
            "suggestionsJson": to_json_text([dict(suggestion) for suggestion in question.suggestions]),
            "title": storable(question.title),
            "displayName": storable(question.display_name),
            "description": storable(question.description),
            "blockedPath": storable(question.blocked_path),
            "decisionReason": storable(question.decision_reason),
            "agentId": storable(question.agent_id),
            "status": ApprovalStatus.PENDING,
            "remember": 0,
            "interrupt": 0,
            "createdAt": now,
            "expiresAt": timestamp(seconds),
        }
        # A waiting run occupies its worker. If all workers were waiting, no other run would start until an answer.
        if approvals.count_other_waiting_runs(transaction, run.id) >= self.workers - 1:
            row |= {
                "status": ApprovalStatus.DENIED,
                "resolution": Resolution.NO_WORKER,
                "message": NO_WORKER.format(workers=self.workers),
                "resolvedAt": now,
            }
        approvals.insert(transaction, row)
        return self._enqueue_event(transaction, approval_id)

    def resolve(
        self, transaction: Transaction, approval_id: str, answer: Answer, decided_by: str | None = None
    ) -> Approval | None:
        """Store the answer to a pending approval. Returns the approval, None if it is not pending.

        Args:
            decided_by: the name of the client's token.
        """
        return self._resolve(
            transaction,
            approval_id,
            {
                "status": ApprovalStatus.ALLOWED if answer.allow else ApprovalStatus.DENIED,
                "resolution": Resolution.ANSWERED,
                "updatedInputJson": None if answer.updated_input is None else to_json_text(dict(answer.updated_input)),
                "remember": int(answer.remember),
                "message": answer.message or (None if answer.allow else UNEXPLAINED),
                "interrupt": int(answer.interrupt),
                "decidedBy": decided_by,
            },
        )

    def time_out(self, transaction: Transaction, approval_id: str) -> Approval:
        """Deny an approval because nobody answered in time, unless it is no longer pending. Returns it."""
        values = {"status": ApprovalStatus.DENIED, "resolution": Resolution.TIMED_OUT, "message": TOO_LATE}
        return self._resolve(transaction, approval_id, values) or approvals.get(transaction, approval_id)

    def expire(self, transaction: Transaction, approval_id: str) -> Approval | None:
        """Expire a pending approval because its run no longer waits for it. Returns it, None if it is not pending."""
        values = {"status": ApprovalStatus.EXPIRED, "resolution": Resolution.WITHDRAWN}
        return self._resolve(transaction, approval_id, values)

    def expire_all(self, transaction: Transaction, run: Run) -> None:
        """Expire the pending approvals of a run that ends."""
        for approval in approvals.pending(transaction, run.id) if run.approvals else ():
            self.expire(transaction, approval.id)

    def _resolve(self, transaction: Transaction, approval_id: str, values: Mapping[str, Any]) -> Approval | None:
        resolved = approvals.resolve(transaction, approval_id, {**values, "resolvedAt": timestamp()})
        return self._enqueue_event(transaction, approval_id) if resolved else None

    def _enqueue_event(self, transaction: Transaction, approval_id: str) -> Approval:
        """Add the event of an approval's current state, and return the approval."""
        approval = approvals.get(transaction, approval_id)
        kind = EventType.APPROVAL_REQUESTED if approval.pending else EventType.APPROVAL_RESOLVED
        self._outbox.enqueue(transaction, kind, runs.get(transaction, approval.run_id), approval.to_json())
        return approval
