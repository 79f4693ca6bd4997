"""Sends what is in the outbox, from threads of its own.

What is due is read from the database, and so is each delivery just before it is sent, outside of any transaction. What
has become of it is stored by the recorder before the next one of the same run and target is sent. So a crash at any
moment leaves a delivery that is still due: it may arrive twice, but not be lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import TypeVar

from ccm.core.doorbell import EVENTS, Doorbell
from ccm.core.pool import WorkerPool
from ccm.core.webhooks.courier import Courier
from ccm.db import deliveries
from ccm.db.database import Database, Transaction
from ccm.errors import StorageDown, StorageError
from ccm.models import timestamp

log = logging.getLogger(__name__)

T = TypeVar("T")

# Attempts at once, and of these at most to one host, and to one that has given no answer the last time: those that take
# all the time they get leave room for the others.
THREADS = 16
PER_HOST = 4
PER_SILENT_HOST = 1
# How long to sleep at most (seconds): the times of the next attempts are the clock's, which may jump.
LONGEST_SLEEP = 60.0
# How long threads get to end once what they send is cut (seconds). One that looks a name up may take longer.
END_SECONDS = 1.0
# The pause after a fault of the database (seconds).
FAULT_PAUSE = 1.0


class Sender:
    """
    Args:
        database: to read from.
        doorbell: rings EVENTS when there may be something to send.
        courier: delivers.
    """

    def __init__(self, database: Database, doorbell: Doorbell, courier: Courier) -> None:
        self._database = database
        self._doorbell = doorbell
        self._courier = courier
        self._pool = WorkerPool(THREADS, "webhook")
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        # The host of each delivery that is in the hands of a thread.
        self._hosts: dict[int, str] = {}
        # Hosts that gave no answer the last time.
        self._silent: set[str] = set()
        self._rung = threading.Event()
        self._stopping = False
        self._stopped = threading.Event()

    def start(self) -> None:
        """
        Raises:
            Unavailable: the database takes no writes.
        """
        self._courier.begin()
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
        self._courier.close()
        self._rung.set()
        # None may be reading when the database is closed, which is next: SQLite would crash the whole service.
        if self._thread.is_alive():
            self._thread.join(END_SECONDS)
        with self._idle:
            self._idle.wait_for(lambda: not self._hosts, END_SECONDS)

    # ---- the thread that finds what is due

    def _run(self) -> None:
        with self._doorbell.listening(EVENTS) as self._rung:
            while not self._stopped.is_set():
                self._rung.clear()
                idle = not self._hosts  # asked first: what ends later may make something else due
                try:
                    sleep = self._begin_due()
                except StorageError as error:
                    log.debug("what is to be sent cannot be read: %s", error)
                    sleep = FAULT_PAUSE
                except Exception:
                    log.exception("webhooks are not sent at the moment")
                    sleep = LONGEST_SLEEP
                if self._stopping and idle and not self._hosts:
                    return
                self._rung.wait(sleep)

    def _begin_due(self) -> float:
        """Hand what is due to threads. Gives the seconds until something else will be."""
        with self._lock:
            busy = Counter(self._hosts.values())
        hosts = self._read(deliveries.hosts)
        now = timestamp()
        # Who has least under way comes first.
        for host, at in sorted(hosts, key=lambda place: (busy[place[0]], place[1])):
            share = PER_SILENT_HOST if host in self._silent else PER_HOST
            room = min(share - busy[host], THREADS - busy.total())
            if at > now or room <= 0:
                continue
            # What is under way is due as well, until what has become of it is stored.
            for delivery_id in self._read(partial(deliveries.due, host=host, now=now, limit=PER_HOST + busy[host])):
                if room and self._take(delivery_id, host):
                    busy[host] += 1
                    room -= 1
        later = [at for _, at in hosts if at > now]
        return min(LONGEST_SLEEP, _seconds_until(min(later))) if later else LONGEST_SLEEP

    def _take(self, delivery_id: int, host: str) -> bool:
        with self._lock:
            if delivery_id in self._hosts or self._stopped.is_set():
                return False
            self._hosts[delivery_id] = host
        self._pool.submit(lambda: self._deliver(delivery_id, host))
        return True

    def _read(self, query: Callable[[Transaction], T]) -> T:
        with self._database.transaction() as transaction:
            return query(transaction)

    # ---- the threads that send

    def _deliver(self, delivery_id: int, host: str) -> None:
        try:
            answered = self._courier.deliver(delivery_id)
            with self._lock:
                (self._silent.discard if answered else self._silent.add)(host)
        except StorageDown as error:
            log.debug("delivery %d cannot be read: %s", delivery_id, error)
            self._stopped.wait(FAULT_PAUSE)
        except Exception:
            # It may have been sent, and is still due: at once it would be sent again and again.
            if not self._stopping:
                log.exception("what has become of delivery %d is not stored", delivery_id)
            self._stopped.wait(LONGEST_SLEEP)
        with self._idle:
            del self._hosts[delivery_id]
            self._idle.notify_all()
        self._rung.set()


def _seconds_until(at: str) -> float:
    return max(0.0, datetime.fromisoformat(at).timestamp() - time.time())
