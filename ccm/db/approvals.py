"""The table ccr_approvals, and the events of approvals in ccr_events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ccm.db.driver.transaction import Transaction
from ccm.db.event_bodies import body_of
from ccm.db.select import Select, existing
from ccm.errors import ApprovalNotFound
from ccm.models import Approval, EventType

FILTERS = {"runId": '"runId" = :runId', "sessionId": '"sessionId" = :sessionId', "status": "status = :status"}
SELECT = Select(Approval, "ccr_approvals a", filters=FILTERS)
# One statement, because an approval resolved between two of them would be in neither result. If there is no message
# with that index, it returns all approvals.
SINCE = """
WHERE "runId" = :run AND (status = 'pending' OR "resolvedAt" >= COALESCE(
    (SELECT "createdAt" FROM ccr_run_messages WHERE "runId" = :run AND "index" = :index), ''))
ORDER BY seq
"""
CHANGES = f"""
SELECT id, "eventJson", compressed FROM ccr_events
WHERE "runId" = :run AND id > :after AND type IN ('{EventType.APPROVAL_REQUESTED}', '{EventType.APPROVAL_RESOLVED}')
ORDER BY id LIMIT :limit
"""
# Few at a time, because each may contain a whole file.
CHANGES_AT_ONCE = 20


def find(transaction: Transaction, approval_id: str) -> Approval | None:
    """Return an approval, or None."""
    return SELECT.find(transaction, "WHERE id = :id", id=approval_id)


def get(transaction: Transaction, approval_id: str) -> Approval:
    """Return an approval.

    Raises:
        ApprovalNotFound: there is no such approval.
    """
    return existing(find(transaction, approval_id), "approval", approval_id, ApprovalNotFound)


def page(transaction: Transaction, filters: Mapping[str, str], *, limit: int, after: int | None) -> list[Approval]:
    """Return approvals after the one with seq `after`, in the order of their requests.

    Args:
        filters: values by the keys of FILTERS.
    """
    return SELECT.page(transaction, filters, limit, after or 0, newest_first=False)


def pending(transaction: Transaction, run_id: str) -> list[Approval]:
    """Return the pending approvals of a run, in order."""
    return SELECT.rows(transaction, "WHERE \"runId\" = :run AND status = 'pending' ORDER BY seq", run=run_id)


def pending_or_resolved_since(transaction: Transaction, run_id: str, index: int) -> list[Approval]:
    """Return the pending approvals of a run and those resolved since its message with this index, in order."""
    return SELECT.rows(transaction, SINCE, run=run_id, index=index)


def count_other_waiting_runs(transaction: Transaction, run_id: str) -> int:
    """Return how many other runs wait for an answer."""
    waiting = transaction.column("SELECT \"runId\" FROM ccr_approvals WHERE status = 'pending'")
    return len(set(waiting) - {run_id})


def insert(transaction: Transaction, row: Mapping[str, Any]) -> None:
    """Insert a new approval. `row` has every column that is not null, but for `seq`."""
    transaction.insert("ccr_approvals", row)


def resolve(transaction: Transaction, approval_id: str, values: Mapping[str, Any]) -> bool:
    """Resolve a pending approval: a compare-and-set, and the only way out of `pending`.

    Returns: False if it was resolved already.
    """
    return bool(transaction.update("ccr_approvals", values, "id = :id AND status = 'pending'", id=approval_id))


def last_event(transaction: Transaction, run_id: str) -> int:
    """Return the id of a run's newest event, 0 if it has none."""
    return int(transaction.value('SELECT COALESCE(MAX(id), 0) FROM ccr_events WHERE "runId" = :run', run=run_id))


def changes(transaction: Transaction, run_id: str, after: int) -> Sequence[tuple[int, dict[str, Any]]]:
    """Return the next requested or resolved approvals of a run after one of its events.

    Returns: the event's id, and the approval at that moment, as the API shows it.
    """
    rows = transaction.tuples(CHANGES, run=run_id, after=after, limit=CHANGES_AT_ONCE)
    return [(event_id, json.loads(body_of(*body))["data"]["approval"]) for event_id, *body in rows]
