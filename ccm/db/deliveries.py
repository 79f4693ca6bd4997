"""The table ccr_deliveries.

Of those of a run and a target that are pending only the first has a time for its next attempt. So all that is due may
be sent side by side, and yet a run is told in order.
"""

from __future__ import annotations

from ccm.db.database import Transaction
from ccm.models import DELIVERED, DISABLED, PENDING, SERVICE_TARGET, Delivery

SELECT = """
SELECT d.id, d."eventId", e.type AS "eventType", d."runId", d.target, d."webhookId", d.host, d.status, d.reason,
    d."attemptsJson", d."nextAttemptAt"
FROM ccr_deliveries d JOIN ccr_events e ON e.id = d."eventId"
"""
FIRST_HOST = "SELECT MIN(host) FROM ccr_deliveries WHERE status = 'pending'"
NEXT_HOST = FIRST_HOST + " AND host > :host"
NEXT_ATTEMPT = """
SELECT MIN("nextAttemptAt") FROM ccr_deliveries WHERE status = 'pending' AND host = :host AND "nextAttemptAt" > ''
"""
DUE = """
SELECT id FROM ccr_deliveries WHERE status = 'pending' AND host = :host AND "nextAttemptAt" <= :now
ORDER BY "nextAttemptAt" LIMIT :limit
"""
OF_RUN = '"runId" = :run AND target = :target'
# The host of what goes to the service's address.
SERVICE_HOST = ""


def insert(
    transaction: Transaction, run_id: str, target: str, webhook_id: str, host: str, *, reason: str | None, now: str
) -> None:
    """Have the newest event delivered.

    Args:
        host: of the run's own address.
        reason: why it is not even tried; None if it is.
    """
    first = reason is None and _first_pending(transaction, run_id, target) is None
    row = {"runId": run_id, "target": target, "webhookId": webhook_id, "host": host, "reason": reason}
    row |= {"status": DISABLED if reason else PENDING, "attemptsJson": "[]", "nextAttemptAt": now if first else None}
    # There is one writer, so the newest event is the one that it has just written.
    transaction.insert("ccr_deliveries", {"eventId": transaction.value("SELECT MAX(id) FROM ccr_events"), **row})


def find(transaction: Transaction, delivery_id: int) -> Delivery | None:
    row = transaction.row(SELECT + "WHERE d.id = :id", id=delivery_id)
    return None if row is None else Delivery.from_row(row)


def page(transaction: Transaction, run_id: str, *, limit: int, after: int | None) -> list[Delivery]:
    """Those of a run, the oldest first, beyond one."""
    sql = SELECT + 'WHERE d."runId" = :run AND d.id > :after ORDER BY d.id LIMIT :limit'
    return [Delivery.from_row(row) for row in transaction.rows(sql, run=run_id, after=after or 0, limit=limit)]


def disabled(transaction: Transaction, run_id: str, target: str) -> str | None:
    """Why nothing is delivered any more to a target of a run, or None."""
    sql = f"SELECT reason FROM ccr_deliveries WHERE {OF_RUN} AND status = 'disabled' ORDER BY id DESC LIMIT 1"
    reason: str | None = transaction.value(sql, run=run_id, target=target)
    return reason


def hosts(transaction: Transaction) -> list[tuple[str, str]]:
    """Each host that something is to be delivered to, and the time of the first attempt."""
    found = []
    # From one host to the next through the index: there are few hosts, and may be a great many deliveries to one.
    host = transaction.value(FIRST_HOST)
    while host is not None:
        found.append((host, transaction.value(NEXT_ATTEMPT, host=host)))
        host = transaction.value(NEXT_HOST, host=host)
    return found


def due(transaction: Transaction, host: str, now: str, limit: int) -> list[int]:
    """Ids of what is to be sent to a host now, what has waited longest first."""
    return transaction.column(DUE, host=host, now=now, limit=limit)


def tried(
    transaction: Transaction,
    delivery_id: int,
    attempts_json: str,
    *,
    status: str,
    reason: str | None,
    next_attempt_at: str | None,
) -> None:
    """What has become of a delivery. One that was disabled meanwhile stays so, unless it has arrived."""
    transaction.execute(
        'UPDATE ccr_deliveries SET "attemptsJson" = :attempts WHERE id = :id', attempts=attempts_json, id=delivery_id
    )
    transaction.execute(
        'UPDATE ccr_deliveries SET status = :status, reason = :reason, "nextAttemptAt" = :next WHERE id = :id'
        + ("" if status == DELIVERED else " AND status = 'pending'"),
        status=status,
        reason=reason,
        next=next_attempt_at,
        id=delivery_id,
    )


def go_on(transaction: Transaction, run_id: str, target: str, now: str) -> None:
    """Let the first that is pending be sent."""
    transaction.execute(
        'UPDATE ccr_deliveries SET "nextAttemptAt" = :now WHERE id = :id AND "nextAttemptAt" IS NULL',
        now=now,
        id=_first_pending(transaction, run_id, target),
    )


def disable_run(transaction: Transaction, run_id: str, target: str, reason: str) -> None:
    """Give up what is pending for a target of a run."""
    _disable(transaction, OF_RUN, reason, run=run_id, target=target)


def disable_service(transaction: Transaction, reason: str) -> int:
    """Give up what is pending for the service's address. Tells how much that was."""
    return _disable(transaction, "host = :host AND target = :target", reason, host=SERVICE_HOST, target=SERVICE_TARGET)


def _disable(transaction: Transaction, which: str, reason: str, **parameters: str) -> int:
    return transaction.execute(
        f"UPDATE ccr_deliveries SET status = 'disabled', reason = :reason, \"nextAttemptAt\" = NULL WHERE {which} "
        "AND status = 'pending'",
        reason=reason,
        **parameters,
    )


def _first_pending(transaction: Transaction, run_id: str, target: str) -> int | None:
    sql = f"SELECT id FROM ccr_deliveries WHERE {OF_RUN} AND status = 'pending' ORDER BY id LIMIT 1"
    found: int | None = transaction.value(sql, run=run_id, target=target)
    return found
