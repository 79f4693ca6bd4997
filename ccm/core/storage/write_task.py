"""One control write on its way through the writer."""

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
    """Waiting, in the hands of the writer, done, or dropped. Its `future` is done when it is either of the last two."""

    def __init__(self, work: Callable[[Transaction], T], on_commit: Callable[[T], None] | None) -> None:
        self._work = work
        self._on_commit = on_commit
        self._lock = threading.Lock()
        self._begun = False
        # Why whoever waited has given it up.
        self._given_up: Exception | None = None
        self._value: T
        self._error: Exception | None = None
        self.future: Future[T] = Future()

    def give_up(self, reason: Exception) -> None:
        """Have it dropped: at once, or when the writer's transaction with it has come to nothing. Its future then
        raises `reason`, and it is provably not stored. If that transaction is committed after all, the write is done.
        """
        with self._lock:
            self._given_up = reason
            if not self._begun:
                self._drop()

    def _drop(self) -> None:
        if not self.future.done():
            self.future.set_exception(self._given_up)

    def begin(self) -> bool:
        """The writer takes it into a transaction. False if it was dropped."""
        with self._lock:
            self._begun = self._begun or self._given_up is None
            return self._begun

    def put_back(self) -> None:
        """That transaction came to nothing, surely."""
        with self._lock:
            self._begun = False
            if self._given_up is not None:
                self._drop()

    def run(self, transaction: Transaction) -> None:
        """
        Raises:
            StorageDown: the whole transaction is to be tried again.
        """
        try:
            with transaction.savepoint():
                self._value = self._work(transaction)
                self._error = None
        except StorageDown:
            raise
        except Exception as error:
            # It fails alone and is told to whoever asked; what shares the transaction is not its business.
            self._error = error

    def settle(self) -> bool:
        """Tell the result, after the commit of its transaction. False if what is to follow the commit has failed."""
        if self._error is not None:
            self.fail(self._error)
            return True
        try:
            if self._on_commit is not None:
                self._on_commit(self._value)
        except Exception as error:
            log.exception("what should follow a commit failed")
            self.fail(error)
            return False
        self.future.set_result(self._value)
        return True

    def fail(self, error: BaseException) -> None:
        """Tell an error, unless the outcome is known already."""
        with self._lock:
            if not self.future.done():
                self.future.set_exception(error)
