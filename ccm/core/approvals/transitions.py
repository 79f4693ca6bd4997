"""The decisions in the life of an approval: whether it is asked at all, and what becomes of it.

As those on runs (core/runs/transitions.py) each is taken inside the transaction that stores it, in the writer's thread,
so no two of them race: the first answer wins, whoever gives it.
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

# What the model is told where the client gives no reason.
UNEXPLAINED = "The user does not allow this."
TOO_LATE = "Nobody has answered in time whether this may be done, so it is denied."


class ApprovalTransitions:
    """
    Args:
        outbox: told of what is asked and answered.
        workers: runs at once.
    """

    def __init__(self, outbox: Outbox, workers: int) -> None:
        self._outbox = outbox
        self._workers = workers

    def ask(
        self, transaction: Transaction, approval_id: str, run_id: str, question: Question, *, seconds: float
    ) -> Approval:
        """Store a question of a run, to be answered; or denied at once, if too many runs wait for answers already.

        Args:
            seconds: how long it is to wait.

        Raises:
            RunAlreadyEnded: the run has ended.
        """
        if transaction.uncertain and (stored := approvals.find(transaction, approval_id)):
            return stored  # the commit before this try had gone through after all
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
            "resolution": None,
            "updatedInputJson": None,
            "remember": 0,
            "message": None,
            "interrupt": 0,
            "decidedBy": None,
            "createdAt": now,
            "expiresAt": timestamp(seconds),
            "resolvedAt": None,
        }
        # A run that waits holds its worker: if all did, nothing else would ever run until somebody answers.
        if approvals.count_other_waiting_runs(transaction, run.id) >= self._workers - 1:
            message = _crowded(self._workers)
            row |= {
                "status": ApprovalStatus.DENIED,
                "resolution": Resolution.NO_WORKER,
                "message": message,
                "resolvedAt": now,
            }
        approvals.insert(transaction, row)
        return self._tell(transaction, approval_id)

    def resolve(
        self, transaction: Transaction, approval_id: str, answer: Answer, decided_by: str | None = None
    ) -> bool:
        """Give a pending approval its answer. False if it has had one already.

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

    def time_out(self, transaction: Transaction, approval_id: str) -> bool:
        """Nobody has answered in time. False if somebody has."""
        return self._resolve(
            transaction,
            approval_id,
            {"status": ApprovalStatus.DENIED, "resolution": Resolution.TIMED_OUT, "message": TOO_LATE},
        )

    def expire(self, transaction: Transaction, approval_id: str) -> bool:
        """Nobody waits for its answer any more. False if it has had one already."""
        return self._resolve(
            transaction, approval_id, {"status": ApprovalStatus.EXPIRED, "resolution": Resolution.WITHDRAWN}
        )

    def expire_all(self, transaction: Transaction, run: Run) -> None:
        """A run has ended: nothing of it may stay pending."""
        for approval in approvals.pending(transaction, run.id) if run.approvals else ():
            self.expire(transaction, approval.id)

    def _resolve(self, transaction: Transaction, approval_id: str, values: Mapping[str, Any]) -> bool:
        resolved = approvals.resolve(transaction, approval_id, {**values, "resolvedAt": timestamp()})
        if resolved:
            self._tell(transaction, approval_id)
        return resolved

    def _tell(self, transaction: Transaction, approval_id: str) -> Approval:
        """Add the event that tells of an approval's state."""
        approval = approvals.get(transaction, approval_id)
        kind = EventType.APPROVAL_REQUESTED if approval.pending else EventType.APPROVAL_RESOLVED
        self._outbox.enqueue(transaction, kind, runs.get(transaction, approval.run_id), approval.to_json())
        return approval


def _crowded(workers: int) -> str:
    return (
        f"Denied without being asked: of this service's {workers} workers (CCM_MAX_CONCURRENT_RUNS) all but one at the "
        "most may wait for approvals, and they do already."
    )
