"""Sends what is in the outbox, from threads of its own.

What is due is read from the database, and so is each delivery just before it is sent, outside of any transaction. What
has become of it is stored by the recorder before the next one of the same run and target is sent. So a crash at any
moment leaves a delivery that is still due: it may arrive twice, but not be lost.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from typing import TypeVar

from ccm.core.doorbell import EVENTS, Doorbell
from ccm.core.pool import WorkerPool
from ccm.core.recorder import Recorder
from ccm.core.webhooks.outbox import Outbox
from ccm.core.webhooks.post import Answer, NoAnswer, Post
from ccm.core.webhooks.signature import headers
from ccm.core.webhooks.verdict import SCHEDULE, Verdict, judge
from ccm.db import deliveries, events, runs
from ccm.db.database import Database, Transaction
from ccm.errors import StorageDown, StorageError
from ccm.models import DELIVERED, DISABLED, FAILED, PENDING, RUN_TARGET, Delivery, timestamp
from ccm.webhook_urls import allowed, host_of

log = logging.getLogger(__name__)

T = TypeVar("T")

# Attempts at once, and of these at most to one host, and to one that has given no answer the last time: those that take
# all the time they get leave room for the others.
THREADS = 16
PER_HOST = 4
PER_SILENT_HOST = 1
# How long a receiver may take (seconds).
ATTEMPT_SECONDS = 15.0
# How long to sleep at most (seconds): the times of the next attempts are the clock's, which may jump.
LONGEST_SLEEP = 60.0
# The pause after a fault of the database (seconds).
FAULT_PAUSE = 1.0


@dataclass(frozen=True)
class Addresses:
    """Where webhooks may go, and who they are said to be from.

    `service` is told of every run; `allow` says which hosts a run's own address may have; `keys` sign.
    """

    service: str | None = None
    allow: Sequence[str] = ()
    keys: Sequence[bytes] = ()


class Sender:
    """
    Args:
        recorder: takes what has become of deliveries.
        database: to read from.
        doorbell: rings EVENTS when there may be something to send.
        outbox: decides what follows from an attempt.
        attempt_seconds: how long a receiver may take.
        schedule: the pauses between attempts (seconds).
    """

    def __init__(
        self,
        recorder: Recorder,
        database: Database,
        doorbell: Doorbell,
        outbox: Outbox,
        addresses: Addresses,
        *,
        attempt_seconds: float = ATTEMPT_SECONDS,
        schedule: Sequence[float] = SCHEDULE,
    ) -> None:
        self._recorder = recorder
        self._database = database
        self._doorbell = doorbell
        self._outbox = outbox
        self._addresses = addresses
        self._attempt_seconds = attempt_seconds
        self._schedule = schedule
        self._pool = WorkerPool(THREADS, "webhook")
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)
        self._lock = threading.Lock()
        # The host of each delivery that is in the hands of a thread, and what is being sent.
        self._hosts: dict[int, str] = {}
        self._posts: dict[int, Post] = {}
        # Hosts that gave no answer the last time.
        self._silent: set[str] = set()
        self._rung = threading.Event()
        self._stopping = False
        self._stopped = threading.Event()
        self._said_unsigned = False

    def start(self) -> None:
        """
        Raises:
            Unavailable: the database takes no writes.
        """
        self._recorder.write(self._outbox.begin)
        if self._addresses.service is not None:
            self._say_unsigned()
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
            posts = list(self._posts.values())
        for post in posts:
            post.cut()
        self._rung.set()

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
            if delivery_id in self._hosts:
                return False
            self._hosts[delivery_id] = host
        self._pool.submit(lambda: self._deliver(delivery_id))
        return True

    def _read(self, query: Callable[[Transaction], T]) -> T:
        with self._database.transaction() as transaction:
            return query(transaction)

    # ---- the threads that send

    def _deliver(self, delivery_id: int) -> None:
        """One attempt, and its outcome stored."""
        try:
            self._attempt(delivery_id)
        except StorageDown as error:
            log.debug("delivery %d cannot be read: %s", delivery_id, error)
            self._stopped.wait(FAULT_PAUSE)
        except Exception:
            # It may have been sent, and is still due: at once it would be sent again and again.
            if not self._stopping:
                log.exception("what has become of delivery %d is not stored", delivery_id)
            self._stopped.wait(LONGEST_SLEEP)
        with self._lock:
            del self._hosts[delivery_id]
        self._rung.set()

    def _attempt(self, delivery_id: int) -> None:
        def query(transaction: Transaction) -> tuple[Delivery, str, str | None] | None:
            delivery = deliveries.find(transaction, delivery_id)
            if delivery is None or delivery.status != PENDING:
                return None  # disabled since it was found
            run = runs.find(transaction, delivery.run_id) if delivery.target == RUN_TARGET else None
            url = self._addresses.service if run is None else run.webhook_url
            return delivery, events.text(transaction, delivery.event_id), url

        found = self._read(query)
        if found is None:
            return
        delivery, text, url = found
        refusal = self._refusal(delivery, url)
        if url is None or refusal is not None:
            self._store(delivery, delivery.attempts, Verdict(DISABLED, reason=refusal))
            return
        at, begun = timestamp(), time.monotonic()
        answer = self._post(delivery, url, text.encode("ascii"))
        took = round((time.monotonic() - begun) * 1_000)
        if self._stopped.is_set() and not isinstance(answer, Answer):
            return  # it was cut, and the receiver is not to blame
        self._heard(delivery.host, isinstance(answer, Answer))
        verdict = judge(answer, len(delivery.attempts) + 1, self._schedule)
        code = answer.status if isinstance(answer, Answer) else None
        attempt = {"at": at, "durationMs": took, "statusCode": code, "error": verdict.error}
        self._store(delivery, [*delivery.attempts, attempt], verdict)

    def _heard(self, host: str, answered: bool) -> None:
        with self._lock:
            (self._silent.discard if answered else self._silent.add)(host)

    def _refusal(self, delivery: Delivery, url: str | None) -> str | None:
        """Why a delivery is not to be sent by the settings as they are now."""
        if url is None:
            return "CCM_WEBHOOK_URL is not set any more"
        if delivery.target == RUN_TARGET and not allowed(url, self._addresses.allow):
            return f"CCM_WEBHOOK_ALLOW does not name {host_of(url)} any more"
        return None

    def _post(self, delivery: Delivery, url: str, body: bytes) -> Answer | str:
        """The receiver's answer, or why there is none."""
        if not self._addresses.keys:
            self._say_unsigned()
        signed = headers(delivery.webhook_id, int(time.time()), body, self._addresses.keys)
        post = Post(url, signed, body, self._attempt_seconds, self._tls)
        with self._lock:
            if self._stopped.is_set():
                return "the service has stopped"
            self._posts[delivery.id] = post
        try:
            return post.send()
        except NoAnswer as reason:
            return str(reason)
        finally:
            with self._lock:
                del self._posts[delivery.id]

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    def _store(self, delivery: Delivery, attempts: Sequence[dict[str, object]], verdict: Verdict) -> None:
        """Wait until it is committed, as long as it takes: tried again before, it would be sent twice.

        Raises:
            CCMError: the recorder has stopped.
        """
        self._recorder.submit(
            lambda transaction: self._outbox.tried(transaction, delivery, attempts, verdict)
        ).future.result()
        self._say(delivery, verdict)

    # ---- the log

    def _say(self, delivery: Delivery, verdict: Verdict) -> None:
        what = f"run {delivery.run_id}: {delivery.event_type} for {delivery.host or 'CCM_WEBHOOK_URL'}"
        if verdict.status == DELIVERED:
            log.info("%s delivered", what)
        elif verdict.status == PENDING:
            log.warning("%s not delivered, again in %.0f s: %s", what, verdict.pause, verdict.error)
        elif verdict.status == FAILED:
            log.error("%s given up: %s; at last %s", what, verdict.reason, verdict.error)
        elif delivery.target == RUN_TARGET:
            log.warning("%s disabled with all that would follow for this run: %s", what, verdict.reason)
        else:
            log.error("%s disabled, with all others for it until the next start: %s", what, verdict.reason)

    def _say_unsigned(self) -> None:
        if not self._addresses.keys and not self._said_unsigned:
            self._said_unsigned = True
            log.warning("webhooks are not signed, so receivers cannot know who calls: CCM_WEBHOOK_SECRET signs them")


def _seconds_until(at: str) -> float:
    return max(0.0, datetime.fromisoformat(at).timestamp() - time.time())
