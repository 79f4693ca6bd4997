"""The single writer: one thread, one connection, everything that changes the database.

Others put work on its queue. It takes all that is waiting, writes it in one transaction, commits, and then rings. It
never sleeps while there is work, so batches form by themselves under load and an idle service commits at once.

Two kinds of work share the queue, in order:

- messages of a run (`append`). They are charged against a budget of bytes. A run whose message finds the budget spent
  waits in its own event loop, so its SDK stops reading, the pipe fills and the agent waits: the memory is bounded, and
  a loop is never blocked, for a blocked loop could take no cancel.
- control writes (`submit`, `write`): any function of the transaction. They are never charged, and whoever waits for
  one may give up: what was not begun then is dropped, provably.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from ccm.core.doorbell import Doorbell
from ccm.db import messages
from ccm.db.database import Database, Transaction
from ccm.errors import StorageDown, StorageRejected, Unavailable
from ccm.models import Message

log = logging.getLogger(__name__)

T = TypeVar("T")

# Bounds of one transaction: beyond them a commit only gets later, not cheaper.
BATCH_ITEMS = 2_000
BATCH_BYTES = 8 * 2**20
# How long a request waits for its write (seconds).
PATIENCE = 10.0
# How often one who gives up looks whether the writer has let go of the write (seconds).
LOOK_AGAIN = 0.05
# Pauses between tries while storage is down (seconds).
FIRST_PAUSE = 0.02
LONGEST_PAUSE = 1.0


class Write(Generic[T]):
    """One control write on its way: waiting, in the hands of the writer, done, or cancelled."""

    def __init__(self, work: Callable[[Transaction], T], on_commit: Callable[[T], None] | None) -> None:
        self._work = work
        self._on_commit = on_commit
        self._lock = threading.Lock()
        self._begun = False
        self._cancelled = False
        self._value: T
        self._error: Exception | None = None
        self.future: Future[T] = Future()

    def cancel(self) -> bool:
        """Give it up. False if the writer has it in hand at this moment, or is done with it."""
        with self._lock:
            if self._begun:
                return False
            self._cancelled = True
            return True

    def begin(self) -> bool:
        """The writer takes it into a transaction. False if it was cancelled."""
        with self._lock:
            self._begun = not self._cancelled
            return self._begun

    def put_back(self) -> None:
        """That transaction came to nothing; the write may be cancelled again."""
        with self._lock:
            self._begun = False

    def perform(self, transaction: Transaction) -> None:
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

    def settle(self) -> None:
        """Its transaction is committed: say so."""
        if self._error is not None:
            self.future.set_exception(self._error)
            return
        try:
            if self._on_commit is not None:
                self._on_commit(self._value)
        except Exception as error:
            log.exception("what should follow a commit failed")
            self.future.set_exception(error)
        else:
            self.future.set_result(self._value)


class _Stop:
    """The last item: what was put before it is written, what comes after is not."""


class Recorder:
    """The writer thread and its queue.

    Args:
        database: a writer, used by nobody else.
        doorbell: rung after each commit.
        budget: bytes of messages that may wait to be written.
        on_refused: told of a message that storage will never take, in the writer's thread.
    """

    def __init__(
        self,
        database: Database,
        doorbell: Doorbell,
        budget: int,
        on_refused: Callable[[str, Exception], None],
    ) -> None:
        self._database = database
        self._doorbell = doorbell
        self._budget = budget
        self._on_refused = on_refused
        self._queue: queue.Queue[Message | Write[object] | _Stop] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._lock = threading.Lock()
        self._charged = 0
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._accepting = False
        self._abandoned = threading.Event()
        self._uncertain = False
        # Runs of which storage has refused a message, with the reason.
        self._broken: dict[str, str] = {}
        self._trouble: str | None = None

    @property
    def trouble(self) -> str | None:
        """Why nothing is written at present, or None."""
        return self._trouble

    def broken(self, run_id: str) -> str | None:
        """Why storage has refused a message of a run, or None. For the writer's own thread."""
        return self._broken.get(run_id)

    @property
    def backlog_bytes(self) -> int:
        """Bytes of messages that wait to be written."""
        return self._charged

    def start(self) -> None:
        if not self._accepting:
            self._accepting = True
            self._thread.start()

    def stop(self, deadline: float) -> bool:
        """Write what is queued, then end. Idempotent.

        Args:
            deadline: the `time.monotonic()` at which to give up. False if something had to be given up.
        """
        with self._lock:
            if self._accepting:
                self._accepting = False
                self._queue.put(_Stop())
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                self._abandoned.set()
                self._thread.join(LONGEST_PAUSE + 5)
                return False
        return True

    # ---- what others call

    def submit(self, work: Callable[[Transaction], T], on_commit: Callable[[T], None] | None = None) -> Write[T]:
        """Have `work` done in the writer's next transaction.

        Args:
            work: may be called again when its transaction comes to nothing. What it raises undoes it alone.
            on_commit: called with its result in the writer's thread, after the commit and before anyone is told.

        Raises:
            Unavailable: the recorder has been stopped.
        """
        write = Write(work, on_commit)
        with self._lock:
            if not self._accepting:
                raise Unavailable("The service is shutting down; try again when it is back.", code="SHUTTING_DOWN")
            self._queue.put(write)  # type: ignore[arg-type]  # a Write of any result
        return write

    def write(self, work: Callable[[Transaction], T], on_commit: Callable[[T], None] | None = None) -> T:
        """Have `work` done and wait until it is committed, PATIENCE at the most.

        Raises:
            Unavailable: it was not done, and will not be.
        """
        write = self.submit(work, on_commit)
        patience = PATIENCE
        while True:
            try:
                return write.future.result(patience)
            except TimeoutError:
                if write.future.done():
                    raise  # it is the work that raised it
                if write.cancel():
                    reason = self._trouble or "it is too slow at the moment"
                    raise Unavailable(
                        f"Nothing was stored, because the database takes no writes: {reason}. Try again.",
                        code="STORAGE_UNAVAILABLE",
                    ) from None
                patience = LOOK_AGAIN  # the writer has it in hand just now

    async def append(self, message: Message) -> None:
        """Put a run's next message on the queue; waits in the caller's loop while the budget is spent."""
        while not self._put(message):
            room = asyncio.Event()
            with self._lock:
                self._waiting.append((asyncio.get_running_loop(), room))
            # Between the two steps the writer may have made room and told nobody.
            if self._put(message):
                return
            await room.wait()

    def _put(self, message: Message) -> bool:
        """Charge the budget and queue the message, under the queue's one lock. False if the budget is spent."""
        size = len(message.json)
        with self._queue.mutex:
            # One message always fits, or one larger than the budget would wait for ever.
            if self._charged and self._charged + size > self._budget:
                return False
            self._charged += size
            self._queue.queue.append(message)
            self._queue.not_empty.notify()
            return True

    def _release(self, size: int) -> None:
        with self._queue.mutex:
            self._charged -= size
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for loop, room in waiting:
            try:
                loop.call_soon_threadsafe(room.set)
            except RuntimeError:
                log.debug("a run that waited for room has ended")

    # ---- the writer's thread

    def _run(self) -> None:
        stopping = False
        while not stopping:
            batch, stopping = self._next_batch()
            if batch:
                try:
                    self._write_batch(batch)
                except Exception as error:
                    # A fault of ours: what was in hand is lost and said so, and the thread that all depend on goes on.
                    log.exception("the recorder failed")
                    self._give_up(batch, error)

    def _next_batch(self) -> tuple[list[Message | Write[object]], bool]:
        """All that is waiting, up to the bounds of a transaction; and whether it is the last."""
        batch: list[Message | Write[object]] = []
        size = 0
        item = self._queue.get()
        # One lock for all that is there: taking them one by one costs as much as writing them.
        with self._queue.mutex:
            waiting = self._queue.queue
            while True:
                if isinstance(item, _Stop):
                    return batch, True
                batch.append(item)
                if isinstance(item, Message):
                    size += item.size
                if not waiting or len(batch) >= BATCH_ITEMS or size >= BATCH_BYTES:
                    return batch, False
                item = waiting.popleft()

    def _write_batch(self, batch: list[Message | Write[object]]) -> None:
        pause = FIRST_PAUSE
        one_by_one = False
        while True:
            writes = [item for item in batch if isinstance(item, Write) and item.begin()]
            try:
                self._attempt(batch, set(writes), one_by_one)
            except StorageDown as error:
                if error.may_be_committed:
                    # Look before writing again; and what may be stored can no more be cancelled.
                    self._uncertain = True
                else:
                    self._put_back(writes)
                self._report_trouble(str(error))
                if self._abandoned.wait(pause):
                    self._give_up(batch, error)
                    return
                pause = min(pause * 2, LONGEST_PAUSE)
            except Exception as error:
                self._put_back(writes)
                if one_by_one:
                    # Not one row but the commit itself is refused: nobody's fault that could be told apart.
                    self._give_up(batch, error)
                    return
                one_by_one = True
            else:
                self._settle(batch, writes)
                return

    def _put_back(self, writes: list[Write[object]]) -> None:
        for write in writes:
            write.put_back()

    def _attempt(self, batch: list[Message | Write[object]], writes: set[Write[object]], one_by_one: bool) -> None:
        """One transaction over the batch, in order."""
        run_of_messages: list[Message] = []

        def flush(transaction: Transaction) -> None:
            if run_of_messages:
                self._insert(transaction, run_of_messages, one_by_one)
                run_of_messages.clear()

        with self._database.transaction(self._uncertain) as transaction:
            for item in batch:
                if isinstance(item, Message):
                    run_of_messages.append(item)
                elif item in writes:
                    flush(transaction)
                    item.perform(transaction)
            flush(transaction)

    def _insert(self, transaction: Transaction, batch: list[Message], one_by_one: bool) -> None:
        if self._broken:
            # What follows a refused message is left out, so that a run's indexes never have a gap.
            batch = [message for message in batch if message.run_id not in self._broken]
        if transaction.uncertain:
            stored = {run_id: messages.last_index(transaction, run_id) for run_id in {m.run_id for m in batch}}
            batch = [message for message in batch if message.index > stored[message.run_id]]
        if not one_by_one:
            if batch:
                messages.insert_many(transaction, batch)
            return
        for message in batch:
            if message.run_id in self._broken:
                continue
            try:
                with transaction.savepoint():
                    messages.insert_many(transaction, [message])
            except StorageRejected as error:
                self._refuse(message, error)

    def _refuse(self, message: Message, error: Exception) -> None:
        """Storage will never take it: its run fails, and nothing more of that run is stored."""
        log.error("run %s: storage refuses message %d: %s", message.run_id, message.index, error)
        self._broken[message.run_id] = str(error)
        self._on_refused(message.run_id, error)

    def _settle(self, batch: list[Message | Write[object]], writes: list[Write[object]]) -> None:
        self._uncertain = False
        if self._trouble is not None:
            log.warning("storage takes writes again")
            self._trouble = None
        stored = [item for item in batch if isinstance(item, Message)]
        self._release(sum(len(message.json) for message in stored))
        for write in writes:
            write.settle()
        for keys in {(message.run_id, message.session_id) for message in stored}:
            self._doorbell.ring(keys)

    def _report_trouble(self, reason: str) -> None:
        if self._trouble is None:
            log.error("storage takes no writes, trying on: %s", reason)
        self._trouble = reason

    def _give_up(self, batch: list[Message | Write[object]], error: Exception) -> None:
        """What could not be written is reported, not forgotten in silence."""
        lost = [item for item in batch if isinstance(item, Message)]
        log.critical("%d messages and %d writes were not stored: %s", len(lost), len(batch) - len(lost), error)
        self._release(sum(message.size for message in lost))
        for item in batch:
            if isinstance(item, Write) and not item.future.done():
                item.future.set_exception(Unavailable(f"Nothing was stored: {error}.", code="STORAGE_UNAVAILABLE"))
            elif isinstance(item, Message) and item.run_id not in self._broken:
                self._refuse(item, error)
