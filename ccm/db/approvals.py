"""The table ccr_approvals, and what ccr_events tells of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ccm.db.columns import select_list
from ccm.db.driver.transaction import Transaction
from ccm.errors import ApprovalNotFound
from ccm.models import Approval, EventType

SELECT = f"SELECT {select_list(Approval, 'ccr_approvals')} FROM ccr_approvals "
FILTERS = {"runId": '"runId" = :runId', "sessionId": '"sessionId" = :sessionId', "status": "status = :status"}
# One statement: between two an approval might stop to be pending and be in neither. All, if there is no such message.
SINCE = f"""
{SELECT} WHERE "runId" = :run AND (status = 'pending' OR "resolvedAt" >= COALESCE(
    (SELECT "createdAt" FROM ccr_run_messages WHERE "runId" = :run AND "index" = :index), ''))
ORDER BY seq
"""
CHANGES = f"""
SELECT id, "eventJson" FROM ccr_events
WHERE "runId" = :run AND id > :after AND type IN ('{EventType.APPROVAL_REQUESTED}', '{EventType.APPROVAL_RESOLVED}')
ORDER BY id LIMIT :limit
"""
# Each may hold a whole file.
CHANGES_AT_ONCE = 20


def find(transaction: Transaction, approval_id: str) -> Approval | None:
    row = transaction.row(f"{SELECT} WHERE id = :id", id=approval_id)
    return None if row is None else Approval.from_row(row)


def get(transaction: Transaction, approval_id: str) -> Approval:
    """Return an approval.

    Raises:
        ApprovalNotFound: there is no such approval.
    """
    approval = find(transaction, approval_id)
    if approval is None:
        raise ApprovalNotFound(f"There is no approval {approval_id}. GET /api/approvals lists them.")
    return approval


def page(
    transaction: Transaction, filters: Mapping[str, str], *, limit: int, after: int | None = None
) -> list[Approval]:
    """Approvals in the order in which they were asked, those beyond the one with seq `after`.

    Args:
        filters: has keys of FILTERS.
    """
    where = " AND ".join([*(FILTERS[name] for name in filters), "seq > :after"])
    beyond = {"limit": limit, "after": 0 if after is None else after}
    rows = transaction.rows(f"{SELECT} WHERE {where} ORDER BY seq LIMIT :limit", **filters, **beyond)
    return [Approval.from_row(row) for row in rows]


def pending(transaction: Transaction, run_id: str) -> list[Approval]:
    """What a run waits for, in order."""
    rows = transaction.rows(f"{SELECT} WHERE \"runId\" = :run AND status = 'pending' ORDER BY seq", run=run_id)
    return [Approval.from_row(row) for row in rows]


def pending_or_resolved_since(transaction: Transaction, run_id: str, index: int) -> list[Approval]:
    """What a run waits for, and what became of the rest since it said the message with this index, in order."""
    return [Approval.from_row(row) for row in transaction.rows(SINCE, run=run_id, index=index)]


def count_other_waiting_runs(transaction: Transaction, run_id: str) -> int:
    """How many runs wait for an answer, this one left out."""
    waiting = transaction.column("SELECT \"runId\" FROM ccr_approvals WHERE status = 'pending'")
    return len(set(waiting) - {run_id})


def insert(transaction: Transaction, row: Mapping[str, Any]) -> None:
    """An approval after all that are there. `row` has every column but `seq`."""
    transaction.insert("ccr_approvals", row)


def resolve(transaction: Transaction, approval_id: str, values: Mapping[str, Any]) -> bool:
    """The one way out of pending: a compare-and-set. False if it was resolved already."""
    return bool(transaction.update("ccr_approvals", values, "id = :id AND status = 'pending'", id=approval_id))


def last_event(transaction: Transaction, run_id: str) -> int:
    """The id of the newest event of a run, 0 if it has none."""
    return int(transaction.value('SELECT COALESCE(MAX(id), 0) FROM ccr_events WHERE "runId" = :run', run=run_id))


def changes(transaction: Transaction, run_id: str, after: int) -> Sequence[tuple[int, dict[str, Any]]]:
    """The next of what was asked and answered in a run beyond one of its events: the event's id, and the approval as it
    was then, as the API shows it."""
    rows = transaction.tuples(CHANGES, run=run_id, after=after, limit=CHANGES_AT_ONCE)
    return [(event_id, json.loads(text)["data"]["approval"]) for event_id, text in rows]
