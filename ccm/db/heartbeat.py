"""The table ccr_heartbeat: one row, written to find out whether the database accepts writes."""

from __future__ import annotations

from ccm.db.driver.transaction import Transaction
from ccm.timestamps import timestamp

# More than the start of a run with a short prompt needs: a disk with only a few free bytes counts as full.
ROOM_BYTES = 64 * 2**10


def beat(transaction: Transaction, room: int = 0) -> None:
    """Update the row.

    Args:
        room: bytes of padding, to prove that there is room for as many.

    Raises:
        StorageError: as `Database.transaction`.
    """
    sql = 'UPDATE ccr_heartbeat SET "beatAt" = :now, padding = :padding'
    transaction.execute(sql, now=timestamp(), padding="." * room)
