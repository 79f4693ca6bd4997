"""The queue between everything that writes and the writer thread."""

from __future__ import annotations

import queue
import threading
from collections import deque
from contextlib import suppress

from ccm.core.storage.write_task import WriteTask
from ccm.models import Message

# Bounds of one transaction. A larger one commits later, not more cheaply.
BATCH_ITEMS = 2_000
BATCH_BYTES = 8 * 2**20

Item = Message | WriteTask[object]


class WriteQueue:
    """Messages and control writes in the order in which they were put.

    Each entry of the `queue.Queue` is a list. Items join the newest list until the writer takes it, because a queue
    operation per item would cost a good part of the time that its row costs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lists: queue.Queue[list[Item | None]] = queue.Queue()
        # The newest list, while items may join it.
        self._open: list[Item | None] | None = None
        # Items that the writer has taken from the queue but has not put into a batch yet.
        self._taken: deque[Item | None] = deque()

    def put(self, item: Item | None) -> None:
        """Append an item; None marks the end of the queue."""
        with self._lock:
            if self._open is None:
                opened: list[Item | None] = []
                self._lists.put(opened)
                self._open = opened
            self._open.append(item)

    def wake(self) -> None:
        """Make a `take` that waits return without an item."""
        self._lists.put([])

    def take(self, batch: list[Item], timeout: float | None) -> bool:
        """Move items into a batch, up to the bounds of a transaction. Only the writer thread calls this.

        Args:
            batch: receives the items, those moved before an exception included, so that none is lost.
            timeout: how long to wait for the first item (seconds); None waits until there is one, or `wake`.

        Returns: whether the end of the queue was reached.
        """
        if not self._taken:
            with suppress(queue.Empty):
                items = self._lists.get(timeout=timeout)
                with self._lock:
                    self._open = None
                self._taken.extend(items)
        size = 0
        while self._taken and len(batch) < BATCH_ITEMS and size < BATCH_BYTES:
            item = self._taken.popleft()
            if item is None:
                return True
            if isinstance(item, Message):
                size += item.size
            batch.append(item)
        return False
