"""The statements of one transaction of the writer: messages in bulk, control writes between them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from ccm.core.storage.write_queue import Item
from ccm.core.storage.write_task import WriteTask
from ccm.db import heartbeat, messages
from ccm.db.driver.transaction import Transaction
from ccm.errors import StorageRejected
from ccm.models import Message

log = logging.getLogger(__name__)


class BatchWriter:
    """Writes batches and keeps track of the runs that have lost a message.

    Args:
        on_refused: called with the run's id and the error when storage permanently refuses a message.

    Attributes:
        broken: the reason for each run that has a refused message. For the writer thread only.
    """

    def __init__(self, on_refused: Callable[[str, BaseException], None]) -> None:
        self._on_refused = on_refused
        self.broken: dict[str, str] = {}

    def write(
        self, transaction: Transaction, batch: Sequence[Item], begun: list[WriteTask[object]], *, one_by_one: bool
    ) -> None:
        """Write a batch in its order.

        Args:
            begun: receives the control writes that the transaction includes; dropped ones are left out.
            one_by_one: insert each message in a savepoint of its own, to find the one that storage refuses.
        """
        # Messages that follow one another are inserted together.
        pending: list[Message] = []
        for item in batch:
            if isinstance(item, Message):
                pending.append(item)
            elif item.begin():
                begun.append(item)
                self._insert(transaction, pending, one_by_one)
                pending = []
                item.run(transaction)
        self._insert(transaction, pending, one_by_one)

    def _insert(self, transaction: Transaction, batch: list[Message], one_by_one: bool) -> None:
        if self.broken:
            # Messages after a refused one are left out, so that a run's indexes never have a gap.
            batch = [message for message in batch if message.run_id not in self.broken]
        if transaction.uncertain:
            stored = {run_id: messages.last_index(transaction, run_id) for run_id in {m.run_id for m in batch}}
            batch = [message for message in batch if message.index > stored[message.run_id]]
        if not one_by_one:
            if batch:
                messages.insert_many(transaction, batch)
            return
        for message in batch:
            if message.run_id in self.broken:
                continue
            try:
                with transaction.savepoint():
                    messages.insert_many(transaction, [message])
            except StorageRejected as error:
                self.refuse(message, error)

    def refuse(self, message: Message, error: BaseException) -> None:
        """Fail the run of a message that is not stored: none of its later messages is stored either."""
        log.error(
            "run %s: storage refuses message %d: %s",
            message.run_id,
            message.index,
            error,
            extra={"event": "message_refused", "run_id": message.run_id},
        )
        self.broken[message.run_id] = str(error)
        self._on_refused(message.run_id, error)


def write_heartbeat(transaction: Transaction) -> None:
    """Write the heartbeat row along with a retried batch.

    If all of the batch's writes have been given up, the transaction would otherwise write nothing, succeed, and hide
    the fault.
    """
    try:
        with transaction.savepoint():
            heartbeat.beat(transaction, heartbeat.ROOM_BYTES)
    except StorageRejected as error:
        log.warning("storage refuses the heartbeat: %s", error, extra={"event": "heartbeat_refused"})
