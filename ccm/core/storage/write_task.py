"""A control write on its way through the writer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from ccm.db.driver.transaction import Transaction
from ccm.errors import StorageDown

log = logging.getLogger(__name__)

T = TypeVar("T")


class WriteTask(Generic[T]):
    """A queued write: pending, in progress, done or dropped. Its `future` completes when it is done or dropped."""

    def __init__(self, work: Callable[[Transaction], T], on_commit: Callable[[T], None] | None) -> None:
        self._work = work
        self._on_commit = on_commit
        self._lock = threading.RLock()
        self._in_progress = False
        # The reason given to `give_up`, None before that.
        self._given_up: Exception | None = None
        self._value: T
        self._error: Exception | None = None
        self.future: Future[T] = Future()

    def give_up(self, reason: Exception) -> None:
        """Drop the write: at once if it is pending, else as soon as its transaction fails.

        A dropped write is provably not stored, and its future raises `reason`. If the transaction is committed after
        all, the write is done.
        """
        with self._lock:
            self._given_up = reason
            if not self._in_progress:
                self.fail(reason)

    def begin(self) -> bool:
        """Mark the write as in progress. Return False if it was dropped."""
        with self._lock:
            self._in_progress = self._in_progress or self._given_up is None
            return self._in_progress

    def put_back(self) -> None:
        """Mark the write as pending again, because its transaction has certainly failed."""
        with self._lock:
            self._in_progress = False
            if self._given_up is not None:
                self.fail(self._given_up)

    def run(self, transaction: Transaction) -> None:
        """Do the work within a savepoint, so that an error in it affects no other write of the transaction.

        Raises:
            StorageDown: the whole transaction must be retried.
        """
        try:
            with transaction.savepoint():
                self._value = self._work(transaction)
                self._error = None
        except StorageDown:
            raise
        except Exception as error:
            self._error = error  # `settle` passes it to the future

    def settle(self) -> bool:
        """Call `on_commit` and complete the future, after the commit. Return False if `on_commit` failed."""
        if self._error is not None:
            self.fail(self._error)
            return True
        try:
            if self._on_commit is not None:
                self._on_commit(self._value)
        except Exception as error:
            log.exception("a write is committed, but its on_commit failed", extra={"event": "on_commit_failed"})
            self.fail(error)
            return False
        self.future.set_result(self._value)
        return True

    def fail(self, error: BaseException) -> None:
        """Complete the future with an error, unless it is complete already."""
        with self._lock:
            if not self.future.done():
                self.future.set_exception(error)
