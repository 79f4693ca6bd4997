"""One attempt to deliver: read, sent, judged, and its outcome stored."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ccm.core.storage.writer import Writer
from ccm.core.webhooks.outbox import Outbox
from ccm.core.webhooks.post import Answer, NoAnswer, Post
from ccm.core.webhooks.retry import SCHEDULE, RetryDecision, decide
from ccm.core.webhooks.signature import headers
from ccm.db import deliveries, events, runs
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.models import Attempt, Delivery, DeliveryStatus, DeliveryTarget
from ccm.settings.webhook_urls import allowed, host_of
from ccm.timestamps import timestamp

log = logging.getLogger(__name__)

# How long a receiver may take (seconds).
ATTEMPT_TIMEOUT = 15.0


@dataclass(frozen=True)
class Addresses:
    """Where webhooks may go, and who they are said to be from.

    `service` is told of every run; `allow` says which hosts a run's own address may have; `keys` sign.
    """

    service: str | None = None
    allow: Sequence[str] = ()
    keys: Sequence[bytes] = ()


class DeliveryExecutor:
    """Delivers, in whatever thread it is called in.

    Args:
        writer: takes what has become of deliveries.
        database: to read from.
        outbox: decides what follows from an attempt.
        attempt_seconds: how long a receiver may take.
        schedule: the pauses between attempts (seconds).
    """

    def __init__(
        self,
        writer: Writer,
        database: Database,
        outbox: Outbox,
        addresses: Addresses,
        *,
        attempt_seconds: float = ATTEMPT_TIMEOUT,
        schedule: Sequence[float] = SCHEDULE,
    ) -> None:
        self._writer = writer
        self._database = database
        self._outbox = outbox
        self._addresses = addresses
        self._attempt_seconds = attempt_seconds
        self._schedule = schedule
        self._lock = threading.Lock()
        # What is being sent, by the delivery.
        self._posts: dict[int, Post] = {}
        self._closed = threading.Event()
        self._said_unsigned = False

    def begin(self) -> None:
        """Before the first delivery.

        Raises:
            Unavailable: the database takes no writes.
        """
        self._writer.write(self._outbox.begin)
        if self._addresses.service is not None:
            self._say_unsigned()

    def close(self) -> None:
        """Cut what is under way, and send nothing more. What was cut is as if it had not been tried."""
        with self._lock:
            self._closed.set()
            posts = list(self._posts.values())
        for post in posts:
            post.abort()

    def deliver(self, delivery_id: int) -> bool | None:
        """One attempt, and its outcome stored. Whether the receiver gave an answer; None if it was not asked.

        Raises:
            StorageDown: the delivery cannot be read; nothing was sent.
            Exception: what has become of it cannot be stored.
        """

        def query(transaction: Transaction) -> tuple[Delivery, str, str | None] | None:
            delivery = deliveries.find(transaction, delivery_id)
            # Disabled since it was found, or just tried: who found it may have read before that was stored.
            if delivery is None or (delivery.next_attempt_at or "~") > timestamp():
                return None
            run = runs.find(transaction, delivery.run_id) if delivery.target == DeliveryTarget.RUN else None
            text = events.find_text(transaction, delivery.event_id)
            # Deleted with its run since the delivery was read, which PostgreSQL lets happen between two statements.
            if text is None or (run is None and delivery.target == DeliveryTarget.RUN):
                return None
            return delivery, text, self._addresses.service if run is None else run.webhook_url

        if self._closed.is_set():
            return None
        with self._database.transaction() as transaction:
            found = query(transaction)
        if found is None:
            return None
        delivery, text, url = found
        refusal = self._refusal(delivery, url)
        if url is None or refusal is not None:
            self._store(delivery, delivery.attempts.value, RetryDecision(DeliveryStatus.DISABLED, reason=refusal))
            return None
        at, begun = timestamp(), time.monotonic()
        answer = self._post(delivery, url, text.encode("ascii"))
        took = round((time.monotonic() - begun) * 1_000)
        if self._closed.is_set() and not isinstance(answer, Answer):
            return None  # it was cut, and the receiver is not to blame
        decision = decide(answer, len(delivery.attempts.value) + 1, self._schedule)
        code = answer.status if isinstance(answer, Answer) else None
        attempt: Attempt = {"at": at, "durationMs": took, "statusCode": code, "error": decision.error}
        self._store(delivery, [*delivery.attempts.value, attempt], decision)
        return isinstance(answer, Answer)

    def _refusal(self, delivery: Delivery, url: str | None) -> str | None:
        """Why a delivery is not to be sent by the settings as they are now."""
        if url is None:
            return "CCM_WEBHOOK_URL is not set any more"
        if delivery.target == DeliveryTarget.RUN and not allowed(url, self._addresses.allow):
            return f"CCM_WEBHOOK_ALLOW does not name {host_of(url)} any more"
        return None

    def _post(self, delivery: Delivery, url: str, body: bytes) -> Answer | str:
        """The receiver's answer, or why there is none."""
        try:
            return self._send(delivery, url, body)
        except NoAnswer as reason:
            return str(reason)
        except Exception as error:
            # Counted as a failed attempt: what always goes wrong would be tried again without end.
            log.exception("delivery %d cannot be sent", delivery.id)
            return f"a fault of the service: {type(error).__name__}"

    def _send(self, delivery: Delivery, url: str, body: bytes) -> Answer:
        """
        Raises:
            NoAnswer: there was none.
        """
        if not self._addresses.keys:
            self._say_unsigned()
        signed = headers(delivery.webhook_id, int(time.time()), body, self._addresses.keys)
        post = Post(url, signed, body, self._attempt_seconds, self._tls)
        with self._lock:
            if self._closed.is_set():
                raise NoAnswer("the service has stopped")
            self._posts[delivery.id] = post
        try:
            return post.send()
        finally:
            with self._lock:
                del self._posts[delivery.id]

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    def _store(self, delivery: Delivery, attempts: Sequence[Attempt], decision: RetryDecision) -> None:
        """Wait until it is committed, as long as it takes: tried again before, it would be sent twice.

        Raises:
            CCMError: the writer has stopped.
        """
        self._writer.submit(
            lambda transaction: self._outbox.tried(transaction, delivery, attempts, decision)
        ).future.result()
        self._say(delivery, decision)

    # ---- the log

    def _say(self, delivery: Delivery, decision: RetryDecision) -> None:
        what = f"run {delivery.run_id}: {delivery.event_type} for {delivery.host or 'CCM_WEBHOOK_URL'}"
        if decision.status == DeliveryStatus.DELIVERED:
            log.info("%s delivered", what)
        elif decision.status == DeliveryStatus.PENDING:
            log.warning("%s not delivered, again in %.0f s: %s", what, decision.pause, decision.error)
        elif decision.status == DeliveryStatus.FAILED:
            log.error("%s given up: %s; at last %s", what, decision.reason, decision.error)
        elif delivery.target == DeliveryTarget.RUN:
            log.warning("%s disabled with all that would follow for this run: %s", what, decision.reason)
        else:
            log.error("%s disabled, with all others for it until the next start: %s", what, decision.reason)

    def _say_unsigned(self) -> None:
        if not self._addresses.keys and not self._said_unsigned:
            self._said_unsigned = True
            log.warning("webhooks are not signed, so receivers cannot know who calls: CCM_WEBHOOK_SECRET signs them")
