"""The table ccr_events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ccm.db.driver.transaction import Transaction
from ccm.json_text import to_json_text
from ccm.models import Event, Run
from ccm.timestamps import timestamp

# What an event leaves out of its run: who made the run has it, and it may be long.
LEFT_OUT = ("prompt", "options")
# The greatest id that was ever given: the event itself may have been pruned.
GIVEN = {
    "sqlite": "SELECT seq FROM sqlite_sequence WHERE name = 'ccr_events'",
    "postgresql": "SELECT pg_sequence_last_value(pg_get_serial_sequence('ccr_events', 'id')::regclass)",
}


def insert(transaction: Transaction, type: str, run: Run, approval: Mapping[str, Any] | None = None) -> None:
    """
    Args:
        run: as it is now.
        approval: as the API shows it, where it is what the event is about.
    """
    now = timestamp()
    told = {name: value for name, value in run.to_json().items() if name not in LEFT_OUT}
    data = {"run": told} if approval is None else {"approval": approval, "run": told}
    text = to_json_text({"type": type, "timestamp": now, "data": data})
    row = {"type": type, "runId": run.id, "createdAt": now, "size": len(text), "eventJson": text}
    transaction.insert("ccr_events", row)


def last_id(transaction: Transaction) -> int:
    """The id of the newest event, 0 if there is none."""
    return int(transaction.value("SELECT COALESCE(MAX(id), 0) FROM ccr_events"))


def last_given(transaction: Transaction) -> int:
    """The greatest id that any event has ever had, 0 if there was none."""
    return int(transaction.value(GIVEN[transaction.dialect]) or 0)


def sizes(transaction: Transaction, after: int, limit: int) -> list[tuple[int, int]]:
    """Id and bytes of the first `limit` events beyond one."""
    sql = "SELECT id, size FROM ccr_events WHERE id > :after ORDER BY id LIMIT :limit"
    return [(event_id, size) for event_id, size in transaction.tuples(sql, after=after, limit=limit)]


def read(transaction: Transaction, after: int, through: int) -> list[Event]:
    """The events beyond one and through another, in order."""
    sql = 'SELECT id, type, "runId", "eventJson" FROM ccr_events WHERE id > :after AND id <= :through ORDER BY id'
    return [Event(*row) for row in transaction.tuples(sql, after=after, through=through)]


def find_text(transaction: Transaction, event_id: int) -> str | None:
    found: str | None = transaction.value('SELECT "eventJson" FROM ccr_events WHERE id = :id', id=event_id)
    return found
