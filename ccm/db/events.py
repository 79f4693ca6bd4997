"""The table ccr_events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ccm.db.driver.transaction import Transaction
from ccm.db.event_bodies import body_of, columns_of
from ccm.json_text import to_json_text
from ccm.models import Event, EventRun, Run
from ccm.timestamps import timestamp

# The greatest id ever assigned, even if its event has been pruned since.
GIVEN = {
    "sqlite": "SELECT seq FROM sqlite_sequence WHERE name = 'ccr_events'",
    "postgresql": "SELECT pg_sequence_last_value(pg_get_serial_sequence('ccr_events', 'id')::regclass)",
}


def insert(transaction: Transaction, type: str, run: Run, approval: Mapping[str, Any] | None = None) -> None:
    """Insert an event.

    Args:
        run: its state after the event.
        approval: the approval that the event is about, as the API shows it; None for an event of the run itself.
    """
    now = timestamp()
    fields = run.to_json()
    shown = {name: fields[name] for name in EventRun.shape.shown}
    data = {"run": shown} if approval is None else {"approval": approval, "run": shown}
    text = to_json_text({"type": type, "timestamp": now, "data": data})
    transaction.insert("ccr_events", {"type": type, "runId": run.id, "createdAt": now, **columns_of(text)})


def last_id(transaction: Transaction) -> int:
    """Return the id of the newest event, 0 if there is none."""
    return int(transaction.value("SELECT COALESCE(MAX(id), 0) FROM ccr_events"))


def last_given(transaction: Transaction) -> int:
    """Return the greatest id that any event has ever had, 0 if there was none."""
    return int(transaction.value(GIVEN[transaction.dialect]) or 0)


def sizes(transaction: Transaction, after: int, limit: int) -> list[tuple[int, int]]:
    """Return id and bytes of the first `limit` events after one."""
    sql = "SELECT id, size FROM ccr_events WHERE id > :after ORDER BY id LIMIT :limit"
    return transaction.tuples(sql, after=after, limit=limit)


def read(transaction: Transaction, after: int, through: int) -> list[Event]:
    """Return the events after one and through another, in order."""
    sql = (
        'SELECT id, type, "runId", "eventJson", compressed FROM ccr_events '
        "WHERE id > :after AND id <= :through ORDER BY id"
    )
    rows = transaction.tuples(sql, after=after, through=through)
    return [Event(event_id, kind, run_id, body_of(*body)) for event_id, kind, run_id, *body in rows]


def find_text(transaction: Transaction, event_id: int) -> str | None:
    """Return the JSON text of an event, or None."""
    sql = 'SELECT "eventJson", compressed FROM ccr_events WHERE id = :id'
    return next((body_of(*row) for row in transaction.tuples(sql, id=event_id)), None)
