"""The table ccr_deliveries.

Per run and target, only the oldest pending delivery has a `nextAttemptAt`. So all due deliveries can be sent in
parallel, and each target still receives the events of a run in order.
"""

from __future__ import annotations

from collections.abc import Collection

from ccm.db.driver.transaction import Transaction, parameter_list
from ccm.db.select import Select
from ccm.models import Delivery, DeliveryStatus, DeliveryTarget

SELECT = Select(
    Delivery,
    'ccr_deliveries d JOIN ccr_events e ON e.id = d."eventId"',
    {"eventType": "e.type"},
    filters={"runId": 'd."runId" = :runId'},
    order="id",
)
DUE = """
SELECT id, host FROM ccr_deliveries WHERE status = 'pending' AND again = :again AND "nextAttemptAt" <= :now{without}
ORDER BY "nextAttemptAt", host, id LIMIT :limit
"""
NEXT_DUE = """
SELECT MIN("nextAttemptAt") FROM ccr_deliveries WHERE status = 'pending' AND again = :again AND "nextAttemptAt" > :now
"""
ADVANCE = """
UPDATE ccr_deliveries SET "nextAttemptAt" = :now
WHERE status = 'pending' AND again = :again AND "nextAttemptAt" > :latest
"""
OF_RUN = '"runId" = :run AND target = :target'
# The host of deliveries to the address of the service.
SERVICE_HOST = ""


def insert(
    transaction: Transaction, run_id: str, target: str, webhook_id: str, host: str, *, reason: str | None, now: str
) -> None:
    """Insert a delivery of the newest event.

    Args:
        host: of the run's own address; SERVICE_HOST for the service's.
        reason: why the delivery is disabled from the start; None if it is to be sent.
    """
    first = reason is None and _find_first_pending(transaction, run_id, target) is None
    status = DeliveryStatus.DISABLED if reason else DeliveryStatus.PENDING
    row = {"runId": run_id, "target": target, "webhookId": webhook_id, "host": host, "status": status, "reason": reason}
    row |= {"attemptsJson": "[]", "nextAttemptAt": now if first else None}
    # The newest event is the one just written, because there is only one writer.
    event_id = transaction.value("SELECT MAX(id) FROM ccr_events")
    transaction.insert("ccr_deliveries", {"eventId": event_id, "again": 0, **row})


def find(transaction: Transaction, delivery_id: int) -> Delivery | None:
    """Return a delivery, or None."""
    return SELECT.find(transaction, "WHERE d.id = :id", id=delivery_id)


def page(transaction: Transaction, run_id: str, *, limit: int, after: int | None) -> list[Delivery]:
    """Return the deliveries of a run after the one with id `after`, oldest first."""
    return SELECT.page(transaction, {"runId": run_id}, limit, after, newest_first=False)


def find_disabled_reason(transaction: Transaction, run_id: str, target: str) -> str | None:
    """Return why deliveries to a target of a run are disabled; None if they are not."""
    sql = f"SELECT reason FROM ccr_deliveries WHERE {OF_RUN} AND status = 'disabled' ORDER BY id DESC LIMIT 1"
    reason: str | None = transaction.value(sql, run=run_id, target=target)
    return reason


def due(
    transaction: Transaction, now: str, *, again: bool, without: Collection[str], limit: int
) -> list[tuple[int, str]]:
    """Return ids and hosts of due deliveries, the longest waiting first.

    Args:
        again: select deliveries that have failed before, or those that have not been tried.
        without: hosts to leave out.
    """
    names, hosts = parameter_list("host", without)
    condition = f" AND host NOT IN ({names})" if names else ""
    return transaction.tuples(DUE.format(without=condition), now=now, again=int(again), limit=limit, **hosts)


def find_next_due(transaction: Transaction, now: str) -> str | None:
    """Return the earliest time after `now` at which a delivery is due; None if there is none."""
    times = [transaction.value(NEXT_DUE, now=now, again=again) for again in (0, 1)]
    return min((at for at in times if at is not None), default=None)


def advance(transaction: Transaction, latest: str, now: str) -> int:
    """Make deliveries due now whose next attempt is later than `latest`. Return how many there are."""
    return sum(transaction.execute(ADVANCE, latest=latest, now=now, again=again) for again in (0, 1))


def record_attempt(
    transaction: Transaction,
    delivery_id: int,
    attempts_json: str,
    *,
    status: str,
    reason: str | None,
    next_attempt_at: str | None,
) -> None:
    """Store the result of an attempt. A delivery that was disabled meanwhile stays disabled, unless it has arrived."""
    transaction.update("ccr_deliveries", {"attemptsJson": attempts_json, "again": 1}, "id = :id", id=delivery_id)
    values = {"status": status, "reason": reason, "nextAttemptAt": next_attempt_at}
    selected = "id = :id" if status == DeliveryStatus.DELIVERED else "id = :id AND status = 'pending'"
    transaction.update("ccr_deliveries", values, selected, id=delivery_id)


def make_next_due(transaction: Transaction, run_id: str, target: str, now: str) -> None:
    """Make the oldest pending delivery of a run and target due."""
    oldest = _find_first_pending(transaction, run_id, target)
    transaction.update("ccr_deliveries", {"nextAttemptAt": now}, 'id = :id AND "nextAttemptAt" IS NULL', id=oldest)


def disable_run(transaction: Transaction, run_id: str, target: str, reason: str) -> None:
    """Disable the pending deliveries for a target of a run."""
    _disable(transaction, OF_RUN, reason, run=run_id, target=target)


def disable_service(transaction: Transaction, reason: str) -> int:
    """Disable the pending deliveries to the service's address. Return how many there are."""
    return _disable(
        transaction, "host = :host AND target = :target", reason, host=SERVICE_HOST, target=DeliveryTarget.SERVICE
    )


def _disable(transaction: Transaction, condition: str, reason: str, **parameters: str) -> int:
    values = {"status": DeliveryStatus.DISABLED, "reason": reason, "nextAttemptAt": None}
    return transaction.update("ccr_deliveries", values, f"{condition} AND status = 'pending'", **parameters)


def _find_first_pending(transaction: Transaction, run_id: str, target: str) -> int | None:
    sql = f"SELECT id FROM ccr_deliveries WHERE {OF_RUN} AND status = 'pending' ORDER BY id LIMIT 1"
    delivery_id: int | None = transaction.value(sql, run=run_id, target=target)
    return delivery_id
