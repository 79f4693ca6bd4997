"""The table ccr_heartbeat: a row that is written to find out whether storage takes writes."""

from __future__ import annotations

from ccm.db.driver.transaction import Transaction
from ccm.timestamps import timestamp

# What a start with a short prompt takes, and more: a disk on which only a few bytes are left is full.
ROOM_BYTES = 64 * 2**10


def beat(transaction: Transaction, room: int = 0) -> None:
    """Write, and so find out.

    Args:
        room: bytes that there must be room for.

    Raises:
        StorageError: as `Database.transaction`.
    """
    sql = 'UPDATE ccr_heartbeat SET "beatAt" = :now, padding = :padding'
    transaction.execute(sql, now=timestamp(), padding="." * room)
