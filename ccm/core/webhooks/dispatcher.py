"""Sends what is in the outbox, from threads of its own.

What is due is read from the database, and so is each delivery just before it is sent, outside of any transaction. What
has become of it is stored by the writer before the next one of the same run and target is sent. So a crash at any
moment leaves a delivery that is still due: it may arrive twice, but not be lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TypeVar

from ccm.core.problems import Problems
from ccm.core.storage.notifier import EVENTS, Notifier
from ccm.core.webhooks.concurrency_limits import THREADS, ConcurrencyLimits
from ccm.core.webhooks.delivery_executor import DeliveryExecutor
from ccm.core.worker_pool import WorkerPool
from ccm.db import deliveries
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.errors import StorageDown, StorageError
from ccm.timestamps import timestamp

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Handed:
    """A delivery that is in the hands of a thread, or is about to be; `host` is whom it is for."""

    host: str


# How much of what is due is read at once. More than can be under way, which is due as well.
PAGE = 100
# How many hosts that gave no answer are known at most: each query names them.
MOST_SILENT = 1_000
# How long to sleep at most (seconds): the times of the next attempts are the clock's, which may jump.
LONGEST_SLEEP = 60.0
# How long threads get to end once what they send is cut (seconds). One that looks a name up may take longer.
END_TIMEOUT = 1.0
# The pause after a fault of the database (seconds).
FAULT_DELAY = 1.0
# The pause after any other fault: no thread that can be started, say.
FAULT_SLEEP = 5.0
# The key of such a fault, and what is told of it.
PROBLEM = "webhooks"
UNSENT = "webhooks are not sent at the moment"


class Dispatcher:
    """
    Args:
        database: to read from.
        notifier: rings EVENTS when there may be something to send.
        delivery executor: delivers.
        problems: told of faults.
    """

    def __init__(
        self,
        database: Database,
        notifier: Notifier,
        delivery_executor: DeliveryExecutor,
        problems: Problems | None = None,
    ) -> None:
        self._database = database
        self._notifier = notifier
        self._delivery_executor = delivery_executor
        self._problems = problems or Problems()
        self._pool = WorkerPool(THREADS, self._problems, "webhook")
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        # By the delivery.
        self._handed: dict[int, _Handed] = {}
        # Hosts that gave no answer the last time, the latest at the end.
        self._silent: dict[str, None] = {}
        self._rung = threading.Event()
        self._stopping = False
        self._stopped = threading.Event()

    def start(self) -> None:
        """
        Raises:
            Unavailable: the database takes no writes.
        """
        self._delivery_executor.begin()
        self._thread.start()

    def stop(self, deadline: float) -> None:
        """Send what is due, as far as that is quick. The rest is sent after the next start. Idempotent.

        Args:
            deadline: the `time.monotonic()` at which what is under way is cut.
        """
        self._stopping = True
        self._rung.set()
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            self._stopped.set()
        self._delivery_executor.close()
        self._rung.set()
        # None may be reading when the database is closed, which is next: SQLite would crash the whole service.
        if self._thread.is_alive():
            self._thread.join(END_TIMEOUT)
        with self._idle:
            self._idle.wait_for(lambda: not self._handed, END_TIMEOUT)

    # ---- the thread that finds what is due

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._listen()
            except Exception as error:
                self._problems.report(PROBLEM, UNSENT, error)
                self._stopped.wait(FAULT_SLEEP)
            else:
                return

    def _listen(self) -> None:
        with self._notifier.subscribe(EVENTS) as self._rung:
            while not self._stopped.is_set():
                self._rung.clear()
                idle = not self._handed  # asked first: what ends later may make something else due
                sleep = self._look()
                if self._stopping and idle and not self._handed:
                    return
                self._rung.wait(sleep)

    def _look(self) -> float:
        """Begin what is due. Gives the seconds until something else may be."""
        try:
            sleep = self._begin_due()
        except StorageError as error:
            log.debug("what is to be sent cannot be read: %s", error)
            return FAULT_DELAY
        except Exception as error:
            self._problems.report(PROBLEM, UNSENT, error)
            return FAULT_SLEEP
        self._problems.clear(PROBLEM)
        return sleep

    def _begin_due(self) -> float:
        """Hand what is due to threads. Gives the seconds until something else will be."""
        now = timestamp()
        with self._lock:
            room = ConcurrencyLimits([handed.host for handed in self._handed.values()], set(self._silent))
        for again in (False, True):  # what has failed before waits behind what has not
            self._begin(room, now, again)
        later = self._read(partial(deliveries.find_next_due, now=now))
        return LONGEST_SLEEP if later is None else min(LONGEST_SLEEP, _seconds_until(later))

    def _begin(self, room: ConcurrencyLimits, now: str, again: bool) -> None:
        """Hand out what is due, or due again, as far as there is room."""
        is_more = True
        while is_more and room.has_any():
            # A host that has its share is left out by the query: all that is due for it may be in front of the others.
            page = self._read(partial(deliveries.due, now=now, again=again, without=room.full(), limit=PAGE))
            begun = 0
            for delivery_id, host in page:
                if room.has(host) and self._take(delivery_id, host):
                    room.begin(host)
                    begun += 1
            is_more = begun > 0 and len(page) == PAGE

    def _take(self, delivery_id: int, host: str) -> bool:
        handed = _Handed(host)
        with self._lock:
            if delivery_id in self._handed or self._stopped.is_set():
                return False
            self._handed[delivery_id] = handed
        try:
            self._pool.submit(
                lambda: self._deliver(delivery_id, handed), lambda error: self._not_done(delivery_id, handed, error)
            )
        except BaseException:  # no thread can be started: it is due still
            self._put_back(delivery_id, handed)
            raise
        return True

    def _not_done(self, delivery_id: int, handed: _Handed, error: BaseException) -> None:
        log.error("delivery %d is still due, because of a fault", delivery_id, exc_info=error)
        self._put_back(delivery_id, handed)

    def _put_back(self, delivery_id: int, handed: _Handed) -> None:
        with self._idle:
            if self._handed.get(delivery_id) is handed:
                del self._handed[delivery_id]
            self._idle.notify_all()

    def _read(self, query: Callable[[Transaction], T]) -> T:
        with self._database.transaction() as transaction:
            return query(transaction)

    # ---- the threads that send

    def _deliver(self, delivery_id: int, handed: _Handed) -> None:
        """Deliver it, whatever that raises. Nothing is done if it was put back meanwhile: another may be at it."""
        with self._lock:
            if self._handed.get(delivery_id) is not handed:
                return
        try:
            answered = self._delivery_executor.deliver(delivery_id)
            if answered is not None:
                self._remember(handed.host, answered)
        except StorageDown as error:
            log.debug("delivery %d cannot be read: %s", delivery_id, error)
            self._stopped.wait(FAULT_DELAY)
        except Exception:
            # It may have been sent, and is still due: at once it would be sent again and again.
            if not self._stopping:
                log.exception("what has become of delivery %d is not stored", delivery_id)
            self._stopped.wait(LONGEST_SLEEP)
        finally:
            self._put_back(delivery_id, handed)
            self._rung.set()

    def _remember(self, host: str, answered: bool) -> None:
        with self._lock:
            self._silent.pop(host, None)
            if not answered:
                self._silent[host] = None
            if len(self._silent) > MOST_SILENT:
                del self._silent[next(iter(self._silent))]


def _seconds_until(at: str) -> float:
    return max(0.0, datetime.fromisoformat(at).timestamp() - time.time())
