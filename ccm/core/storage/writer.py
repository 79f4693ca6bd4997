"""The writer: one thread with one connection that makes every change to the database.

It takes everything that is queued, writes it in one transaction, commits, and then notifies subscribers. It never
sleeps while there is work, so batches form by themselves under load and an idle service commits at once.

The queue holds two kinds of items, in order:

- messages of a run (`append`), which are charged to the message budget.
- control writes (`submit`, `write`): any function of the transaction. They are never charged. A caller may give one up:
  unless it is stored by then it is dropped, provably, or its outcome is reported as unknown.

While the database is down the writer keeps retrying its batch, together with a heartbeat, so that it notices recovery
by itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from ccm.core.problems import Problems
from ccm.core.storage.message_budget import MessageBudget
from ccm.core.storage.notifier import Notifier
from ccm.core.storage.write_queue import Item, WriteQueue
from ccm.core.storage.write_task import WriteTask
from ccm.db import heartbeat, messages
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.errors import OutcomeUnknown, ShuttingDown, StorageDown, StorageError, StorageRejected, StorageUnavailable
from ccm.models import Message

log = logging.getLogger(__name__)

T = TypeVar("T")

# How long a request waits for its write (seconds).
WRITE_TIMEOUT = 10.0
# How long it then waits for the outcome of a write that is in progress (seconds).
OUTCOME_TIMEOUT = 20.0
# Pauses between retries while the database is down (seconds).
FIRST_DELAY = 0.02
MAX_DELAY = 1.0
# The pause after a fault in the writer's own loop (seconds), so that a persistent fault does not take a whole core.
FAULT_DELAY = 0.1
# The key under which such a fault is reported.
PROBLEM = "writer"


class Writer:
    """The writer thread.

    Args:
        database: a writable one that nothing else uses.
        notifier: notified after each commit.
        budget: bytes of messages that may wait to be written.
        on_refused: called in the writer thread, with a run's id and the error, when storage permanently refuses one of
            its messages.
        problems: receives faults of the writer itself.

    Attributes:
        on_unfollowed: called in the writer thread when a fault has interrupted the steps that follow a commit.
        broken: the reason for each run of which storage has refused a message. For the writer thread only.
        last_error: why nothing can be written at present, without secrets or paths; None if writing works.
        last_commit: the `time.monotonic()` of the last commit; 0 before the first.
    """

    def __init__(
        self,
        database: Database,
        notifier: Notifier,
        budget: int,
        on_refused: Callable[[str, BaseException], None],
        problems: Problems | None = None,
    ) -> None:
        self._database = database
        self._notifier = notifier
        self._problems = problems or Problems()
        self.on_unfollowed: Callable[[], None] = lambda: None
        self._queue = WriteQueue()
        self._budget = MessageBudget(budget)
        self._on_refused = on_refused
        self.broken: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._lock = threading.Lock()
        # Functions to call, each with the `time.monotonic()` at which it is due.
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._accepting = False
        self._abandoned = threading.Event()
        # Whether the batch may be committed already, because the answer to its COMMIT was lost.
        self._uncertain = False
        self.last_error: str | None = None
        self.last_commit = 0.0
        # When the first failed attempt since the last commit began.
        self._down_since = 0.0

    def start(self) -> None:
        """Start the thread. Idempotent."""
        if not self._accepting:
            self._accepting = True
            self._thread.start()

    def stop(self, deadline: float) -> bool:
        """Write everything that is queued, then end the thread. Idempotent.

        Args:
            deadline: the `time.monotonic()` at which to give up.

        Returns: False if something had to be given up.
        """
        with self._lock:
            if self._accepting:
                self._queue.put(None)
                self._accepting = False
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                self._abandoned.set()
                self._thread.join(MAX_DELAY + 5)
                return False
        return True

    # ---- called from other threads

    def submit(self, work: Callable[[Transaction], T], on_commit: Callable[[T], None] | None = None) -> WriteTask[T]:
        """Queue a write for the writer's next transaction.

        Args:
            work: is called again if the transaction fails. If it raises, only its own changes roll back.
            on_commit: called with the result in the writer thread, after the commit and before the future completes.

        Raises:
            ShuttingDown: the writer has been stopped.
        """
        write = WriteTask(work, on_commit)
        with self._lock:
            if not self._accepting:
                raise ShuttingDown
            self._queue.put(write)  # type: ignore[arg-type]  # a WriteTask of any result
        return write

    def write(self, work: Callable[[Transaction], T], on_commit: Callable[[T], None] | None = None) -> T:
        """Submit a write and wait for its commit, for WRITE_TIMEOUT plus OUTCOME_TIMEOUT at most.

        Raises:
            Unavailable: the write is not stored, and never will be.
            OutcomeUnknown: it cannot be known yet whether the write is stored.
        """
        write = self.submit(work, on_commit)
        for timeout in (WRITE_TIMEOUT, OUTCOME_TIMEOUT):
            try:
                return write.future.result(timeout)
            except TimeoutError:
                if write.future.done():
                    return write.future.result()  # it completed just now, or the work itself raised TimeoutError
            reason = self.last_error or "the database is too slow at the moment"
            refusal = StorageUnavailable(f"Nothing was stored: {reason}. Try again.")
            write.give_up(refusal)
        raise OutcomeUnknown(
            "The database does not answer, so it is not known whether this was stored. Send it again with the same "
            "Idempotency-Key, which is safe; without one, first check whether it has happened."
        )

    async def append(self, message: Message) -> None:
        """Queue a run's next message, waiting in the caller's event loop while the message budget is spent."""
        size = message.size
        if not self._budget.try_charge(size):  # most messages fit, and need no second coroutine
            await self._budget.charge(size)
        try:
            self._queue.put(message)
        except BaseException:
            self._budget.release(size)
            raise

    def call_later(self, seconds: float, function: Callable[[], None]) -> None:
        """Call a function in the writer thread after a delay, unless the writer is stopped before."""
        with self._lock:
            self._later.append((time.monotonic() + seconds, function))
            self._queue.wake()  # the writer may be waiting for longer than that

    # ---- the writer thread

    def _run(self) -> None:
        stopping = False
        while not stopping:
            batch: list[Item] = []
            try:
                self._call_due()
                timeout = max(0.0, min(at for at, _ in self._later) - time.monotonic()) if self._later else None
                stopping = self._queue.take(batch, timeout)
                if batch:
                    self._write_batch(batch)
                self._problems.clear(PROBLEM)
            except BaseException as error:
                # A fault of our own. The batch is lost, and its callers get the error. The thread must survive, because
                # without it no run could end. Memory may be short, so even this handling may fail.
                with suppress(BaseException):
                    self._problems.report(PROBLEM, "changes could not be stored because of a fault", error)
                with suppress(BaseException):
                    self._give_up(batch, error)
                if self._abandoned.wait(FAULT_DELAY):
                    return

    def _call_due(self) -> None:
        if not self._later:
            return
        now = time.monotonic()
        with self._lock:
            due = [function for at, function in self._later if at <= now]
            self._later = [(at, function) for at, function in self._later if at > now]
        for function in due:
            self._try_step(function)

    def _write_batch(self, batch: list[Item]) -> None:
        delay = FIRST_DELAY
        one_by_one = False
        while True:
            begun: list[WriteTask[object]] = []
            since = time.monotonic()
            try:
                self._attempt(batch, begun, one_by_one)
            except StorageDown as error:
                if error.may_be_committed:
                    self._uncertain = True
                self._put_back(begun)
                self._report_error(error, since)
                if not self._accepting and all(isinstance(item, WriteTask) and item.future.done() for item in batch):
                    return  # every write was given up, so the service need not wait for the database to stop
                if self._abandoned.wait(delay):
                    self._give_up(batch, error)
                    return
                delay = min(delay * 2, MAX_DELAY)
            except Exception as error:
                self._put_back(begun)
                if one_by_one:
                    # The commit itself is refused, so no single item can be blamed.
                    self._give_up(batch, error)
                    return
                one_by_one = True
            else:
                self._settle(batch, begun)
                return

    def _put_back(self, writes: list[WriteTask[object]]) -> None:
        # Writes that may be stored, by this attempt or the one before, can no longer be dropped as not stored.
        if not self._uncertain:
            for write in writes:
                write.put_back()

    def _attempt(self, batch: list[Item], begun: list[WriteTask[object]], one_by_one: bool) -> None:
        """Write a batch in one transaction, in its order.

        Args:
            begun: receives the control writes that the transaction includes; dropped ones are left out.
            one_by_one: insert each message in a savepoint of its own, to find the one that storage refuses.
        """
        with self._database.transaction(self._uncertain) as transaction:
            if self.last_error is not None:
                _write_heartbeat(transaction)
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
        """Insert messages, except those that are stored already and those that follow a refused one of their run."""
        if self.broken:
            # Messages after a refused one are left out, so that a run's indexes never have a gap.
            batch = [message for message in batch if message.run_id not in self.broken]
        if transaction.uncertain:
            stored = {run_id: messages.last_index(transaction, run_id) for run_id in {m.run_id for m in batch}}
            batch = [message for message in batch if message.index > stored[message.run_id]]
        if not one_by_one:
            messages.insert_many(transaction, batch)
            return
        for message in batch:
            if message.run_id not in self.broken:
                try:
                    with transaction.savepoint():
                        messages.insert_many(transaction, [message])
                except StorageDown:
                    raise
                except Exception as error:
                    self._refuse(message, error)

    def _refuse(self, message: Message, error: BaseException) -> None:
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

    def _settle(self, batch: list[Item], writes: list[WriteTask[object]]) -> None:
        """Follow up a commit. A fault in one step must not affect the others that wait for the same commit."""
        self._uncertain = False
        followed = self._try_step(self._record_commit)
        stored = [item for item in batch if isinstance(item, Message)]
        followed &= self._try_step(lambda: self._budget.release(sum(message.size for message in stored)))
        for write in writes:
            followed &= self._try_step(write.settle, write)
        keys = {message.run_id for message in stored} | {message.session_id for message in stored}
        followed &= self._try_step(lambda: self._notifier.notify(keys))
        if not followed:
            self._try_step(self.on_unfollowed)

    def _record_commit(self) -> None:
        self.last_commit = time.monotonic()
        if self.last_error is not None:
            down = self.last_commit - self._down_since
            log.warning("database writable again, after %.1f seconds", down, extra={"event": "database_recovered"})
            self.last_error = None

    def _try_step(self, step: Callable[[], object], write: WriteTask[object] | None = None) -> bool:
        """Call one of several independent steps. If it fails, log it, fail the write it concerns and return False."""
        try:
            return step() is not False
        except BaseException as error:
            log.exception("a step in the writer thread failed", extra={"event": "writer_step_failed"})
            if write is not None:
                write.fail(error)
            return False

    def _report_error(self, error: StorageDown, since: float) -> None:
        if self.last_error is None:
            self._down_since = since
            log.error("database not writable, retrying: %s", error, extra={"event": "database_down"})
        self.last_error = error.summary

    def _give_up(self, batch: list[Item], error: BaseException) -> None:
        """Report every item of a batch as not stored, so that nothing is lost silently."""
        self.last_error = None  # unknown again, because the batch is no longer retried
        lost = [item for item in batch if isinstance(item, Message)]
        log.critical(
            "%d messages and %d writes were not stored: %s",
            len(lost),
            len(batch) - len(lost),
            error,
            extra={"event": "batch_lost"},
        )
        self._try_step(lambda: self._budget.release(sum(message.size for message in lost)))
        reason = error.summary if isinstance(error, StorageError) else "the service failed; its log says more"
        refusal = StorageUnavailable(f"Nothing was stored: {reason}.")
        for item in batch:
            if isinstance(item, WriteTask):
                self._try_step(partial(item.fail, refusal))
            elif item.run_id not in self.broken:
                self._try_step(partial(self._refuse, item, error))


def _write_heartbeat(transaction: Transaction) -> None:
    """Write the heartbeat row along with a retried batch.

    If all of the batch's writes have been given up, the transaction would otherwise write nothing, succeed, and hide
    the fault.
    """
    try:
        with transaction.savepoint():
            heartbeat.beat(transaction, heartbeat.ROOM_BYTES)
    except StorageRejected as error:
        log.warning("storage refuses the heartbeat: %s", error, extra={"event": "heartbeat_refused"})
