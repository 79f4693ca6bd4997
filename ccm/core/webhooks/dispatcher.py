"""Dispatches due deliveries to threads of its own.

The database is the queue: the dispatcher reads which deliveries are due, and an executor reads each one again before it
sends it, outside of any transaction. The writer stores the outcome before the next delivery of the same run and target
is due. So a delivery is still due after a crash at any moment: it may arrive twice, but is not lost.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import datetime
from functools import partial

from ccm.core.problems import Problems
from ccm.core.storage.notifier import DELIVERIES, Notifier
from ccm.core.webhooks.concurrency_limits import THREADS, ConcurrencyLimits
from ccm.core.webhooks.delivery_executor import DeliveryExecutor
from ccm.core.worker_pool import WorkerPool
from ccm.db import deliveries
from ccm.db.driver.database import Database
from ccm.errors import StorageDown, StorageError
from ccm.timestamps import timestamp

log = logging.getLogger(__name__)


# Due deliveries per read. More than THREADS, because those in flight are still due.
PAGE = 100
# The number of silent hosts to remember. It is limited because each query names them.
MOST_SILENT = 1_000
# The longest wait for the next due delivery (seconds). It is limited because the clock may jump.
POLL_INTERVAL = 60.0
# The wait for threads to end after their requests were aborted (seconds). A lookup of a host may take longer.
END_TIMEOUT = 1.0
# The delay after the database could not be read (seconds).
STORAGE_RETRY_DELAY = 1.0
# The delay after any other failure, for example when no thread can be started (seconds).
FAILURE_RETRY_DELAY = 5.0
# The key and the sentence with which such a failure is reported.
PROBLEM = "webhooks"
PROBLEM_SENTENCE = "webhooks are not sent at the moment"


class Dispatcher:
    """A thread that finds due deliveries, and a pool of threads that execute them.

    Args:
        database: for reads.
        notifier: notifies DELIVERIES when a delivery may be due.
        delivery_executor: executes deliveries.
        problems: gets failures of the service.
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
        # The deliveries that a thread executes or is about to: their hosts by delivery id.
        self._in_flight: dict[int, str] = {}
        # Hosts that did not answer the last time, the most recent one last.
        self._silent: dict[str, None] = {}
        self._wake_up = threading.Event()
        self._stopping = False
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start the thread.

        Raises:
            Unavailable: the database is not writable.
        """
        self._delivery_executor.start()
        self._thread.start()

    def stop(self, deadline: float) -> None:
        """Send the due deliveries until the deadline. The rest is sent after the next start. Idempotent.

        Args:
            deadline: the `time.monotonic()` at which requests in flight are aborted.
        """
        self._stopping = True
        self._wake_up.set()
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            self._stopped.set()
        self._delivery_executor.close()
        self._wake_up.set()
        # The caller closes the database next. A thread that still read it would crash the whole process in SQLite.
        if self._thread.is_alive():
            self._thread.join(END_TIMEOUT)
        with self._idle:
            self._idle.wait_for(lambda: not self._in_flight, END_TIMEOUT)

    # ---- the thread that finds due deliveries

    def _run(self) -> None:
        """Dispatch due deliveries until the dispatcher stops."""
        with self._notifier.subscribe(DELIVERIES) as self._wake_up:
            while not self._stopped.is_set():
                self._wake_up.clear()
                # Checked first, because a delivery that ends meanwhile may make another one due.
                idle = not self._in_flight
                try:
                    sleep = self._dispatch_due()
                    self._problems.clear(PROBLEM)
                except StorageError as error:
                    extra = {"event": "deliveries_unreadable"}
                    log.debug("due deliveries cannot be read, retrying: %s", error, extra=extra)
                    sleep = STORAGE_RETRY_DELAY
                except Exception as error:
                    self._problems.report(PROBLEM, PROBLEM_SENTENCE, error)
                    sleep = FAILURE_RETRY_DELAY
                if self._stopping and idle and not self._in_flight:
                    return
                self._wake_up.wait(sleep)

    def _dispatch_due(self) -> float:
        """Dispatch the due deliveries. Return the seconds until another one is due, at most POLL_INTERVAL."""
        now = timestamp()
        with self._lock:
            limits = ConcurrencyLimits(self._in_flight.values(), set(self._silent))
        for retries in (False, True):  # first attempts come before retries
            self._dispatch(limits, now, retries)
        with self._database.transaction() as transaction:
            next_due = deliveries.find_next_due(transaction, now)
        return POLL_INTERVAL if next_due is None else min(POLL_INTERVAL, _seconds_until(next_due))

    def _dispatch(self, limits: ConcurrencyLimits, now: str, retries: bool) -> None:
        """Dispatch due first attempts, or due retries, as far as the limits allow."""
        has_more = True
        while has_more and limits.allow_any():
            # The query excludes full hosts, because their due deliveries may fill pages in front of all others.
            full = limits.full_hosts()
            with self._database.transaction() as transaction:
                page = deliveries.due(transaction, now, again=retries, without=full, limit=PAGE)
            dispatched = 0
            for delivery_id, host in page:
                if limits.allow(host) and self._submit(delivery_id, host):
                    limits.add(host)
                    dispatched += 1
            has_more = dispatched > 0 and len(page) == PAGE

    def _submit(self, delivery_id: int, host: str) -> bool:
        """Give a delivery to the pool. Return False if it is in flight already, or the dispatcher has stopped."""
        with self._lock:
            if delivery_id in self._in_flight or self._stopped.is_set():
                return False
            self._in_flight[delivery_id] = host
        try:
            self._pool.submit(partial(self._deliver, delivery_id, host), partial(self._failed, delivery_id))
        except BaseException:  # no thread can be started, so the delivery is still due
            self._release(delivery_id)
            raise
        return True

    def _release(self, delivery_id: int) -> None:
        with self._idle:
            self._in_flight.pop(delivery_id, None)
            self._idle.notify_all()

    # ---- the threads that send

    def _deliver(self, delivery_id: int, host: str) -> None:
        answered = self._delivery_executor.deliver(delivery_id)
        if answered is not None:
            self._remember(host, answered)
        self._release(delivery_id)
        self._wake_up.set()

    def _failed(self, delivery_id: int, error: BaseException) -> None:
        """Delay a delivery that failed unexpectedly, because it is still due."""
        delay = POLL_INTERVAL
        if isinstance(error, StorageDown):
            delay = STORAGE_RETRY_DELAY
            extra = {"event": "delivery_unreadable", "delivery_id": delivery_id}
            log.debug("delivery %d cannot be read, retrying: %s", delivery_id, error, extra=extra)
        elif not self._stopping:
            # It may have been sent. Without the delay it would be sent over and over.
            log.error(
                "delivery %d: cannot store the attempt's result; it may be resent",
                delivery_id,
                exc_info=error,
                extra={"event": "delivery_result_lost", "delivery_id": delivery_id},
            )
        self._stopped.wait(delay)
        self._release(delivery_id)
        self._wake_up.set()

    def _remember(self, host: str, answered: bool) -> None:
        """Remember whether a host answered."""
        with self._lock:
            self._silent.pop(host, None)
            if not answered:
                self._silent[host] = None
            if len(self._silent) > MOST_SILENT:
                del self._silent[next(iter(self._silent))]


def _seconds_until(at: str) -> float:
    return max(0.0, datetime.fromisoformat(at).timestamp() - time.time())
