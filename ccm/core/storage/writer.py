"""The single writer: one thread, one connection, everything that changes the database.

Others put work on its queue. It takes all that is waiting, writes it in one transaction, commits, and then rings. It
never sleeps while there is work, so batches form by themselves under load and an idle service commits at once.

Two kinds of work share the queue, in order:

- messages of a run (`append`). They are charged against a budget of bytes. A run whose message finds the budget spent
  waits in its own event loop, so its SDK stops reading, the pipe fills and the agent waits: the memory is bounded, and
  a loop is never blocked, for a blocked loop could take no cancel.
- control writes (`submit`, `write`): any function of the transaction. They are never charged, and whoever waits for
  one may give up: what is not stored by then is dropped, provably, unless the database itself leaves that open.

While storage is down the writer tries on with what it has in hand, and with a heartbeat, so that it finds out by itself
when all is well again.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from ccm.core.problems import Problems
from ccm.core.storage.notifier import Notifier
from ccm.core.storage.write_task import WriteTask
from ccm.db import heartbeat, messages
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.errors import OutcomeUnknown, ShuttingDown, StorageDown, StorageError, StorageRejected, StorageUnavailable
from ccm.models import Message

log = logging.getLogger(__name__)

T = TypeVar("T")

# Bounds of one transaction: beyond them a commit only gets later, not cheaper.
BATCH_ITEMS = 2_000
BATCH_BYTES = 8 * 2**20
# How long a request waits for its write (seconds).
WRITE_TIMEOUT = 10.0
# How long it then waits for the writer to say what became of a write that it has in hand (seconds).
OUTCOME_TIMEOUT = 20.0
# Pauses between tries while storage is down (seconds).
FIRST_DELAY = 0.02
MAX_DELAY = 1.0
# How often a run that waits for room looks by itself (seconds).
ROOM_INTERVAL = 1.0
# The pause after a fault of the writer's own loop (seconds): one that persists must not take all of a processor.
FAULT_DELAY = 0.1
# The key of such a fault.
PROBLEM = "writer"


# None is the last item: what was put before it is written, what comes after is not.
Item = Message | WriteTask[object] | None


class Writer:
    """The writer thread and its queue.

    Args:
        database: a writer, used by nobody else.
        notifier: rung after each commit.
        budget: bytes of messages that may wait to be written.
        on_refused: told of a message that storage will never take, in the writer's thread.
        problems: told of faults of the writer's own.

    Attributes:
        on_unfollowed: called in the writer's thread when a fault has kept a commit from being followed as it should.
        broken: the runs of which storage has refused a message, with the reason. For the writer's own thread.
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
        self._budget = budget
        self._on_refused = on_refused
        self._problems = problems or Problems()
        self.on_unfollowed: Callable[[], None] = lambda: None
        # Lists of items. Items are added to the last one until the writer takes it, because a queue's own locks would
        # cost a good part of what a row costs.
        self._queue: queue.Queue[list[Item]] = queue.Queue()
        self._open: list[Item] | None = None
        # What the writer has taken from the queue and not yet put into a batch.
        self._taken: deque[Item] = deque()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._lock = threading.Lock()
        self._charged = 0
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        # What is to be called, with the `time.monotonic()` from which on.
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._accepting = False
        self._abandoned = threading.Event()
        self._uncertain = False
        self.broken: dict[str, str] = {}
        self._last_error: str | None = None
        self._last_error_since = 0.0
        self._last_commit = 0.0

    @property
    def last_error(self) -> str | None:
        """Why nothing is written at present, in words that anybody may read, or None."""
        return self._last_error

    @property
    def last_commit(self) -> float:
        """The `time.monotonic()` at which something was last stored; 0 if nothing was yet."""
        return self._last_commit

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
                self._enqueue(None)
                self._accepting = False
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                self._abandoned.set()
                self._thread.join(MAX_DELAY + 5)
                return False
        return True

    # ---- what others call

    def submit(self, work: Callable[[Transaction], T], on_commit: Callable[[T], None] | None = None) -> WriteTask[T]:
        """Have `work` done in the writer's next transaction.

        Args:
            work: may be called again when its transaction comes to nothing. What it raises undoes it alone.
            on_commit: called with its result in the writer's thread, after the commit and before anyone is told.

        Raises:
            ShuttingDown: the writer has been stopped.
        """
        write = WriteTask(work, on_commit)
        with self._lock:
            if not self._accepting:
                raise ShuttingDown
            self._enqueue(write)  # type: ignore[arg-type]  # a Write of any result
        return write

    def write(self, work: Callable[[Transaction], T], on_commit: Callable[[T], None] | None = None) -> T:
        """Have `work` done and wait until it is committed, PATIENCE at the most, or a little more to be sure.

        Raises:
            Unavailable: it was not done, and will not be.
            OutcomeUnknown: that cannot be said yet.
        """
        write = self.submit(work, on_commit)
        for patience in (WRITE_TIMEOUT, OUTCOME_TIMEOUT):
            try:
                return write.future.result(patience)
            except TimeoutError:
                if write.future.done():
                    return write.future.result()  # just now; or it is the work that raised it
            reason = self._last_error or "the database is too slow at the moment"
            refusal = StorageUnavailable(f"Nothing was stored: {reason}. Try again.")
            write.give_up(refusal)
        raise OutcomeUnknown(
            "The database does not answer, and it is not known whether this was stored. Send it again with the same "
            "Idempotency-Key, which is safe; without one, look first whether it has happened."
        )

    async def append(self, message: Message) -> None:
        """Put a run's next message on the queue; waits in the caller's loop while the budget is spent."""
        if self._put(message, None):
            return
        room = asyncio.Event()
        waiting = asyncio.get_running_loop(), room
        try:
            while not self._put(message, waiting):
                # The wait is bounded: a run that is not told of the room, because of a fault, would wait for ever.
                with suppress(TimeoutError):
                    async with asyncio.timeout(ROOM_INTERVAL):
                        await room.wait()
                room.clear()
        finally:
            with self._lock:
                self._waiting.discard(waiting)

    def call_later(self, seconds: float, function: Callable[[], None]) -> None:
        """Have a function called in the writer's thread after a while, if the writer has not been stopped by then."""
        with self._lock:
            self._later.append((time.monotonic() + seconds, function))
            self._queue.put([])  # the writer may be waiting for longer

    def _enqueue(self, item: Item) -> None:
        """Put an item on the queue; with the lock held."""
        if self._open is None:
            self._open = []
            self._queue.put(self._open)
        self._open.append(item)

    def _put(self, message: Message, waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None) -> bool:
        """Charge the budget and queue the message. False if the budget is spent; then `waiting` is told of room."""
        size = len(message.json)
        with self._lock:
            # One message always fits, or one larger than the budget would wait for ever.
            if self._charged and self._charged + size > self._budget:
                if waiting is not None:
                    self._waiting.add(waiting)
                return False
            self._enqueue(message)
            self._charged += size
            return True

    def _release(self, size: int) -> None:
        with self._lock:
            self._charged -= size
            waiting, self._waiting = self._waiting, set()
        for loop, room in waiting:
            try:
                loop.call_soon_threadsafe(room.set)
            except Exception as error:
                log.debug("a run that waited for room was not told, most likely because it has ended: %s", error)

    # ---- the writer's thread

    def _run(self) -> None:
        stopping = False
        while not stopping:
            batch: list[Message | WriteTask[object]] = []
            try:
                self._call_due()
                stopping = self._fill(batch)
                if batch:
                    self._write_batch(batch)
                self._problems.clear(PROBLEM)
            except BaseException as error:
                # A fault of ours. What was in hand is lost, and whoever waits for it is told. The thread must go on:
                # no run of the service could end without it. What is short may be memory, for this too.
                with suppress(BaseException):
                    self._problems.report(PROBLEM, "what was to be stored could not be, because of a fault", error)
                with suppress(BaseException):
                    self._give_up(batch, error)
                if self._abandoned.wait(FAULT_DELAY):
                    return

    def _call_due(self) -> None:
        """Call what is due."""
        if not self._later:
            return
        now = time.monotonic()
        with self._lock:
            due = [function for at, function in self._later if at <= now]
            self._later = [(at, function) for at, function in self._later if at > now]
        for function in due:
            self._guarded(function)

    def _take(self) -> None:
        """Wait for what is next on the queue, as long as nothing is to be called."""
        seconds = max(0.0, min(at for at, _ in self._later) - time.monotonic()) if self._later else None
        with suppress(queue.Empty):
            items = self._queue.get(timeout=seconds)
            with self._lock:
                self._open = None
            self._taken.extend(items)

    def _fill(self, batch: list[Message | WriteTask[object]]) -> bool:
        """Move what is waiting into a batch, up to the bounds of a transaction. True if nothing comes after it."""
        if not self._taken:
            self._take()
        size = 0
        while self._taken and len(batch) < BATCH_ITEMS and size < BATCH_BYTES:
            item = self._taken.popleft()
            if item is None:
                return True
            if isinstance(item, Message):
                size += item.size
            batch.append(item)
        return False

    def _write_batch(self, batch: list[Message | WriteTask[object]]) -> None:
        pause = FIRST_DELAY
        one_by_one = False
        while True:
            begun: list[WriteTask[object]] = []
            since = time.monotonic()
            try:
                self._attempt(batch, begun, one_by_one)
            except StorageDown as error:
                if error.may_be_committed:
                    self._uncertain = True  # look before writing again
                self._put_back(begun)
                self._report_error(error, since)
                if not self._accepting and all(isinstance(item, WriteTask) and item.future.done() for item in batch):
                    return  # nobody waits for any of it, and the end of the service need not either
                if self._abandoned.wait(pause):
                    self._give_up(batch, error)
                    return
                pause = min(pause * 2, MAX_DELAY)
            except Exception as error:
                self._put_back(begun)
                if one_by_one:
                    # Not one row but the commit itself is refused: nobody's fault that could be told apart.
                    self._give_up(batch, error)
                    return
                one_by_one = True
            else:
                self._settle(batch, begun)
                return

    def _put_back(self, writes: list[WriteTask[object]]) -> None:
        # What may be stored, by this try or the one before, can no more be given up as not stored.
        if not self._uncertain:
            for write in writes:
                write.put_back()

    def _attempt(
        self, batch: list[Message | WriteTask[object]], begun: list[WriteTask[object]], one_by_one: bool
    ) -> None:
        """One transaction over the batch, in order.

        Args:
            begun: where the writes go that are taken into it.
        """
        run_of_messages: list[Message] = []

        def flush(transaction: Transaction) -> None:
            if run_of_messages:
                self._insert(transaction, run_of_messages, one_by_one)
                run_of_messages.clear()

        with self._database.transaction(self._uncertain) as transaction:
            if self._last_error is not None:
                self._beat(transaction)
            for item in batch:
                if isinstance(item, Message):
                    run_of_messages.append(item)
                elif item.begin():
                    begun.append(item)
                    flush(transaction)
                    item.run(transaction)
            flush(transaction)

    def _beat(self, transaction: Transaction) -> None:
        """After a fault: with all writes of the batch given up nothing would be written, and the fault not noticed."""
        try:
            with transaction.savepoint():
                heartbeat.beat(transaction, heartbeat.ROOM_BYTES)
        except StorageRejected as error:
            log.warning("the heartbeat is refused: %s", error)

    def _insert(self, transaction: Transaction, batch: list[Message], one_by_one: bool) -> None:
        if self.broken:
            # What follows a refused message is left out, so that a run's indexes never have a gap.
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
                self._refuse(message, error)

    def _refuse(self, message: Message, error: BaseException) -> None:
        """Storage will never take it: its run fails, and nothing more of that run is stored."""
        log.error("run %s: storage refuses message %d: %s", message.run_id, message.index, error)
        self.broken[message.run_id] = str(error)
        self._on_refused(message.run_id, error)

    def _settle(self, batch: list[Message | WriteTask[object]], writes: list[WriteTask[object]]) -> None:
        """Tell of a commit. A fault in one step of it concerns nobody else who waits for the same commit."""
        self._uncertain = False
        followed = self._guarded(self._note_commit)
        stored = [item for item in batch if isinstance(item, Message)]
        followed &= self._guarded(lambda: self._release(sum(len(message.json) for message in stored)))
        for write in writes:
            followed &= self._guarded(write.settle, write)
        keys = {key for message in stored for key in (message.run_id, message.session_id)}
        followed &= self._guarded(lambda: self._notifier.notify(keys))
        if not followed:
            self._guarded(self.on_unfollowed)

    def _note_commit(self) -> None:
        self._last_commit = time.monotonic()
        if self._last_error is not None:
            log.warning("storage takes writes again, after %.1f seconds", self._last_commit - self._last_error_since)
            self._last_error = None

    def _guarded(self, tell: Callable[[], object], write: WriteTask[object] | None = None) -> bool:
        """Take a step of several. False if it failed; then a write that it was about tells of the fault."""
        try:
            return tell() is not False
        except BaseException as error:
            log.exception("what was committed could not be told")
            if write is not None:
                write.fail(error)
            return False

    def _report_error(self, error: StorageDown, since: float) -> None:
        if self._last_error is None:
            self._last_error_since = since
            log.error("storage takes no writes, trying on: %s", error)
        self._last_error = error.summary

    def _give_up(self, batch: list[Message | WriteTask[object]], error: BaseException) -> None:
        """Tell whoever waits that a batch is not stored; nothing is forgotten in silence."""
        self._last_error = None  # it is not being tried any more; the next write will tell
        lost = [item for item in batch if isinstance(item, Message)]
        log.critical("%d messages and %d writes were not stored: %s", len(lost), len(batch) - len(lost), error)
        self._guarded(lambda: self._release(sum(message.size for message in lost)))
        why = error.summary if isinstance(error, StorageError) else "the service failed; its log says more"
        refusal = StorageUnavailable(f"Nothing was stored: {why}.")
        for item in batch:
            if isinstance(item, WriteTask):
                self._guarded(partial(item.fail, refusal))
            elif item.run_id not in self.broken:
                self._guarded(partial(self._refuse, item, error))
